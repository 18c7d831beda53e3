"""Rewrite images once so that every epoch reads them faster, and measure their channels for normalization.

    python prepare_data.py photos/ prepared/ --short_side 256 --statistics

SOURCE is anything that --path_to_data of the training scripts takes; OUT can then be given to --path_to_data instead.
OUT holds shards of JPEG files whose shorter side has at most 256 pixels; datasets.load_from_disk("prepared") loads them
too. With --format array, the shards hold decoded pixels, which are larger and read fastest. Without --short_side and
--quality, files are kept unchanged, and a run on OUT equals one on SOURCE. A folder with images/ and annotations/ gives
pairs for finetune_segmentation.py. damaged.jsonl lists unreadable images. After an interruption, repeat the command.
--statistics writes statistics.json into OUT, or SOURCE without OUT; the scripts take --mean and --std from it.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.batches import make_loader
from data.classes import ADE20K
from data.decode import MAX_PIXELS, VALIDITY, PixelFormat
from data.index import DataError, first_few, write_array
from data.masks import MaskFormat
from data.pairs import SegmentationFolder, open_pairs
from data.prepared import PLAN, PREPARED, PREPARING, SETTINGS, VERSION, keeps_files, open_prepared, read_prepared
from data.sources import kind_of_data, open_sources
from data.statistics import STATISTICS, is_statistics, merge, statistics_of
from data.writing import QUALITY, ArrayEncoder, FileEncoder, Measure, index_arrays, index_files, is_eight_bit
from training import arguments, launch
from training.arguments import integer, number
from training.files import alone_at, write_json
from training.wording import in_bytes

PROBED = 64  # images that are encoded to estimate the size of all
CHUNK_SAMPLES, CHUNK_BYTES = 256, 8e6  # limits of what a process encodes at a time
BEGUN = (PREPARING, f".{Path(PLAN).name}.tmp")  # all files of a folder before its plan is written
OWN_SETTINGS = (*SETTINGS, "shard_size", "mask_offset")  # keys of a plan; older plans lack the last
FLAGS = {"channels": "input_channels"}  # setting -> flag, if the names differ


def parse_args(argv=None):
    """Return the flags and error messages."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag("source", metavar="SOURCE", help=arguments.SOURCES)
    flag("out", nargs="?", metavar="OUT", help="folder to write")
    flag("--data_format", choices=arguments.DATA_FORMATS, help="kind (default: detected from suffixes and content)")
    flag("--format", choices=("jpeg", "array"), default="jpeg", help="image files or decoded pixels (default jpeg)")
    flag("--short_side", type=integer(1), metavar="N", help="shrink the shorter side to N pixels (default: unchanged)")
    flag("--quality", type=integer(1, 100), metavar="Q", help=f"JPEG quality of all (default: {QUALITY}, if shrunk)")
    flag("--shard_size", type=number(1e-3), default=512, metavar="MB", help="approximate size of a file (default 512)")
    flag("--statistics", action="store_true", help=f"measure the channels of the training images ({STATISTICS})")
    flag("--verify", action="store_true", help="compare the shards of OUT, or of SOURCE, with their checksums")
    flag("--num_workers", type=integer(0), help="worker processes (default min(32, cores))")
    flag("--mask_offset", type=int, choices=(0, 1), help="label of the first class in annotations/ (default 1)")
    flag("--cache_dir", help="folder for indices of large data sets (default ~/.cache/masked-autoencoders)")
    flag, real = parser.add_argument_group("images").add_argument, number(-math.inf)
    flag("--input_channels", type=integer(1), default=3, help="3 (colour), 1 (grey), or bands (default 3)")
    flag("--value_range", type=real, nargs=2, metavar=("LO", "HI"), help="values that become 0 and 1 (default: 8 bits)")
    flag("--nodata", type=real, help="value of pixels without data, besides a GeoTIFF's own and NaN")
    flag("--validity", choices=VALIDITY, help="mark of invalid pixels, as in pretrain_mae.py")
    flag("--max_pixels", type=integer(1), default=MAX_PIXELS, help=f"larger images are damaged (default {MAX_PIXELS})")
    args, errors = parser.read(argv)
    if args.out is None:
        for name in ("format", "short_side", "quality", "shard_size"):
            if getattr(args, name) != parser.get_default(name):
                errors.append(f"--{name} needs a folder to write; give OUT")
        if not (args.statistics or args.verify):
            errors.append("OUT is missing; give a folder to write, or --statistics or --verify")
    elif Path(args.source).is_dir() and Path(args.out).resolve().is_relative_to(Path(args.source).resolve()):
        errors.append(f"OUT {args.out} is inside SOURCE, whose images would change; give another folder")
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        errors.append(f"--value_range {format_flag(args.value_range)} is not increasing; give the value of black first")
    if args.format == "array" and args.quality is not None:
        errors.append("--quality needs --format jpeg; leave it out")
    encodes = args.format == "jpeg" and (args.short_side or args.quality)
    if encodes and (args.value_range or args.input_channels not in (1, 3)):
        errors.append("JPEG holds 1 or 3 channels of 8 bits; with --value_range or other channels give --format array")
    if args.validity and (encodes or args.format == "array"):
        errors.append("--validity needs images as they are; leave out --format array, --short_side and --quality")
    return args, errors


def format_flag(value):
    """Return a flag's value as it is typed, to the last digit."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(repr(part).removesuffix(".0") if isinstance(part, float) else str(part) for part in values)


def spread(source):
    """Return the indices of at most PROBED evenly spread samples."""
    count = min(PROBED, len(source))
    return [index * len(source) // count for index in range(count)]


def describe(source, damaged):
    """Return how many images are damaged, and the first of them with the reasons."""
    first = (f"{source.name(index)}: {reason}" for index, reason in damaged)
    return f"{len(damaged)} images cannot be read: {first_few(first, len(damaged))}"


def mean_size(encoder):
    """Estimate the mean size of an encoded image in bytes. Raises DataError if no image can be read."""
    indices, sizes, damaged = spread(encoder.source), [], []
    for index in indices:
        if image := encoder.encode(index, damaged):
            sizes.append(sum(memoryview(part).nbytes for part in image))
    if len(damaged) == len(indices):
        raise DataError(f"no image can be used; {describe(encoder.source, damaged)}")
    return sum(sizes) / len(sizes)


def make_plan(encoders, content):
    """Return the plan for a new folder of this content; it determines every byte to write. Raises DataError."""
    has_masks = any(getattr(encoder.source, "has_masks", False) for encoder in encoders.values())
    if has_masks and (content["short_side"] is not None or content["format"] == "array"):
        raise DataError("the images have masks, which need their own size and --format jpeg; leave out --short_side")
    plan = {**content, "bounds": {}, "bytes": {}, "chunk": {}}
    plan["dtype"] = "uint8" if content["format"] == "jpeg" or content["value_range"] is None else "float32"
    for split, encoder in encoders.items():
        size, samples = mean_size(encoder), len(encoder.source)
        shards = min(samples, max(1, math.ceil(samples * size / (content["shard_size"] * 1e6))))
        plan["bounds"][split] = [number * samples // shards for number in range(shards + 1)]
        plan["bytes"][split] = round(samples * size)
        plan["chunk"][split] = max(1, min(CHUNK_SAMPLES, int(CHUNK_BYTES / max(1, size))))
    return plan


def check_same(output, found, content):
    """Raise DataError if the folder was started with other settings or images than those of `content`."""
    errors = [
        f"{output} was started with --{FLAGS.get(name, name)} {format_flag(found.get(name))}, not "
        f"{format_flag(content[name])}; repeat that command, or give another OUT"
        for name in OWN_SETTINGS
        if found.get(name) != content[name]
    ]
    if any(found.get(name) != content[name] for name in ("version", "fingerprint", "source_bytes")):
        errors.append(f"{output} was started with other images or another version of this script; give another OUT")
    if errors:
        raise DataError("\n".join(errors))


def read_plan(path):
    """Return the plan of a folder that this script has begun, None if there is none."""
    try:
        plan = json.loads(path.read_text())
        return plan if {"version", "bounds", "chunk"} <= plan.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def start_or_resume(output, encoders, content):
    """Return the plan of a new or an unfinished folder. Raises DataError."""
    path = output / PLAN
    if plan := read_plan(path):
        check_same(output, plan, content)
    elif output.is_file() or any(path.name not in BEGUN for path in output.rglob("*")):
        raise DataError(f"{output} holds something else; give an empty folder or a new one")
    else:
        plan = make_plan(encoders, content)
    records = [read_record(output, name) for split in encoders for name in shard_names(plan, split)]
    done = [record for record in records if record is not None]
    missing = sum(plan["bytes"].values()) - sum(record["shard"]["bytes"] for record in done)
    free = shutil.disk_usage(output if output.exists() else output.parent).free
    images = ", ".join(f"{len(encoder.source)} {split}" for split, encoder in encoders.items())
    print(f"images     {images}\nto write   about {in_bytes(missing)}; {in_bytes(free)} are free")
    if done:
        print(f"resumes    {len(done)} of {len(records)} shards are finished")
    if missing > free:
        sizes = f"needs about {in_bytes(missing)}, and {in_bytes(free)} are free"
        raise DataError(f"{output} {sizes}; make room, or give a smaller --short_side")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)
    return plan


def checksum(path):
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_names(plan, split):
    """Return the shards of a split, as paths below the folder."""
    count, suffix = len(plan["bounds"][split]) - 1, {"jpeg": "arrow", "array": "bin"}[plan["format"]]
    return [f"{split}/data-{number:05d}-of-{count:05d}.{suffix}" for number in range(count)]


def record_path(output, name):
    """Return the path of a finished shard's record; with the suffix .npy, it is that of its images' sizes."""
    return output / PREPARING / f"{name.replace('/', '-')}.json"


def read_record(output, name):
    """Return the record of a shard, None if it is not finished."""
    path = record_path(output, name)
    return json.loads(path.read_text()) if path.is_file() and (output / name).is_file() else None


def write_split(output, plan, split, encoder, num_workers, bar):
    """Write the unfinished shards of a split, in the order of the samples."""
    (output / split).mkdir(exist_ok=True)
    bounds, size, chunks = plan["bounds"][split], plan["chunk"][split], {}
    for name, start, end in zip(shard_names(plan, split), bounds, bounds[1:], strict=False):
        if read_record(output, name) is None:
            chunks[name] = [range(first, min(first + size, end)) for first in range(start, end, size)]
        else:
            bar.update(end - start)
    batches = [indices for shard in chunks.values() for indices in shard]
    loader = iter(make_loader(encoder, batches, num_workers=num_workers if len(batches) > 1 else 0))
    for name, shard in chunks.items():
        path, samples, shapes, damaged = output / name, 0, [], []
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:
            file.write(encoder.header)
            for indices, chunk in zip(shard, loader, strict=False):
                file.write(chunk.data)
                samples += chunk.samples
                shapes.append(chunk.shapes)
                damaged += chunk.damaged
                bar.update(len(indices))
            file.write(encoder.footer)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)  # so that a shard is complete or absent
        record = dict(file=name, samples=samples, bytes=path.stat().st_size, sha256=checksum(path))
        if plan["format"] == "array":
            write_array(record_path(output, name).with_suffix(".npy"), np.concatenate(shapes))
        write_json(record_path(output, name), {"shard": record, "damaged": damaged})


def finish(output, plan, encoders):
    """Write the indices of finished shards, damaged.jsonl and, last, prepared.json; return the content of the last."""
    sources, shards, damaged = {split: encoder.source for split, encoder in encoders.items()}, [], []
    for split, source in sources.items():
        names = shard_names(plan, split)
        records = [read_record(output, name) for name in names]
        shards += [record["shard"] for record in records]
        failures = [failure for record in records for failure in record["damaged"]]
        if plan["format"] == "jpeg":
            for name, content in index_files(source, split, [record["shard"] for record in records]).items():
                write_json(output / split / name, content)
        else:
            shapes = [np.load(record_path(output, name).with_suffix(".npy")) for name in names]
            pixel_bytes = plan["channels"] * np.dtype(plan["dtype"]).itemsize
            for name, column in index_arrays(source, shapes, [index for index, _ in failures], pixel_bytes).items():
                write_array(output / split / f"{name}.npy", column)
        damaged += [json.dumps({"path": source.name(index), "reason": reason}) + "\n" for index, reason in failures]
    (output / "damaged.jsonl").write_text("".join(damaged))
    prepared = {key: plan.get(key) for key in ("version", *OWN_SETTINGS, "dtype", "fingerprint", "source_bytes")}
    if plan["format"] == "jpeg":
        write_json(output / "dataset_dict.json", {"splits": list(sources)})
        if isinstance(sources["train"], SegmentationFolder):
            names, path = sources["train"].classes, sources["train"].class_file
            content = "\n".join(names).encode() if path == ADE20K else path.read_bytes()
            (output / "classes.txt").write_bytes(content)
    else:
        prepared["classes"] = {split: source.classes for split, source in sources.items()}
    prepared |= {"shards": shards, "damaged": len(damaged)}
    write_json(output / PREPARED, prepared)
    shutil.rmtree(output / PREPARING)
    return prepared


def prepare(output, encoders, settings, num_workers):
    """Write the folder, or the shards that are missing in it. Raises DataError and RunError."""
    with alone_at(output):
        content = {"version": VERSION, **settings}
        content["fingerprint"] = {split: encoder.source.fingerprint() for split, encoder in encoders.items()}
        content["source_bytes"] = {split: round(encoder.source.size_in_bytes()) for split, encoder in encoders.items()}
        if (output / PREPARED).is_file():
            check_same(output, read_prepared(output), content)
            if read_plan(output / PLAN):  # left by a kill during its removal; a user's folder has no plan
                shutil.rmtree(output / PREPARING)
            print(f"already finished: {output}; --verify compares it with its checksums")
            return
        plan = start_or_resume(output, encoders, content)
        with tqdm(total=sum(len(encoder.source) for encoder in encoders.values()), unit="image") as bar:
            for split, encoder in encoders.items():
                write_split(output, plan, split, encoder, num_workers, bar)
        prepared = finish(output, plan, encoders)
        size = in_bytes(sum(shard["bytes"] for shard in prepared["shards"]))
        print(f"written    {output}: {size}; damaged images: {prepared['damaged']}")
        if prepared["damaged"]:
            state = "kept unchanged" if keeps_files(settings) else "left out"
            print(f"damaged    {state}, and listed in {output / 'damaged.jsonl'}")


def verify(folder):
    """Compare all shards with their checksums. Raises DataError and RunError."""
    if kind_of_data(str(folder)) != "prepared":
        raise DataError(f"{folder} was not written by this script; give --verify a prepared folder")
    shards = tqdm(read_prepared(folder)["shards"], unit="shard")
    changed = [shard["file"] for shard in shards if checksum(folder / shard["file"]) != shard["sha256"]]
    if changed:
        files = first_few(changed, len(changed))
        raise launch.RunError(f"{folder}: shards have changed ({files}); remove the folder and prepare it again")
    print(f"verified   {folder}: all {len(shards)} checksums match")


def measure(source, pixels, num_workers):
    """Return the content of statistics.json. Raises DataError if no image can be read."""
    eight_bit = pixels.value_range is None and is_eight_bit(source, spread(source), pixels)
    total, damaged = [], []  # `total` holds the Moments of all images so far, if any
    chunks = [range(start, min(start + 32, len(source))) for start in range(0, len(source), 32)]
    dataset = Measure(source, pixels, eight_bit=eight_bit)
    with tqdm(total=len(source), unit="image") as bar:
        for moments, failures in make_loader(dataset, chunks, num_workers=num_workers if len(chunks) > 1 else 0):
            total = [merge([*total, *moments])] if moments else total
            damaged += failures
            bar.update(len(moments) + len(failures))
    if not total:
        raise DataError(f"no image can be measured; {describe(source, damaged)}")
    print(f"measured   {total[0].images} images")
    if damaged:
        print(f"warning: {describe(source, damaged)}", file=sys.stderr)
    return statistics_of(total[0], pixels, eight_bit=eight_bit)


def report_statistics(statistics, folder):
    """Write statistics.json into the data's folder, if there is one, and print the flags."""
    names = ("channels", "value_range", "nodata", "mean", "std")
    flags = {FLAGS.get(name, name): statistics[name] for name in names if statistics[name] is not None}
    print("statistics " + " ".join(f"--{name} {format_flag(value)}" for name, value in flags.items()))
    path = folder / STATISTICS
    if os.path.lexists(path) and not is_statistics(path):
        print(f"           give the scripts these flags: {path} was written by another program, and is kept")
    elif folder.is_dir() and os.access(folder, os.W_OK):
        write_json(path, statistics)
        print(f"           written to {path}, where the scripts find them")
    else:
        print("           give the scripts these flags, as there is no folder to write them to")


def open_all(source, pixels, mask_format, *, any_range, **options):
    """Open the sources of all splits, with masks if the folder has them. Raises DataError.

    With `any_range`, images that need a value range open without one. `options` are those of `open_sources`.
    """
    parts = [Path(source, part) for part in ("images", "annotations")]
    kind, opens = kind_of_data(source, options["data_format"]), partial(open_sources, **options)
    if kind == "folder" and all(part.is_dir() for part in parts):
        opens = partial(open_pairs, mask_format=mask_format, **options)
    try:
        train, validation = opens(source, pixels)
    except DataError:
        if not any_range or pixels.value_range is not None:
            raise
        train, validation = opens(source, pixels._replace(value_range=(0.0, 1.0)))
    return {"train": train} if validation is None else {"train": train, "validation": validation}


def main(argv=None):
    """Run the script; see the module's docstring."""
    # Flags
    args, errors = parse_args(argv)
    if errors:
        launch.fail(errors)
    num_workers = min(32, launch.cores_per_process()) if args.num_workers is None else args.num_workers
    value_range = tuple(args.value_range) if args.value_range else None
    pixels = PixelFormat(args.input_channels, value_range, args.nodata, args.max_pixels, args.validity)
    settings = {name: getattr(args, FLAGS.get(name, name)) for name in OWN_SETTINGS}
    folder = Path(args.out or args.source)

    try:
        # Source
        if args.out or args.statistics:
            options = dict(cache=args.cache_dir, data_format=args.data_format)
            sources = open_all(args.source, pixels, MaskFormat(args.mask_offset), any_range=not args.out, **options)
            for source in sources.values():
                for line in source.notes:
                    print(line)
                for error in source.label_errors:
                    print(f"warning: {error}; they are left out", file=sys.stderr)
                source.prepare(processes=max(1, num_workers), progress=True)

        # Shards
        if args.out:
            encoder = FileEncoder if args.format == "jpeg" else ArrayEncoder
            encoders = {split: encoder(source, settings, pixels) for split, source in sources.items()}
            prepare(folder, encoders, settings, num_workers)
        if args.verify:
            verify(folder)

        # Statistics
        if args.statistics:
            train = open_prepared(folder, pixels)["train"] if args.out else sources["train"]
            report_statistics(measure(train, pixels, num_workers), folder)
    except DataError as error:
        launch.fail(str(error).splitlines())


if __name__ == "__main__":
    launch.run_script(main, remedy="repeat the same command to continue")

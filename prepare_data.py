"""Rewrites images once, so that every epoch reads them faster; and measures their channels for the normalisation.

    python prepare_data.py photos/ prepared/ --short_side 256 --statistics

SOURCE is what --path_to_data of the training scripts takes, and so is OUT. OUT holds shards of JPEG files, shrunk until
the shorter side has 256 pixels (the library datasets loads them too: load_from_disk("prepared")), or with --format
array of decoded pixels (uint8, with --value_range float32), which take more room and are read fastest. Without
--short_side and --quality the files are kept as they are, and a run on OUT equals one on SOURCE. Of a folder with
images/ and annotations/, OUT holds the pairs for finetune_segmentation.py. damaged.jsonl names what could not be read.
An interrupted preparation goes on when the same command is repeated. --statistics writes statistics.json into OUT, from
which the scripts take --mean and --std; without OUT it measures SOURCE:

    python prepare_data.py elevation/ --statistics --input_channels 1
"""

import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from data.arrow import END
from data.batches import make_loader
from data.decode import MAX_PIXELS, DamagedImage, PixelFormat, WrongPixels, decode_stored, own_values
from data.index import DataError, first_few
from data.pool import watch_parent
from data.prepared import (
    PLAN,
    PREPARED,
    PREPARING,
    SETTINGS,
    VERSION,
    is_prepared,
    keeps_files,
    open_prepared,
    read_prepared,
)
from data.segmentation import SegmentationFolder, open_pairs
from data.sources import image_of, kind_of_data, open_sources
from data.statistics import STATISTICS, merge, moments_of, statistics_of
from training import arguments, launch
from training.arguments import integer, number, one_of
from training.checkpoint import alone_at, write_json
from training.launch import RunError, fail
from training.wording import in_bytes

QUALITY = 90  # of JPEG, where only --short_side is given
PROBED = 64  # images from which the size of all is estimated
BEGUN = (PREPARING, f".{Path(PLAN).name}.tmp")  # all that there is before a plan is written
CHUNK_SAMPLES, CHUNK_BYTES = 256, 8e6  # what a process encodes at a time, at most
FLAGS = {"channels": "input_channels"}  # settings that have another name than their flag
LONGEST = 65500  # pixels of a side that libjpeg writes


def parse_args(argv=None):
    """The flags, and what is wrong with them."""
    parser = arguments.Parser(__doc__)
    flag = parser.add_argument
    flag("source", nargs="?", metavar="SOURCE", help=arguments.SOURCES)
    flag("out", nargs="?", metavar="OUT", help="folder to write")
    flag("--format", type=one_of("jpeg", "array"), help="encoded files or decoded pixels (default jpeg)")
    flag("--short_side", type=integer(1), metavar="N", help="shrink to N pixels on the shorter side (default: do not)")
    flag(
        "--quality",
        type=integer(1, 100),
        metavar="Q",
        help=f"encode every image as JPEG of this quality (left out: only those that are shrunk, at {QUALITY})",
    )
    flag("--shard_size", type=number(1e-3), metavar="MB", help="about the size of a file (default 512)")
    flag("--statistics", action="store_true", help=f"measure the channels of the training images: {STATISTICS}")
    flag("--verify", action="store_true", help="compare the shards of OUT, or of SOURCE, with their checksums")
    flag("--num_workers", type=integer(0), help="processes that encode (default min(32, cores))")
    flag("--cache_dir", help="where indices of large data sets are kept (default ~/.cache/masked-autoencoders)")
    flag = parser.add_argument_group("images").add_argument
    flag("--input_channels", type=integer(1), default=3, help="3 (colour), 1 (grey), or bands (default 3)")
    flag(
        "--value_range",
        type=number(-math.inf),
        nargs=2,
        metavar=("LO", "HI"),
        help="read 16-bit and float pixels at full depth, LO as 0 and HI as 1 (default: 8 bits)",
    )
    flag("--nodata", type=number(-math.inf), help="value of pixels without data, besides a GeoTIFF's own and NaN")
    flag("--max_pixels", type=integer(1), default=MAX_PIXELS, help=f"larger images are damaged (default {MAX_PIXELS})")
    args, errors = parser.read(argv)
    if args.source is None:
        errors.append("SOURCE is missing; give what --path_to_data takes, and OUT, a folder to write")
    elif args.out is None:
        given = [name for name in ("format", "short_side", "quality", "shard_size") if getattr(args, name) is not None]
        errors += [f"--{name} is of a folder that is written; give OUT with it" for name in given]
        if not (args.statistics or args.verify):
            errors.append("OUT is missing; give a folder to write, or --statistics or --verify to look at SOURCE alone")
    elif Path(args.source).is_dir() and Path(args.out).resolve().is_relative_to(Path(args.source).resolve()):
        errors.append(f"OUT {args.out} lies in SOURCE, whose images would then be others; give another place")
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        errors.append(f"--value_range {typed(args.value_range)} is no range; give the value of black first")
    args.format, args.shard_size = args.format or "jpeg", args.shard_size or 512
    if args.format == "array" and args.quality is not None:
        errors.append("--quality is of --format jpeg; leave it out")
    encodes = args.format == "jpeg" and (args.short_side or args.quality)
    if encodes and (args.value_range or args.input_channels not in (1, 3)):
        errors.append("JPEG holds 1 or 3 channels of 8 bits; give --format array with --value_range or other channels")
    return args, errors


def typed(value):
    """A flag's value as it is typed: typing it gives the same numbers, to the last digit."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(repr(part).removesuffix(".0") if isinstance(part, float) else str(part) for part in values)


# What becomes of the images: this runs in the worker processes


class Chunk(NamedTuple):
    """What became of some images in a row."""

    data: bytes  # what a shard holds of them
    samples: int  # that it holds
    shapes: np.ndarray | None  # (height, width) of each, (samples, 2), for pixels that are decoded
    damaged: list[tuple[int, str]]  # index and reason of those that cannot be read


class Encoder(Dataset):
    """Takes a list of sample indices and makes a Chunk of them; `begin` and `end` are what else a shard holds.

    One image at a time is in memory at its own size.
    """

    begin = end = b""
    ends_with_parent = False

    def __init__(self, source, settings, pixels):
        self.source, self.settings, self.pixels = source, settings, pixels

    def __len__(self):
        return len(self.source)

    def __getitems__(self, indices):
        if get_worker_info() is not None and not self.ends_with_parent:
            self.ends_with_parent = True
            watch_parent()  # the loader's own check cannot end it while a chunk waits to be taken
        kept, images, damaged = [], [], []
        for index in indices:
            image = self.encoded(index, damaged)
            if image is not None:
                kept.append(index)
                images.append(image)
        return self.packed(kept, images, damaged)


class ArrayEncoder(Encoder):
    """Pixels (H, W, C), one image after the other: uint8, or with a value range the stored numbers as float32, which
    holds 16 bits and what has no data (NaN)."""

    def encoded(self, index, damaged):
        """The image's pixels; or None, and it is appended to `damaged`."""
        (data,) = self.source.fetch([index])
        try:
            values = values_of(data, self.pixels, stored=self.pixels.value_range is not None)
            return shrink(values.astype(type_of_pixels(self.pixels), copy=False), self.settings["short_side"])
        except DamagedImage as error:
            damaged.append((index, str(error)))

    def size(self, image):
        """Bytes that it takes."""
        return image.nbytes

    def packed(self, kept, images, damaged):
        """The chunk of these images."""
        data = b"".join(image.tobytes() for image in images)
        shapes = np.array([image.shape[:2] for image in images], dtype=np.int32).reshape(-1, 2)
        return Chunk(data, len(kept), shapes, damaged)


def type_of_pixels(pixels):
    """Of the shards of --format array."""
    return "uint8" if pixels.value_range is None else "float32"


class FileEncoder(Encoder):
    """Encoded images, with labels and masks where the source has them: batches of rows of an Arrow stream."""

    def __init__(self, source, settings, pixels):
        super().__init__(source, settings, pixels)
        self.schema = features_of(source).arrow_schema
        self.begin, self.end = self.schema.serialize().to_pybytes(), END

    def encoded(self, index, damaged):
        """The image and its mask, bytes each; or None, and it is appended to `damaged`. Files that are kept as they are
        are kept damaged, too: as in the source, the run will show others instead."""
        keeps = keeps_files(self.settings)
        (data,) = self.source.fetch([index])
        (mask,) = self.source.fetch_masks([index]) if has_masks(self.source) else [None]
        try:
            image = self.kept(data) if keeps else self.recoded(data)
            if mask is not None:
                check_mask(mask)
        except DamagedImage as error:
            damaged.append((index, str(error)))
            if not keeps:
                return None
            image = b"" if isinstance(data, OSError) else bytes(data)
            mask = b"" if isinstance(mask, OSError) else mask
        return image, None if mask is None else bytes(mask)

    def kept(self, data):
        """The file itself, if it can be decoded."""
        if isinstance(data, np.ndarray):
            raise DamagedImage("it is no file but decoded pixels; give --quality, or --format array")
        image_of(data, self.pixels)
        return bytes(data)

    def recoded(self, data):
        """A JPEG file: the file itself, where that is one and neither --short_side nor --quality changes it."""
        short_side, quality = self.settings["short_side"], self.settings["quality"]
        # Twice the sides leave the resizing enough to filter
        min_sides = None if short_side is None else (2 * short_side, 2 * short_side)
        pixels = image_of(data, self.pixels, min_sides).permute(1, 2, 0).numpy()
        small = shrink(pixels, short_side)
        if small is pixels and quality is None and bytes(data[:2]) == b"\xff\xd8":
            return bytes(data)
        if max(small.shape) > LONGEST:
            raise DamagedImage("{} x {} pixels, more than JPEG holds; give --format array".format(*small.shape[:2]))
        file, grey = io.BytesIO(), small.shape[2] == 1
        image = Image.fromarray(small[..., 0] if grey else small)
        image.save(file, "JPEG", quality=quality or QUALITY, **({} if grey else {"subsampling": "4:2:0"}))
        return file.getvalue()

    def size(self, image):
        """Bytes that it takes."""
        return sum(len(part) for part in image if part is not None)

    def packed(self, kept, images, damaged):
        """The chunk of these images."""
        import pyarrow as pa

        if not kept:
            return Chunk(b"", 0, None, damaged)
        rows = [{"image": {"bytes": image}, "mask": {"bytes": mask}} for image, mask in images]
        for row, index in zip(rows, kept, strict=True):
            row["image"]["path"] = relative_name(self.source, index)
            row["label"] = None if self.source.labels is None else int(self.source.labels[index])
        data = pa.RecordBatch.from_pylist(rows, self.schema).serialize().to_pybytes()  # only the columns of the schema
        return Chunk(data, len(kept), None, damaged)


def has_masks(source):
    """Whether each image has a mask."""
    return getattr(source, "has_masks", False)


def check_mask(mask):
    """Raises DamagedImage for a mask that cannot be read."""
    try:
        decode_stored(readable(mask))
    except DamagedImage as error:
        raise DamagedImage(f"its mask: {error}") from None


def readable(data):
    """What a source fetched. Raises DamagedImage where it could not be read."""
    if isinstance(data, OSError):
        raise DamagedImage(data.strerror or str(data))
    return data


def relative_name(source, index):
    """An image's path below the data's folder, or all of its name; as text that any program reads."""
    name = source.name(index).removeprefix(os.path.join(getattr(source, "root", ""), ""))
    return os.fsencode(name).decode(errors="replace")


def values_of(data, pixels, *, stored):
    """What a source fetched, as 8-bit pixels (H, W, C), or as the numbers that are `stored`, NaN where there are no
    data. Raises DamagedImage."""
    if not stored:
        return image_of(data, pixels).permute(1, 2, 0).numpy()
    if isinstance(data, np.ndarray):
        return data if pixels.nodata is None else np.where(data == pixels.nodata, np.float32(np.nan), data)
    return own_values(readable(data), pixels.channels, nodata=pixels.nodata, max_pixels=pixels.max_pixels)


def shrink(values, short_side):
    """(H, W, C), uint8 or float32, by antialiased bicubic to `short_side` on the shorter side, as transforms.evaluation
    resizes; or `values` themselves where they are no longer. What has no data (NaN) spreads over the filter's width."""
    height, width, _ = values.shape
    if short_side is None or min(height, width) <= short_side:
        return values
    size = [side * short_side // min(height, width) for side in (height, width)]
    image = torch.from_numpy(values.copy()).permute(2, 0, 1)[None]  # torch warns about memory that cannot be written to
    return interpolate(image, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).contiguous().numpy()


def features_of(source):
    """The columns of the shards, for the library datasets."""
    import datasets

    features = {"image": datasets.Image()}
    if source.labels is not None:
        features["label"] = datasets.ClassLabel(names=source.classes)
    if has_masks(source):
        features["mask"] = datasets.Image()
    return datasets.Features(features)


# The plan


def spread(source):
    """Indices of some samples, the first among them, spread evenly."""
    count = min(PROBED, len(source))
    return [index * len(source) // count for index in range(count)]


def make_encoders(sources, settings, pixels):
    """An encoder for each split."""
    encoder = FileEncoder if settings["format"] == "jpeg" else ArrayEncoder
    return {split: encoder(source, settings, pixels) for split, source in sources.items()}


def mean_size(encoder):
    """About the bytes that an image takes. Raises DataError where none can be read."""
    sizes, damaged = [], []
    for index in spread(encoder.source):
        image = encoder.encoded(index, damaged)
        if image is not None:
            sizes.append(encoder.size(image))
    if len(damaged) == len(spread(encoder.source)):
        lines = [f"{encoder.source.name(index)}: {reason}" for index, reason in damaged[:3]]
        raise DataError("\n".join([*lines, f"none of {len(damaged)} images that were looked at can be used"]))
    return sum(sizes) / len(sizes)


def identities(sources):
    """What tells the images of each split from others: fingerprints, and about the bytes of all files."""
    return {
        "fingerprint": {split: source.fingerprint() for split, source in sources.items()},
        "source_bytes": {split: round(source.size_in_bytes()) for split, source in sources.items()},
    }


def make_plan(sources, settings, pixels):
    """What is to be written, which decides every byte of it: settings, type, what the sources are, which sample goes
    into which shard. Raises DataError."""
    if any(map(has_masks, sources.values())):
        if settings["short_side"] is not None:
            raise DataError("--short_side: the images have masks, which are scored at their own size; leave it out")
        if settings["format"] == "array":
            raise DataError("--format array holds no masks, and the images have some; give --format jpeg")
    plan = {"version": VERSION, **settings, **identities(sources), "bounds": {}, "bytes": {}, "chunk": {}}
    plan["dtype"] = type_of_pixels(pixels) if settings["format"] == "array" else "uint8"
    for split, encoder in make_encoders(sources, settings, pixels).items():
        size = mean_size(encoder)
        shards = min(len(encoder), max(1, math.ceil(len(encoder) * size / (settings["shard_size"] * 1e6))))
        plan["bounds"][split] = [number * len(encoder) // shards for number in range(shards + 1)]
        plan["bytes"][split] = round(len(encoder) * size)
        plan["chunk"][split] = max(1, min(CHUNK_SAMPLES, int(CHUNK_BYTES / max(1, size))))
    return plan


def check_same(output, found, settings, sources):
    """Raises DataError where the folder was begun with other settings or images, a line each."""
    if found["version"] != VERSION:
        raise DataError(f"{output} was begun by another version; remove it, or give another OUT")
    errors = [
        f"{output} was begun {described(name, found[name])}, not {described(name, settings[name])}; "
        "repeat that command, or give another OUT"
        for name in settings
        if found[name] != settings[name]
    ]
    if any(found.get(name) != value for name, value in identities(sources).items()):
        what = "number, names, sizes or labels"
        errors.append(f"{output} was begun with other images: they differ in {what}; give another OUT")
    if errors:
        raise DataError("\n".join(errors))


def described(name, value):
    """A setting as its flag."""
    flag = f"--{FLAGS.get(name, name)}"
    return f"without {flag}" if value is None else f"with {flag} {typed(value)}"


# Writing


def checksum(path):
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_names(plan, split):
    """The shards of a split, as paths below the folder."""
    count, suffix = len(plan["bounds"][split]) - 1, {"jpeg": "arrow", "array": "bin"}[plan["format"]]
    return [f"{split}/data-{number:05d}-of-{count:05d}.{suffix}" for number in range(count)]


def record_path(output, name):
    """Where it is noted that a shard is finished."""
    return output / PREPARING / f"{name.replace('/', '-')}.json"


def shapes_path(output, name):
    """Where the (height, width) of each image of a finished shard of pixels are noted."""
    return record_path(output, name).with_suffix(".npy")


def read_record(output, name):
    """What is noted of a finished shard, None of another."""
    path = record_path(output, name)
    return json.loads(path.read_text()) if path.is_file() and (output / name).is_file() else None


def write_array(path, array):
    """Writes an .npy file, to the disk."""
    with open(path, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def write_split(output, plan, split, encoder, num_workers, bar):
    """Writes those shards of a split that are not finished, in the order of the samples."""
    (output / split).mkdir(exist_ok=True)
    bounds, size, chunks = plan["bounds"][split], plan["chunk"][split], {}
    for name, start, end in zip(shard_names(plan, split), bounds, bounds[1:], strict=False):
        if read_record(output, name) is None:
            chunks[name] = [range(first, min(first + size, end)) for first in range(start, end, size)]
        else:
            bar.update(end - start)
    batches = [indices for shard in chunks.values() for indices in shard]
    loader = iter(make_loader(encoder, batches, num_workers=num_workers if len(batches) > 1 else 0))
    for name, indices in chunks.items():
        samples, shapes, damaged = 0, [], []
        path = output / name
        part = path.with_name(f".{path.name}.part")
        with open(part, "wb") as file:
            file.write(encoder.begin)
            for seen, chunk in zip(indices, loader, strict=False):
                file.write(chunk.data)
                samples += chunk.samples
                shapes.append(chunk.shapes)
                damaged += chunk.damaged
                bar.update(len(seen))
            file.write(encoder.end)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)  # so that it is whole or absent
        record = dict(file=name, samples=samples, bytes=path.stat().st_size, sha256=checksum(path))
        if plan["format"] == "array":
            write_array(shapes_path(output, name), np.concatenate(shapes))
        write_json(record_path(output, name), {"shard": record, "damaged": damaged})


def write_files_index(output, plan, split, source, records):
    """What the library datasets wants beside the shards of a split."""
    checksums = "".join(record["shard"]["sha256"] for record in records)
    state = {
        "_data_files": [{"filename": Path(record["shard"]["file"]).name} for record in records],
        "_fingerprint": hashlib.sha256(checksums.encode()).hexdigest()[:16],
        **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        "_split": split,
    }
    write_json(output / split / "dataset_info.json", {"features": features_of(source).to_dict()})
    write_json(output / split / "state.json", state)


def write_array_index(output, plan, split, source, records):
    """Where each image of a split lies, and what it is."""
    shapes = [np.load(shapes_path(output, record["shard"]["file"])) for record in records]
    sizes = [plan["channels"] * np.dtype(plan["dtype"]).itemsize * shape.prod(1, dtype=np.int64) for shape in shapes]
    damaged = [index for record in records for index, _ in record["damaged"]]
    kept = np.setdiff1d(np.arange(len(source)), damaged)
    names, name_ends = bytearray(), np.empty(len(kept), dtype=np.int64)  # as Names has them
    for place, index in enumerate(kept):
        names += os.fsencode(relative_name(source, int(index)))
        name_ends[place] = len(names)
    columns = dict(zip(("heights", "widths"), np.concatenate(shapes).T, strict=True))
    columns["offsets"] = np.concatenate([size.cumsum() - size for size in sizes])
    columns["names"], columns["name_ends"] = np.frombuffer(names, dtype=np.uint8), name_ends
    if source.labels is not None:
        columns["labels"] = np.asarray(source.labels, dtype=np.int32)[kept]
    for name, column in columns.items():
        write_array(output / split / f"{name}.npy", column)


def finish(output, plan, sources):
    """Writes what is known when all shards are finished, prepared.json last. Returns how many images are damaged."""
    shards, damaged = [], []
    for split, source in sources.items():
        records = [read_record(output, name) for name in shard_names(plan, split)]
        write_index = write_files_index if plan["format"] == "jpeg" else write_array_index
        write_index(output, plan, split, source, records)
        shards += [record["shard"] for record in records]
        faults = [fault for record in records for fault in record["damaged"]]
        damaged += [json.dumps({"path": source.name(index), "reason": reason}) + "\n" for index, reason in faults]
    (output / "damaged.jsonl").write_text("".join(damaged))
    noted = ("version", *SETTINGS, "shard_size", "dtype", "fingerprint", "source_bytes")
    content = {name: plan[name] for name in noted}
    if plan["format"] == "jpeg":
        write_json(output / "dataset_dict.json", {"splits": list(sources)})
        if isinstance(sources["train"], SegmentationFolder):
            (output / "classes.txt").write_text("\n".join(sources["train"].classes), encoding="utf-8")
    else:
        content["classes"] = {split: source.classes for split, source in sources.items()}
    write_json(output / PREPARED, {**content, "shards": shards, "damaged": len(damaged)})
    shutil.rmtree(output / PREPARING)
    return len(damaged)


def begin(output, settings, sources, pixels):
    """The plan of a folder that is begun, or goes on. Raises DataError where that cannot be."""
    path = output / PLAN
    if path.is_file():
        plan = json.loads(path.read_text())
        check_same(output, plan, settings, sources)
    elif output.exists() and not (output.is_dir() and all(path.name in BEGUN for path in output.rglob("*"))):
        raise DataError(f"{output} holds something else; give an empty folder or a new one")
    else:
        plan = make_plan(sources, settings, pixels)
    records = [read_record(output, name) for split in sources for name in shard_names(plan, split)]
    done = [record for record in records if record is not None]
    missing = sum(plan["bytes"].values()) - sum(record["shard"]["bytes"] for record in done)
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    images = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    print(f"images     {images}\nto write   about {in_bytes(missing)} of {in_bytes(free)} that are free in {place}")
    if done:
        print(f"goes on    {len(done)} of {len(records)} shards are finished")
    if missing > free:
        raise DataError(
            f"{output} needs about {in_bytes(missing)}, and {in_bytes(free)} are free in {place}; make room, or give a "
            "smaller --short_side"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)
    return plan


def prepare(output, settings, sources, pixels, num_workers):
    """Writes the folder, or what is missing of it. Raises DataError and RunError."""
    with alone_at(output):
        if (output / PREPARED).is_file():
            check_same(output, read_prepared(output), settings, sources)
            shutil.rmtree(output / PREPARING, ignore_errors=True)
            print(f"finished already: {output}; --verify compares it with its checksums")
            return
        start_time = time.monotonic()
        plan = begin(output, settings, sources, pixels)
        encoders = make_encoders(sources, settings, pixels)
        with tqdm(total=sum(map(len, sources.values())), unit="image") as bar:
            for split, encoder in encoders.items():
                write_split(output, plan, split, encoder, num_workers, bar)
        damaged = finish(output, plan, sources)
        written = sum(shard["bytes"] for shard in read_prepared(output)["shards"])
        seconds = time.monotonic() - start_time
        print(f"written    {output}: {in_bytes(written)} in {seconds:.3g} s; damaged images: {damaged}")
        if damaged:
            what = "kept as they are" if keeps_files(settings) else "left out"
            print(f"damaged    {what}, and listed in {output / 'damaged.jsonl'}")


def verify(folder, num_workers):
    """Compares all shards with their checksums. Raises DataError and RunError."""
    if not is_prepared(folder):
        raise DataError(f"--verify: {folder} is no folder that this script has written; give one")
    shards = read_prepared(folder)["shards"]
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        sums = pool.map(checksum, [folder / shard["file"] for shard in shards])
        found = list(tqdm(sums, total=len(shards), unit="shard"))
    wrong = [shard["file"] for shard, found in zip(shards, found, strict=True) if found != shard["sha256"]]
    if wrong:
        raise RunError(
            f"{folder}: {len(wrong)} of {len(shards)} shards are not as they were written "
            f"({first_few(wrong, len(wrong))}); remove the folder and prepare it again"
        )
    print(f"verified   {folder}: {len(shards)} shards are as they were written")


# Statistics


class Measure(Dataset):
    """Takes a list of sample indices: (the Moments of those that can be read, index and reason of the others).

    `eight_bit`: of the pixels that a run sees; otherwise of the numbers as they are stored.
    """

    def __init__(self, source, pixels, *, eight_bit):
        self.source, self.pixels, self.eight_bit = source, pixels, eight_bit

    def __getitems__(self, indices):
        moments, damaged = [], []
        for index in indices:
            (data,) = self.source.fetch([index])
            try:
                if self.eight_bit:  # whatever the files are: a run compares --nodata after it has converted them
                    data = values_of(data, self.pixels._replace(nodata=None), stored=False)
                values = values_of(data, self.pixels, stored=True)
                moments.append(moments_of(values, self.pixels.value_range))
            except DamagedImage as error:
                damaged.append((index, str(error)))
        return moments, damaged


def is_eight_bit(source, pixels):
    """Whether some images, those that can be read, have 8 bits: a run without --value_range sees the numbers that they
    store. Their type does not tell, as it is float32 where a file has pixels of its own nodata."""
    pixels = pixels._replace(nodata=None)
    for index in spread(source):
        (data,) = source.fetch([index])
        try:
            stored = values_of(data, pixels, stored=True)
        except DamagedImage:
            continue
        if stored.dtype == np.uint8:
            continue
        try:
            seen, known = values_of(data, pixels, stored=False), np.isfinite(stored)
        except WrongPixels:
            return False
        except DamagedImage:  # no pixel with data
            continue
        if not np.array_equal(seen[known], stored[known]):
            return False
    return True


def measure(source, pixels, num_workers):
    """The content of statistics.json. Raises DataError where no image can be read."""
    eight_bit = pixels.value_range is None and is_eight_bit(source, pixels)
    data = Measure(source, pixels, eight_bit=eight_bit)
    total, damaged = [], []  # the Moments of all images, once there are some
    chunks = [range(start, min(start + 32, len(source))) for start in range(0, len(source), 32)]
    with tqdm(total=len(source), unit="image") as bar:
        for moments, faults in make_loader(data, chunks, num_workers=num_workers if len(chunks) > 1 else 0):
            total = [merge([*total, *moments])] if moments else total
            damaged += faults
            bar.update(len(moments) + len(faults))
    for index, reason in damaged[:3]:
        print(f"warning: {source.name(index)}: {reason}", file=sys.stderr)
    if not total:
        raise DataError(f"none of {len(source)} images can be measured; the first: {damaged[0][1]}")
    print(f"measured   {total[0].images} images" + (f"; {len(damaged)} cannot be read" if damaged else ""))
    return statistics_of(total[0], pixels, eight_bit=eight_bit)


def tell_statistics(statistics, folder):
    """Writes statistics.json into the data's folder, where it has one, and prints the flags."""
    names = ("channels", "value_range", "nodata", "mean", "std")
    flags = {FLAGS.get(name, name): statistics[name] for name in names}
    print("statistics " + " ".join(f"--{name} {typed(value)}" for name, value in flags.items() if value is not None))
    if folder.is_dir() and os.access(folder, os.W_OK):
        write_json(folder / STATISTICS, statistics)
        print(f"           written to {folder / STATISTICS}, where the scripts find them")
    else:
        print("           give the scripts these flags: there is no folder to write them to")


def open_all(source, pixels, *, cache, any_range):
    """The sources of all splits, of pairs where the folder holds such; `any_range`: also of images whose range of
    values is still to be found. Raises DataError."""
    parts = [Path(source, part) for part in ("images", "annotations")]
    opens = open_pairs if kind_of_data(source) == "folder" and all(part.is_dir() for part in parts) else open_sources
    try:
        train, validation = opens(source, pixels, cache=cache)
    except DataError:
        if not any_range or pixels.value_range is not None:
            raise
        train, validation = opens(source, pixels._replace(value_range=(0.0, 1.0)), cache=cache)
    return {"train": train} if validation is None else {"train": train, "validation": validation}


def main(argv=None):
    """Runs the script; see the module's docstring."""
    # Flags
    args, errors = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = (
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected one process; start it with python prepare_data.py"
        )
        fail([message, *errors], show=launch.is_main_process())
    if errors:
        fail(errors)
    if args.num_workers is None:
        args.num_workers = min(32, launch.cores_per_process())
    value_range = tuple(args.value_range) if args.value_range else None
    pixels = PixelFormat(args.input_channels, value_range, args.nodata, args.max_pixels)
    settings = {name: getattr(args, FLAGS.get(name, name)) for name in (*SETTINGS, "shard_size")}
    folder = Path(args.out or args.source)

    try:
        # Source
        if args.out or args.statistics:
            sources = open_all(args.source, pixels, cache=args.cache_dir, any_range=not args.out)
            for source in sources.values():
                source.prepare(processes=max(1, args.num_workers), progress=True)

        # Shards
        if args.out:
            prepare(folder, settings, sources, pixels, args.num_workers)
        if args.verify:
            verify(folder, args.num_workers)

        # Statistics
        if args.statistics:
            train = open_prepared(folder, pixels)["train"] if args.out else sources["train"]
            tell_statistics(measure(train, pixels, args.num_workers), folder)
    except DataError as error:
        fail(str(error).splitlines())


if __name__ == "__main__":
    launch.run_script(main, remedy="repeat the same command, which goes on")

"""Rewrites images once, so that every epoch reads them faster; and measures their channels for the normalisation.

    python prepare_data.py photos/ prepared/ --short_side 256 --statistics

SOURCE is what --path_to_data of the training scripts takes, and so is OUT. OUT holds shards of JPEG files, shrunk until
the shorter side has 256 pixels (the library datasets loads them too: load_from_disk("prepared")), or with --format
array of decoded pixels, which take more room and are read fastest. Without --short_side and --quality the files are
kept as they are, and a run on OUT equals one on SOURCE. damaged.jsonl names what could not be read. An interrupted
preparation goes on when the same command is repeated. --statistics writes statistics.json into OUT, from which the
scripts take --mean and --std; without OUT it measures SOURCE:

    python prepare_data.py elevation/ --statistics --input_channels 1
"""

import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import Dataset, get_worker_info
from tqdm import tqdm

from data.batches import make_loader
from data.decode import MAX_PIXELS, DamagedImage, PixelFormat, decode_stored, own_values
from data.index import DataError
from data.prepared import (
    PREPARED,
    PREPARING,
    SETTINGS,
    STATISTICS,
    VERSION,
    is_prepared,
    keeps_files,
    open_prepared,
    read_prepared,
)
from data.sources import image_of, open_sources
from training import arguments
from training.arguments import RunError, fail, integer, number, one_of
from training.checkpoint import alone_at, write_json

QUALITY = 90  # of JPEG, where only --short_side is given
PROBED = 64  # images from which the size of all is estimated
CHUNK_SAMPLES, CHUNK_BYTES = 256, 8e6  # what a process encodes at a time, at most
FLAGS = {"channels": "input_channels"}  # settings that have another name than their flag
LONGEST = 65500  # pixels of a side that libjpeg writes
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow


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
    """A flag's value as it is typed."""
    values = value if isinstance(value, list | tuple) else [value]
    return " ".join(f"{number:.9g}" if isinstance(number, float) else str(number) for number in values)


# What becomes of the images: this runs in the worker processes


class Chunk(NamedTuple):
    """What became of some images in a row."""

    data: bytes  # what a shard holds of them
    samples: int  # that it holds
    shapes: list[tuple[int, int]]  # (height, width) of each, for pixels that are decoded
    damaged: list[tuple[int, str]]  # index and reason of those that cannot be read
    seen: int


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
            threading.Thread(target=end_with_parent, daemon=True).start()
        kept, images, damaged = [], [], []
        for index in indices:
            image = self.encoded(index, damaged)
            if image is not None:
                kept.append(index)
                images.append(image)
        return self.packed(kept, images, damaged, len(indices))


def end_with_parent():
    """Ends a worker process when the main one is gone, even killed. The loader's own check cannot do it while a chunk
    waits to be taken."""
    multiprocessing.parent_process().join()
    os._exit(1)


class ArrayEncoder(Encoder):
    """Pixels (H, W, C), one image after the other."""

    def __init__(self, source, settings, pixels, *, dtype):
        super().__init__(source, settings, pixels)
        self.dtype = np.dtype(dtype)

    def encoded(self, index, damaged):
        """The image's pixels; or None, and it is appended to `damaged`."""
        (data,) = self.source.fetch([index])
        try:
            if self.pixels.value_range is None:
                values = image_of(data, self.pixels).permute(1, 2, 0).numpy()
            else:
                values = stored_values(data, self.pixels)
            if not np.can_cast(values.dtype, self.dtype):
                raise DamagedImage(f"{values.dtype} pixels, which are not held by the {self.dtype} of the others")
            return shrink(values, self.settings["short_side"]).astype(self.dtype, copy=False)
        except DamagedImage as error:
            damaged.append((index, str(error)))

    def size(self, image):
        """Bytes that it takes."""
        return image.nbytes

    def packed(self, kept, images, damaged, seen):
        """The chunk of these images."""
        data = b"".join(image.tobytes() for image in images)
        return Chunk(data, len(kept), [image.shape[:2] for image in images], damaged, seen)


class FileEncoder(Encoder):
    """Encoded images, with labels and masks where the source has them: batches of rows of an Arrow stream."""

    def __init__(self, source, settings, pixels):
        super().__init__(source, settings, pixels)
        self.schema = arrow_schema(source)
        self.begin, self.end = self.schema.serialize().to_pybytes(), END_OF_STREAM

    def encoded(self, index, damaged):
        """The image and its mask, bytes each; or None, and it is appended to `damaged`. Files that are kept as they are
        are kept damaged, too: as in the source, the run will show others instead."""
        keeps = keeps_files(self.settings)
        (data,), (mask,) = self.source.fetch([index]), self.masks([index])
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

    def masks(self, indices):
        """The encoded masks, None where there are none."""
        return self.source.fetch_masks(indices) if has_masks(self.source) else [None for _ in indices]

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

    def packed(self, kept, images, damaged, seen):
        """The chunk of these images."""
        import pyarrow as pa

        if not kept:
            return Chunk(b"", 0, [], damaged, seen)
        names = [relative_name(self.source, index) for index in kept]
        columns = {"image": [{"bytes": image, "path": name} for name, (image, _) in zip(names, images, strict=True)]}
        if self.source.labels is not None:
            columns["label"] = np.asarray(self.source.labels)[kept].tolist()
        columns["mask"] = [{"bytes": mask, "path": None} for _, mask in images]
        arrays = [pa.array(columns[field.name], field.type) for field in self.schema]
        rows = pa.RecordBatch.from_arrays(arrays, schema=self.schema).serialize()
        return Chunk(rows.to_pybytes(), len(kept), [], damaged, seen)


def has_masks(source):
    """Whether each image has a mask."""
    return getattr(source, "has_masks", False)


def check_mask(mask):
    """Raises DamagedImage for a mask that cannot be read."""
    try:
        if isinstance(mask, OSError):
            raise DamagedImage(mask.strerror or str(mask))
        decode_stored(mask)
    except DamagedImage as error:
        raise DamagedImage(f"its mask: {error}") from None


def relative_name(source, index):
    """An image's path below the data's folder, or all of its name; as text that any program reads."""
    name = source.name(index).removeprefix(os.path.join(getattr(source, "root", ""), ""))
    return os.fsencode(name).decode(errors="replace")


def stored_values(data, pixels):
    """What a source fetched, as the numbers (H, W, C) that are stored, NaN where there are no data. Raises
    DamagedImage."""
    if isinstance(data, OSError):
        raise DamagedImage(data.strerror or str(data))
    if isinstance(data, np.ndarray):
        return data if pixels.nodata is None else np.where(data == pixels.nodata, np.float32(np.nan), data)
    return own_values(data, pixels.channels, nodata=pixels.nodata, max_pixels=pixels.max_pixels)


def shrink(values, short_side):
    """(H, W, C) of any type, by antialiased bicubic to `short_side` on the shorter side, as transforms.evaluation
    resizes; or `values` themselves where they are no longer. What has no data (NaN) spreads over the filter's width."""
    height, width, _ = values.shape
    if short_side is None or min(height, width) <= short_side:
        return values
    size = [side * short_side // min(height, width) for side in (height, width)]
    pixels = values.astype(values.dtype if values.dtype == np.uint8 else np.float32)  # a copy that can be written to
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    small = interpolate(image, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).contiguous().numpy()
    if values.dtype == np.uint16:
        small = small.round().clip(0, 2**16 - 1)
    return small.astype(values.dtype, copy=False)


def arrow_schema(source):
    """The columns of the shards, of the types that the library datasets gives them."""
    import pyarrow as pa

    file = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns = features_of(source)
    types = {"Image": file, "ClassLabel": pa.int64()}
    metadata = {"huggingface": json.dumps({"info": {"features": columns}})}
    return pa.schema([(name, types[column["_type"]]) for name, column in columns.items()], metadata)


def features_of(source):
    """The columns of the shards, as the library datasets writes them down."""
    features = {"image": {"_type": "Image"}}
    if source.labels is not None:
        features["label"] = {"names": source.classes, "_type": "ClassLabel"}
    if has_masks(source):
        features["mask"] = {"_type": "Image"}
    return features


# The plan


def spread(source):
    """Indices of some samples, the first among them, spread evenly."""
    count = min(PROBED, len(source))
    return [index * len(source) // count for index in range(count)]


def stored_type(sources, pixels):
    """The type that holds the stored numbers of some images without loss; None where they cannot be read."""
    types = []
    pixels = pixels._replace(nodata=None)  # which would make floats of them
    for source in sources:
        for index in spread(source):
            (data,) = source.fetch([index])
            try:
                types.append(stored_values(data, pixels).dtype)
            except DamagedImage:
                continue
    return np.result_type(*types) if types else None


def make_encoders(sources, settings, pixels, dtype):
    """An encoder for each split."""
    if settings["format"] == "jpeg":
        return {split: FileEncoder(source, settings, pixels) for split, source in sources.items()}
    return {split: ArrayEncoder(source, settings, pixels, dtype=dtype) for split, source in sources.items()}


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


def make_plan(sources, settings, pixels):
    """What is to be written, which decides every byte of it: settings, type, fingerprints, which sample goes into which
    shard. Raises DataError."""
    if any(map(has_masks, sources.values())):
        if settings["short_side"] is not None:
            raise DataError("--short_side: the images have masks, which are scored at their own size; leave it out")
        if settings["format"] == "array":
            raise DataError("--format array holds no masks, and the images have some; give --format jpeg")
    dtype = "uint8"
    if settings["format"] == "array" and pixels.value_range is not None:
        dtype = "float32" if pixels.nodata is not None else str(stored_type(sources.values(), pixels) or dtype)
    plan = {"version": VERSION, **settings, "dtype": dtype, "bounds": {}, "bytes": {}, "chunk": {}}
    plan["fingerprint"] = {split: source.fingerprint() for split, source in sources.items()}
    for split, encoder in make_encoders(sources, settings, pixels, dtype).items():
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
    if found["fingerprint"] != {split: source.fingerprint() for split, source in sources.items()}:
        errors.append(f"{output} was begun with other images: they differ in number or names; give another OUT")
    if errors:
        raise DataError("\n".join(errors))


def described(name, value):
    """A setting as its flag."""
    flag = f"--{FLAGS.get(name, name)}"
    return f"without {flag}" if value is None else f"with {flag} {typed(value)}"


# Writing


class ShardFile:
    """A file that is whole or absent, and knows its checksum."""

    def __init__(self, path):
        self.path, self.part = path, path.with_name(f".{path.name}.part")
        self.bytes, self.hash = 0, hashlib.sha256()

    def __enter__(self):
        self.file = open(self.part, "wb")
        return self

    def write(self, data):
        """Appends `data`."""
        self.file.write(data)
        self.hash.update(data)
        self.bytes += len(data)

    def __exit__(self, kind, error, trace):
        with self.file:
            self.file.flush()
            os.fsync(self.file.fileno())
        if kind is None:
            self.part.replace(self.path)


def shard_names(plan, split):
    """The shards of a split, as paths below the folder."""
    count, suffix = len(plan["bounds"][split]) - 1, {"jpeg": "arrow", "array": "bin"}[plan["format"]]
    return [f"{split}/data-{number:05d}-of-{count:05d}.{suffix}" for number in range(count)]


def record_path(output, name):
    """Where it is noted that a shard is finished."""
    return output / PREPARING / f"{name.replace('/', '-')}.json"


def read_record(output, name):
    """What is noted of a finished shard, None of another."""
    path = record_path(output, name)
    return json.loads(path.read_text()) if path.is_file() and (output / name).is_file() else None


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
        with ShardFile(output / name) as file:
            file.write(encoder.begin)
            for chunk in islice(loader, len(indices)):
                file.write(chunk.data)
                samples += chunk.samples
                shapes += chunk.shapes
                damaged += chunk.damaged
                bar.update(chunk.seen)
            file.write(encoder.end)
        record = dict(file=name, samples=samples, bytes=file.bytes, sha256=file.hash.hexdigest())
        write_json(record_path(output, name), {"shard": record, "shapes": shapes, "damaged": damaged})


def write_files_index(output, plan, split, source, records):
    """What the library datasets wants beside the shards of a split."""
    info = {"citation": "", "description": "", "features": features_of(source), "homepage": "", "license": ""}
    checksums = "".join(record["shard"]["sha256"] for record in records)
    state = {
        "_data_files": [{"filename": Path(record["shard"]["file"]).name} for record in records],
        "_fingerprint": hashlib.sha256(checksums.encode()).hexdigest()[:16],
        **{"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False},
        "_split": split,
    }
    write_json(output / split / "dataset_info.json", info)
    write_json(output / split / "state.json", state)


def write_array_index(output, plan, split, source, records):
    """Where each image of a split lies, and what it is."""
    bounds, pixel_bytes = plan["bounds"][split], plan["channels"] * np.dtype(plan["dtype"]).itemsize
    offsets, shapes, kept = [], [], []
    for record, start, end in zip(records, bounds, bounds[1:], strict=False):
        shape = np.array(record["shapes"], dtype=np.int64).reshape(-1, 2)
        sizes = shape.prod(1) * pixel_bytes
        offsets.append(sizes.cumsum() - sizes)
        shapes.append(shape.astype(np.int32))
        kept.append(np.setdiff1d(np.arange(start, end), [index for index, _ in record["damaged"]]))
    shapes, kept = np.concatenate(shapes), np.concatenate(kept)
    names = [os.fsencode(relative_name(source, int(index))) for index in kept]
    columns = dict(offsets=np.concatenate(offsets), heights=shapes[:, 0], widths=shapes[:, 1])
    columns["names"] = np.frombuffer(b"".join(names), np.uint8)
    columns["name_ends"] = np.cumsum([len(name) for name in names], dtype=np.int64)
    if source.labels is not None:
        columns["labels"] = np.asarray(source.labels, dtype=np.int32)[kept]
    for name, column in columns.items():
        with open(output / split / f"{name}.npy", "wb") as file:
            np.save(file, column)
            file.flush()
            os.fsync(file.fileno())


def finish(output, plan, sources):
    """Writes what is known when all shards are finished, prepared.json last. Returns how many images are damaged."""
    shards, count = [], 0
    with open(output / "damaged.jsonl", "w") as file:
        for split, source in sources.items():
            records = [read_record(output, name) for name in shard_names(plan, split)]
            write_index = write_files_index if plan["format"] == "jpeg" else write_array_index
            write_index(output, plan, split, source, records)
            shards += [record["shard"] for record in records]
            for index, reason in (each for record in records for each in record["damaged"]):
                file.write(json.dumps({"path": source.name(index), "reason": reason}) + "\n")
                count += 1
    content = {name: plan[name] for name in ("version", *SETTINGS, "shard_size", "dtype", "fingerprint")}
    if plan["format"] == "jpeg":
        write_json(output / "dataset_dict.json", {"splits": list(sources)})
    else:
        content["classes"] = {split: source.classes for split, source in sources.items()}
    write_json(output / PREPARED, {**content, "shards": shards, "damaged": count})
    shutil.rmtree(output / PREPARING)
    return count


def begin(output, settings, sources, pixels):
    """The plan of a folder that is begun, or goes on. Raises DataError where that cannot be."""
    path = output / PREPARING / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text())
        check_same(output, plan, settings, sources)
    elif output.exists() and not (output.is_dir() and {*os.listdir(output)} <= {PREPARING}):
        raise DataError(f"{output} holds something else; give an empty folder or a new one")
    else:
        plan = make_plan(sources, settings, pixels)
    records = [read_record(output, name) for split in sources for name in shard_names(plan, split)]
    done = [record for record in records if record is not None]
    missing = sum(plan["bytes"].values()) - sum(record["shard"]["bytes"] for record in done)
    place = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(place).free
    images = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    print(f"images     {images}\nto write   about {in_words(missing)} of {in_words(free)} that are free in {place}")
    if done:
        print(f"goes on    {len(done)} of {len(records)} shards are finished")
    if missing > free:
        raise DataError(
            f"{output} needs about {in_words(missing)}, and {in_words(free)} are free in {place}; make room, or give a "
            "smaller --short_side"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plan)
    return plan


def in_words(size):
    """A number of bytes."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = min(len(units) - 1, int(math.log10(max(size, 1)) / 3))
    return f"{size / 1000**power:.3g} {units[power]}"


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
        encoders = make_encoders(sources, settings, pixels, plan["dtype"])
        with tqdm(total=sum(map(len, sources.values())), unit="image") as bar:
            for split, encoder in encoders.items():
                write_split(output, plan, split, encoder, num_workers, bar)
        damaged = finish(output, plan, sources)
        written = sum(shard["bytes"] for shard in read_prepared(output)["shards"])
        seconds = time.monotonic() - start_time
        print(f"written    {output}: {in_words(written)} in {seconds:.3g} s; damaged images: {damaged}")
        if damaged:
            what = "kept as they are" if keeps_files(settings) else "left out"
            print(f"damaged    {what}, and listed in {output / 'damaged.jsonl'}")


def verify(folder, num_workers):
    """Compares all shards with their checksums. Raises DataError and RunError."""
    if not is_prepared(folder):
        raise DataError(f"--verify: {folder} is no folder that this script has written; give one")
    shards = read_prepared(folder)["shards"]

    def is_whole(shard):
        with open(folder / shard["file"], "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == shard["sha256"]

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        found = list(tqdm(pool.map(is_whole, shards), total=len(shards), unit="shard"))
    wrong = [shard["file"] for shard, whole in zip(shards, found, strict=True) if not whole]
    if wrong:
        names = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise RunError(
            f"{folder}: {len(wrong)} of {len(shards)} shards are not as they were written ({names}); "
            "remove the folder and prepare it again"
        )
    print(f"verified   {folder}: {len(shards)} shards are as they were written")


# Statistics


class Moments(NamedTuple):
    """Of the pixels of some images that have data, a number for each channel."""

    images: int
    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray  # sum of the squared distances from the mean
    low: np.ndarray
    high: np.ndarray


def moments_of(values, value_range):
    """Of one image (H, W, C), in units of `value_range` where that is given."""
    rows = []
    for channel in np.moveaxis(values, 2, 0):
        if channel.dtype == np.uint8 and value_range is None:  # counting is fastest
            count, own = np.bincount(channel.ravel(), minlength=256), np.arange(256.0)
            own, count = own[count > 0], count[count > 0]
        else:
            own = channel[np.isfinite(channel)].astype(np.float64)
            if value_range is not None:
                own = ((own - value_range[0]) / (value_range[1] - value_range[0])).clip(0, 1)
            count = np.ones(len(own))
        total = count.sum()
        mean = count @ own / max(1, total)
        extremes = (own.min(), own.max()) if total else (np.inf, -np.inf)
        rows.append((total, mean, count @ (own - mean) ** 2, *extremes))
    return Moments(1, *np.array(rows, dtype=np.float64).T)


def merge(a, b):
    """Of the images of both (Chan et al. 1979: nothing cancels, however far the mean is from 0)."""
    if a is None or b is None:
        return b if a is None else a
    count = a.count + b.count
    share = b.count / np.maximum(1, count)
    mean = a.mean * (1 - share) + b.mean * share
    squares = a.squares + b.squares + (b.mean - a.mean) ** 2 * a.count * share
    extremes = np.minimum(a.low, b.low), np.maximum(a.high, b.high)
    return Moments(a.images + b.images, count, mean, squares, *extremes)


class Measure(Dataset):
    """Takes a list of sample indices: (their Moments or None, index and reason of those that cannot be read).

    `stored`: of the numbers as they are stored; otherwise of 8-bit pixels.
    """

    def __init__(self, source, pixels, *, stored):
        self.source, self.pixels, self.stored = source, pixels, stored

    def __len__(self):
        return len(self.source)

    def __getitems__(self, indices):
        moments, damaged = None, []
        for index in indices:
            (data,) = self.source.fetch([index])
            try:
                if self.stored:
                    values = stored_values(data, self.pixels)
                else:
                    values = image_of(data, self.pixels).permute(1, 2, 0).numpy()
                moments = merge(moments, moments_of(values, self.pixels.value_range))
            except DamagedImage as error:
                damaged.append((index, str(error)))
        return moments, damaged, len(indices)


def measure(source, pixels, num_workers):
    """The content of statistics.json. Raises DataError where no image can be read."""
    dtype = stored_type([source], pixels)
    eight_bit = pixels.value_range is None and (dtype is None or dtype == np.uint8)
    data = Measure(source, pixels, stored=not eight_bit or pixels.nodata is not None)
    moments, damaged = None, []
    chunks = [range(start, min(start + 32, len(source))) for start in range(0, len(source), 32)]
    with tqdm(total=len(source), unit="image") as bar:
        for found, faults, seen in make_loader(data, chunks, num_workers=num_workers if len(chunks) > 1 else 0):
            moments = merge(moments, found)
            damaged += faults
            bar.update(seen)
    for index, reason in damaged[:3]:
        print(f"warning: {source.name(index)}: {reason}", file=sys.stderr)
    if moments is None:
        raise DataError(f"none of {len(source)} images can be measured; the first: {damaged[0][1]}")
    print(f"measured   {moments.images} images" + (f"; {len(damaged)} cannot be read" if damaged else ""))
    return statistics_of(moments, pixels, eight_bit=eight_bit)


def statistics_of(moments, pixels, *, eight_bit):
    """The content of statistics.json. Raises DataError where all pixels are the same."""
    mean, std = moments.mean, np.sqrt(moments.squares / np.maximum(1, moments.count))
    value_range, low, high = pixels.value_range, 0.0, 255.0
    if not eight_bit and value_range is None:
        low, high = float(moments.low.min()), float(moments.high.max())
        value_range = [low, high]
        if not low < high:
            raise DataError(f"all pixels are {low:g}, or have no data; expected images with something to see")
    if pixels.value_range is None:
        mean, std = (mean - low) / (high - low), std / (high - low)
    std = np.where(std < 1e-6, 1.0, std)  # a channel that is the same everywhere is not to be blown up
    return {
        "version": VERSION,
        "images": moments.images,
        "channels": pixels.channels,
        "value_range": None if value_range is None else list(value_range),
        "nodata": pixels.nodata,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def tell_statistics(statistics, folder):
    """Writes statistics.json into the data's folder, where it has one, and prints the flags."""
    rounded = {name: [float(f"{value:.6g}") for value in statistics[name]] for name in ("mean", "std")}
    flags = {
        "input_channels": statistics["channels"],
        **{n: statistics[n] for n in ("value_range", "nodata")},
        **rounded,
    }
    print("statistics " + " ".join(f"--{name} {typed(value)}" for name, value in flags.items() if value is not None))
    if folder.is_dir() and os.access(folder, os.W_OK):
        write_json(folder / STATISTICS, statistics)
        print(f"           written to {folder / STATISTICS}, where the scripts find them")
    else:
        print("           give the scripts these flags: there is no folder to write them to")


def open_all(source, pixels, *, cache, any_range):
    """The sources of all splits; `any_range`: also of images whose range of values is still to be found. Raises
    DataError."""
    try:
        train, validation = open_sources(source, pixels, cache=cache)
    except DataError:
        if not any_range or pixels.value_range is not None:
            raise
        train, validation = open_sources(source, pixels._replace(value_range=(0.0, 1.0)), cache=cache)
    return {"train": train} if validation is None else {"train": train, "validation": validation}


def main(argv=None):
    """Runs the script; see the module's docstring."""
    # Flags
    args, errors = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = (
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; expected one process; start it with python prepare_data.py"
        )
        fail([message, *errors], show=arguments.is_main_process())
    if errors:
        fail(errors)
    if args.num_workers is None:
        args.num_workers = min(32, arguments.cores_per_process())
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
    arguments.run_script(main, remedy="repeat the same command, which goes on")

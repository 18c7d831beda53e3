"""The mean and the standard deviation of a data set's channels: from the pixels of its images, and in statistics.json,
which prepare_data.py writes beside them."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.decode import PixelFormat
from data.index import DataError

VERSION = 1
STATISTICS = "statistics.json"


class Moments(NamedTuple):
    """Of the pixels of some images that have data, a number for each channel."""

    images: int
    count: np.ndarray
    mean: np.ndarray
    squares: np.ndarray  # sum of the squared distances from the mean
    low: np.ndarray
    high: np.ndarray


def moments_of(values: np.ndarray, value_range: tuple[float, float] | None) -> Moments:
    """Of one image (H, W, C), in units of `value_range` where that is given."""
    rows = []
    for channel in np.moveaxis(values, 2, 0):
        own = channel[np.isfinite(channel)].astype(np.float64)
        if value_range is not None:
            own = ((own - value_range[0]) / (value_range[1] - value_range[0])).clip(0, 1)
        mean = own.mean() if own.size else 0.0
        rows.append((own.size, mean, ((own - mean) ** 2).sum(), own.min(initial=np.inf), own.max(initial=-np.inf)))
    return Moments(1, *np.array(rows).T)


def merge(parts: Sequence[Moments]) -> Moments:
    """Of the images of all parts (Chan et al. 1979: nothing cancels, however far the mean is from 0)."""
    images, count, means, squares, low, high = map(np.array, zip(*parts, strict=True))
    mean = (count * means).sum(0) / np.maximum(1, count.sum(0))
    squares = (squares + count * (means - mean) ** 2).sum(0)
    return Moments(images.sum(), count.sum(0), mean, squares, low.min(0), high.max(0))


def statistics_of(moments: Moments, pixels: PixelFormat, *, eight_bit: bool) -> dict:
    """The content of statistics.json, see `read_statistics`; the moments are in units of `pixels.value_range`, or where
    there is none, of the numbers as they are stored. Raises DataError where all pixels are the same."""
    mean, std = moments.mean, np.sqrt(moments.squares / np.maximum(1, moments.count))
    value_range = pixels.value_range
    if value_range is None:
        low, high = (0.0, 255.0) if eight_bit else (float(moments.low.min()), float(moments.high.max()))
        if not low < high:
            what = f"all pixels are {low!r}" if math.isfinite(low) else "no pixel has data"
            raise DataError(f"{what}; expected images with something to see; look at --nodata and --input_channels")
        mean, std = (mean - low) / (high - low), std / (high - low)
        value_range = None if eight_bit else (low, high)
    std = np.where(std < 1e-6, 1.0, std)  # a channel that is the same everywhere is not to be blown up
    return {
        "version": VERSION,
        "images": int(moments.images),
        "channels": pixels.channels,
        "value_range": None if value_range is None else list(value_range),
        "nodata": pixels.nodata,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def read_statistics(folder: str | Path) -> dict | None:
    """The statistics.json of a data folder, None where it has none: `images` (their number), `channels`, `value_range`
    (None for 8-bit pixels) and `nodata` as the flags of these names, `mean` and `std` of each channel in [0, 1].

    Raises DataError for one that prepare_data.py did not write.
    """
    path = Path(folder) / STATISTICS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        faults = _faults(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults = [f"{type(error).__name__}: {error}"]
    if faults:
        raise DataError(
            f"{path} is not what prepare_data.py --statistics writes ({'; '.join(faults)}); write it anew, or remove it"
        )
    return found


def _faults(statistics: dict) -> list[str]:
    """What is wrong with the content of statistics.json; raises KeyError and TypeError for what is missing."""
    channels, value_range, faults = statistics["channels"], statistics["value_range"], []
    if statistics["version"] != VERSION:
        faults.append(f"version {statistics['version']}, expected {VERSION}")
    for name, least in (("mean", -math.inf), ("std", 1e-6)):
        values = statistics[name]
        if len(values) != channels or not all(math.isfinite(value) and value >= least for value in values):
            faults.append(f"{name} {values}")
    if value_range is not None and not (len(value_range) == 2 and value_range[0] < value_range[1]):
        faults.append(f"value_range {value_range}")
    if not (statistics["nodata"] is None or math.isfinite(statistics["nodata"])):
        faults.append(f"nodata {statistics['nodata']}")
    return faults

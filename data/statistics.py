"""Compute the mean and standard deviation of each channel of a data set, and read them from statistics.json."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.decode import PixelFormat
from data.index import DataError

VERSION = 1
STATISTICS = "statistics.json"


class Moments(NamedTuple):
    """The moments of the values with data in some images, arrays of one number per channel."""

    images: int  # number of images
    count: np.ndarray  # number of values
    mean: np.ndarray
    squares: np.ndarray  # sum of the squared distances from the mean
    low: np.ndarray
    high: np.ndarray


def moments_of(values: np.ndarray, value_range: tuple[float, float] | None) -> Moments:
    """Return the moments of an image (H, W, C), with values scaled from `value_range` to [0, 1] if it is given."""
    rows = []
    for channel in np.moveaxis(values, 2, 0):
        own = channel[np.isfinite(channel)].astype(np.float64)
        if value_range is not None:
            own = ((own - value_range[0]) / (value_range[1] - value_range[0])).clip(0, 1)
        mean = own.mean() if own.size else 0.0
        rows.append((own.size, mean, ((own - mean) ** 2).sum(), own.min(initial=np.inf), own.max(initial=-np.inf)))
    return Moments(1, *np.array(rows).T)


def merge(parts: Sequence[Moments]) -> Moments:
    """Combine moments by a method that is numerically stable for any mean (Chan et al. 1979)."""
    images, count, means, squares, low, high = map(np.array, zip(*parts, strict=True))
    mean = (count * means).sum(0) / np.maximum(1, count.sum(0))
    squares = (squares + count * (means - mean) ** 2).sum(0)
    return Moments(images.sum(), count.sum(0), mean, squares, low.min(0), high.max(0))


def statistics_of(moments: Moments, pixels: PixelFormat, *, eight_bit: bool) -> dict:
    """Return the content of statistics.json, see `read_statistics`.

    The moments are of values scaled by `pixels.value_range` or, if it is None, of the stored numbers. Then the range is
    0 to 255 if `eight_bit`, otherwise lowest to highest; DataError is raised if all pixels are equal or lack data.
    """
    mean, std = moments.mean, np.sqrt(moments.squares / np.maximum(1, moments.count))
    value_range = pixels.value_range
    if value_range is None:
        low, high = (0.0, 255.0) if eight_bit else (float(moments.low.min()), float(moments.high.max()))
        if not low < high:
            problem = f"all pixels are {low!r}" if math.isfinite(low) else "no pixel has data"
            raise DataError(f"{problem}; expected images that vary; check --nodata and --input_channels")
        mean, std = (mean - low) / (high - low), std / (high - low)
        value_range = None if eight_bit else (low, high)
    std = np.where(std < 1e-6, 1.0, std)  # so that normalization does not amplify a constant channel
    return {
        "version": VERSION,
        "images": int(moments.images),
        "channels": pixels.channels,
        "value_range": None if value_range is None else list(value_range),
        "nodata": pixels.nodata,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


def is_statistics(path: Path) -> bool:
    """Return True if a file has the keys that prepare_data.py writes in every version."""
    try:
        return {"version", "images", "channels", "nodata", "mean", "std"} <= json.loads(path.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def read_statistics(folder: str | Path) -> dict | None:
    """Read the statistics.json of a data folder; return None if there is none, or one of another program.

    It has the number of `images`; `channels`, `value_range` and `nodata` as in PixelFormat; and the `mean` and `std` of
    each channel, for values in [0, 1]. Raises DataError for a file that is damaged or of another version.
    """
    path = Path(folder) / STATISTICS
    if not os.path.isfile(path):
        return None
    try:
        statistics = json.loads(path.read_text())
        if not is_statistics(path):
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {path} was not written by prepare_data.py, and is not read", file=sys.stderr)
            return None
        mean, std, channels = (statistics[name] for name in ("mean", "std", "channels"))
        low, high = statistics["value_range"] or (0, 1)
        valid = statistics["version"] == VERSION and len(mean) == len(std) == channels
        valid = valid and low < high and min(std) >= 1e-6 and np.isfinite([*mean, *std]).all()
    except (OSError, ValueError, KeyError, TypeError):
        valid = False
    if not valid:
        raise DataError(f"{path} is not what prepare_data.py --statistics writes; remove it, and write it again")
    return statistics

"""Example images for the demo: validation images of a data set, or drawn scenes."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from data import shapes
from data.annotations import open_objects
from data.decode import PixelFormat
from data.index import DataError
from data.sampling import spread
from data.sources import kind_of_data, open_sources


class Example(NamedTuple):
    """An example image."""

    name: str
    index: int  # index in its source, on which its random mask depends
    data: object  # an argument of `decode`


def held_out_examples(flags: dict, pixels: PixelFormat, count: int, *, annotated: bool) -> list[Example]:
    """Return at most `count` validation images from the data of a run, [] if it has none.

    `flags` are those of the run; `annotated` data has boxes. Raises DataError, OSError, ImportError.
    """
    path, validation = flags["path_to_data"], flags.get("path_to_validation_data")
    if "hub" in map(kind_of_data, filter(None, (path, validation))):
        raise DataError("it is on the Hub, and nothing is downloaded")
    places = dict(validation=validation, cache=flags.get("cache_dir"))
    if annotated:
        _, source = open_objects(path, pixels, class_file=flags.get("path_to_classes"), **places)
    else:
        _, source = open_sources(path, pixels, data_format=flags.get("data_format"), **places)
    if source is None:
        return []
    source.prepare()
    return [Example(source.name(i), i, *source.fetch([i])) for i in spread(count, len(source))]


def drawn_examples(channels: int, count: int) -> list[Example]:
    """Return scenes of builtin:shapes with 1 or 3 channels, from the validation split, on which no run trains."""
    scenes = [Image.fromarray(shapes.draw(shapes.TRAIN_IMAGES + i)[0]) for i in range(count)]
    pixels = [np.atleast_3d(np.array(scene if channels == 3 else scene.convert("L"))) for scene in scenes]
    return [Example(f"scene {i}", i, data) for i, data in enumerate(pixels)]

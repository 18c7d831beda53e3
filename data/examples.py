"""Images to begin with: held-out images of a data set, or drawn scenes."""

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
    """Hold an image to begin with."""

    name: str
    index: int  # in its source, on which its masks depend
    data: object  # as `decode` takes it


def held_out_examples(flags: dict, pixels: PixelFormat, count: int, *, annotated: bool) -> list[Example]:
    """Return held-out images of the data of a run, none if it holds out none.

    `flags` are those of its script; `annotated` says that its data has boxes. Raises DataError, OSError, ImportError.
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
    """Return drawn scenes, of one channel or three, on which no run trains."""
    scenes = [Image.fromarray(shapes.draw(shapes.TRAIN_IMAGES + i)[0]) for i in range(count)]
    pixels = [np.atleast_3d(np.array(scene if channels == 3 else scene.convert("L"))) for scene in scenes]
    return [Example(f"scene {i}", i, data) for i, data in enumerate(pixels)]

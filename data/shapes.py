"""Draw the built-in data set `builtin:shapes`: scenes with a class and a segmentation mask.

A scene has 64 x 64 pixels: a smooth coloured texture, one to four shaded objects of different shapes, and mild noise.
Its class is the shape of the largest object. A scene is a pure function of its index; nothing is downloaded or stored.
"""

import cmath
import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from data.pool import mapping

SIZE = 64  # pixels, height and width
TRAIN_IMAGES = 10_000
VALIDATION_IMAGES = 1_000
CLASSES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "hexagon")
SEGMENTATION_CLASSES = ("background", *CLASSES)

MAX_OBJECTS = 4
LARGEST_AREA = (280, 800)  # pixels, before occlusion and the image's edge
OTHER_AREA = (0.3, 0.65)  # areas of the other objects, relative to the largest
CLEARLY_LARGER = 1.25  # minimum ratio of the visible areas of the largest object and the second largest
BACKGROUND_CONTRAST = 120  # target Euclidean distance (RGB values 0..255) between an object and the mean background
OBJECT_CONTRAST = 80  # target distance between two objects
NOISE_SIGMA = 3  # standard deviation of the noise, for values 0..255
OVERSAMPLING = 4  # objects are drawn this much larger and averaged, for antialiased edges
CHUNK = 250  # scenes that a worker draws at a time

AXIS = np.arange(SIZE, dtype=np.float32)
# The normal distribution at 256 equal quantiles: looking up random bytes is much faster than sampling from it.
NOISE = np.array([round(NormalDist(0, NOISE_SIGMA).inv_cdf((byte + 0.5) / 256)) for byte in range(256)], np.int16)


def _outlines() -> list[np.ndarray]:
    """Return a closed polygon per class, as complex numbers x + iy, with its centre at 0 and area 1."""

    def corners(count: int) -> np.ndarray:
        return np.exp(2j * np.pi * np.arange(count) / count)

    t = 2 * np.pi * np.arange(49) / 48  # closed, so that the seam of the ring has no width
    ring = np.concatenate([np.exp(1j * t), 0.58 * np.exp(-1j * t)])
    star = corners(10) * np.tile([1, 0.45], 5)
    cross = (np.array([1 - 0.36j, 1 + 0.36j, 0.36 + 0.36j]) * corners(4)[:, None]).ravel()
    heart = 16 * np.sin(t) ** 3 - 1j * (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    outlines = []
    for points in (corners(48), corners(4), corners(3), star, cross, ring, heart, corners(6)):
        following = np.roll(points, -1)
        wedges = (points.conj() * following).imag / 2  # signed areas of the triangles (0, point, following point)
        centre = (wedges * (points + following)).sum() / (3 * wedges.sum())
        outlines.append((points - centre) / math.sqrt(abs(wedges.sum())))
    return outlines


OUTLINES = _outlines()
RADII = [float(np.abs(outline).max()) for outline in OUTLINES]


def draw(index: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Draw scene `index`, any integer from 0.

    Return the image, uint8 (64, 64, 3) RGB; the label, an index into `CLASSES`, of the object with the largest visible
    area; and the mask, uint8 (64, 64): 0 is background, label + 1 an object. No two objects of a scene share a class.
    """
    rng = np.random.default_rng(index)
    while True:  # rarely repeated: when occlusion leaves no object clearly the largest
        image, mask = _scene(rng)
        areas = mask.histogram()[1 : len(SEGMENTATION_CLASSES)]
        second, largest = sorted(areas)[-2:]
        if largest >= LARGEST_AREA[0] / 2 and largest >= CLEARLY_LARGER * second:
            break
    noise = NOISE.take(np.frombuffer(rng.bytes(SIZE * SIZE * 3), np.uint8)).reshape(SIZE, SIZE, 3)
    noisy = np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)
    return noisy, areas.index(largest), np.array(mask)


def _scene(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Draw a scene without noise (mode RGB) and its mask (mode L)."""
    mean_colour = rng.uniform(45, 210, 3).tolist()
    image, mask = _background(rng, mean_colour), Image.new("L", (SIZE, SIZE))
    count = int(rng.integers(1, MAX_OBJECTS + 1))
    areas = rng.uniform(*OTHER_AREA, count)
    areas[rng.integers(count)] = 1  # anywhere in the order, so the largest object may be in front or behind
    scales = np.sqrt(areas * rng.uniform(*LARGEST_AREA)).tolist()  # pixels, for outlines of area 1
    colours, places = [], []
    for label, scale in zip(rng.permutation(len(CLASSES))[:count].tolist(), scales, strict=True):
        colours.append(_pick_colour(rng, mean_colour, colours))
        places.append((_pick_centre(rng, scale, places), scale))
        _paint(rng, image, mask, label, scale, places[-1][0], colours[-1])
    return image, mask


def _background(rng: np.random.Generator, mean_colour: list[float]) -> Image.Image:
    """Draw smooth blotches or, from a small grid, a gradient; two thirds also get stripes, rings or a weave."""
    cells = int(rng.integers(2, 6))
    grid = np.clip(mean_colour + rng.uniform(-40, 40, (cells, cells, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(grid).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    kind, angle, wavelength, shift, x, y, opacity = rng.random(7).tolist()
    if kind < 1 / 3:
        return image
    frequency = 2 * math.pi / (12 + 16 * wavelength)  # waves 12 to 28 pixels long
    step = cmath.rect(frequency, 2 * math.pi * angle)
    phase = step.real * AXIS + (step.imag * AXIS + 2 * math.pi * shift)[:, None]  # (64, 64)
    if kind < 5 / 9:
        wave = np.sin(phase)
    elif kind < 7 / 9:
        wave = np.sin(frequency * np.sqrt((AXIS - SIZE * x) ** 2 + ((AXIS - SIZE * y) ** 2)[:, None]))
    else:
        wave = np.sin(phase) * np.sin(step.real * AXIS[:, None] - step.imag * AXIS)
    tint = tuple(np.clip(mean_colour + rng.uniform(-100, 100, 3), 0, 255).astype(int).tolist())
    image.paste(tint, mask=Image.fromarray(((30 + 40 * opacity) * (1 + wave)).astype(np.uint8)))
    return image


def _pick_colour(rng: np.random.Generator, mean_colour: list[float], others: list[list[float]]) -> list[float]:
    """Return a colour that stands out: R, G, B in 0..255."""

    def margin(colour: list[float]) -> float:
        distances = [math.dist(colour, other) - OBJECT_CONTRAST for other in others]
        return min([math.dist(colour, mean_colour) - BACKGROUND_CONTRAST, *distances])

    return _first_fit((255 * rng.random((8, 3))).tolist(), margin)


def _pick_centre(rng: np.random.Generator, scale: float, others: list[tuple[complex, float]]) -> complex:
    """Return a centre x + iy in pixels, mostly inside the image and with little overlap with the other objects."""

    def margin(place: complex) -> float:
        return min([abs(place - centre) - 0.55 * (scale + size) for centre, size in others], default=0)

    places = 0.6 * scale + (SIZE - 1.2 * scale) * rng.random((8, 2))
    return _first_fit([complex(x, y) for x, y in places.tolist()], margin)


def _first_fit(candidates: list, margin: Callable):
    """Return the first candidate with a margin of at least 0, or else the one with the largest."""
    fits = (candidate for candidate in candidates if margin(candidate) >= 0)
    return next(fits, None) or max(candidates, key=margin)


def _paint(rng, image: Image.Image, mask: Image.Image, label: int, scale: float, centre: complex, colour: list) -> None:
    """Paint an object over image and mask in place; only its bounding box is drawn."""
    rotation, light, strength = rng.random(3).tolist()
    points = OUTLINES[label] * cmath.rect(scale, 2 * math.pi * rotation) + centre
    reach, x, y = scale * RADII[label], centre.real, centre.imag
    left, top = max(int(x - reach), 0), max(int(y - reach), 0)
    right, bottom = min(int(x + reach) + 2, SIZE), min(int(y + reach) + 2, SIZE)
    width, height = right - left, bottom - top
    large = Image.new("L", (width * OVERSAMPLING, height * OVERSAMPLING))
    corners = (points - complex(left, top)) * OVERSAMPLING
    ImageDraw.Draw(large).polygon(corners.view(np.float64).tolist(), fill=255)
    coverage = large.reduce(OVERSAMPLING)

    # Light from one side: brightness changes by up to 40 percent at the corners of the box, linearly in between
    shades = [1 + 0.4 * strength * math.cos(2 * math.pi * (light + corner / 4)) for corner in (0, 1, 3, 2)]
    shaded = Image.frombytes("RGB", (2, 2), bytes([min(int(shade * c), 255) for shade in shades for c in colour]))
    shaded = shaded.resize((width, height), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5))
    image.paste(shaded, (left, top), coverage)
    mask.paste(label + 1, (left, top, right, bottom), coverage.convert("1", dither=Image.Dither.NONE))


def draw_split(split: str, *, processes: int = 1, progress: bool = False) -> tuple[np.ndarray, ...]:
    """Draw the "train" split (scenes 0..9999) or "validation" (10000..10999), the same for any number of processes.

    Return images, uint8 (N, 64, 64, 3); labels, int64 (N,); and masks, uint8 (N, 64, 64).
    """
    first, count = (0, TRAIN_IMAGES) if split == "train" else (TRAIN_IMAGES, VALIDATION_IMAGES)
    chunks = [range(first, first + count)[start : start + CHUNK] for start in range(0, count, CHUNK)]
    bar = dict(desc=f"drawing builtin:shapes ({split})", unit="image", unit_scale=CHUNK, disable=not progress)
    with mapping(processes) as in_order:
        parts = list(tqdm(in_order(draw_range, chunks), total=len(chunks), **bar))
    return tuple(np.concatenate(arrays) for arrays in zip(*parts, strict=True))


def draw_range(indices: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the scenes `indices`, and return them as `draw_split` does."""
    images, labels, masks = zip(*map(draw, indices), strict=True)
    return np.stack(images), np.array(labels, np.int64), np.stack(masks)

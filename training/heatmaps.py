"""Draw values of patches and classes of pixels as colours, and their legends as HTML."""

import html
from collections.abc import Sequence

import numpy as np
from PIL import Image

# Dark blue, purple, red, orange, pale yellow: lightness grows evenly, so that colour-blind people can read the order
SCALE = np.array([(12, 8, 60), (98, 20, 118), (190, 50, 84), (244, 128, 38), (252, 244, 170)], np.float64)
WITHOUT = (225, 225, 225)  # colour of patches without a number


def heat_map(values: np.ndarray, low: float, high: float) -> Image.Image:
    """Return values (h, w) from `low` to `high` as colours of SCALE, one pixel each; light grey if not finite."""
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(SCALE) - 1)
    known = np.isfinite(share)
    share = np.where(known, share, 0)
    colours = [np.interp(share, np.arange(len(SCALE)), channel) for channel in SCALE.T]
    pixels = np.where(known[..., None], np.stack(colours, axis=-1) + 0.5, WITHOUT)
    return Image.fromarray(pixels.astype(np.uint8))


def scale_legend(low: str, high: str, text: str) -> str:
    """Return HTML that shows SCALE between the words for its ends, and says what it means."""
    stops = ", ".join("rgb({:.0f}, {:.0f}, {:.0f})".format(*colour) for colour in SCALE)
    bar = f'<span style="flex: 1; height: 12px; background: linear-gradient(to right, {stops})"></span>'
    line = f'<div style="display: flex; gap: 6px; align-items: center"><b>{low}</b>{bar}<b>{high}</b></div>'
    return f"{line}<div>{html.escape(text)}</div>"


def overlay(image: np.ndarray, labels: np.ndarray, colours: np.ndarray, opacity: float) -> Image.Image:
    """Return an image (C, H, W), uint8, C 1 or 3, under the colours of its class numbers (h, w), uint8, of any size.

    `colours` (classes, 3) are uint8; `opacity` is 0 for the image alone, 1 for the colours alone.
    """
    size = image.shape[:0:-1]
    numbers = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    pixels = np.broadcast_to(image, (3, *image.shape[1:])).transpose(1, 2, 0)
    return Image.fromarray(((1 - opacity) * pixels + opacity * colours[numbers] + 0.5).astype(np.uint8))


def class_legend(labels: np.ndarray, classes: Sequence[str], colours: np.ndarray) -> str:
    """Return HTML with colour, name and share of the pixels of each class in `labels`, the largest first."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    entries = []
    for number in np.argsort(-counts, kind="stable"):
        if counts[number]:
            name, share = html.escape(classes[number]), 100 * counts[number] / labels.size
            entries.append(f'<span style="white-space: nowrap">{_swatch(colours[number])}{name} {share:.1f} %</span>')
    return f'<div style="display: flex; flex-wrap: wrap; gap: 4px 16px">{"".join(entries)}</div>'


def object_list(records: Sequence[dict], classes: Sequence[str], colours: np.ndarray) -> str:
    """Return HTML with colour, class, score and box of each object in COCO's records, whose classes count from 1."""
    rows = []
    for record in records:
        label, (x, y, width, height) = record["category_id"] - 1, record["bbox"]
        name, place = html.escape(classes[label]), f"{width:.0f} x {height:.0f} at {x:.0f}, {y:.0f}"
        rows.append(
            f"<tr><td>{_swatch(colours[label])}{name}</td><td>{100 * record['score']:.1f} %</td><td>{place}</td></tr>"
        )
    return f"<table><tr><th>class</th><th>score</th><th>box</th></tr>{''.join(rows)}</table>" if rows else "no object"


def _swatch(colour: np.ndarray) -> str:
    background = "rgb({}, {}, {})".format(*colour)
    style = f"display: inline-block; width: 14px; height: 14px; background: {background}; margin-right: 6px"
    return f'<span style="{style}"></span>'

"""Draw pictures of images, predictions, attention and losses."""

import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from training.metrics import IGNORED

MOST_CLASSES = 50  # of a readable confusion matrix
GAP, LINE, HEADER = 8, 20, 48  # pixels between tiles, per line of text, for title and captions
LEGEND = 264  # pixels per column of a legend
RECONSTRUCTION = ("original", "encoder sees", "prediction", "with visible patches")

Legend = Sequence[tuple[str, Image.Image]]  # names and swatches


def reconstruction_grid(
    path: Path,
    images: torch.Tensor,
    prediction: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    title: str,
    uses_true_patch_statistics: bool,
    channels: Sequence[int] | None = None,
) -> None:
    """Write a PNG with a row per image: original, encoder input, prediction, prediction with pasted visible patches.

    `images` and `prediction` are (B, C, H, W) in [0, 1], `mask` (B, 1, H, W) has 1 for removed pixels; without it, the
    row is original and prediction. C is 1 or 3, or any number with `channels`, the one or three to show, with the
    contrast of each original stretched.
    `uses_true_patch_statistics` says in the title that predictions use each patch's true mean and variance.
    """
    if channels is not None:
        numbers = f"channel{'s' * (len(channels) > 1)} {' '.join(map(str, channels))}"
        title += f" - {numbers}, contrast of each image stretched"
    if uses_true_patch_statistics:
        title += " - predictions use each patch's true mean and variance"
    rows = reconstruction_tiles(images, prediction, mask, channels)
    width, height = (side * max(1, round(144 / images.shape[-1])) for side in rows[0][0].size)
    rows = [[tile.resize((width, height), Image.Resampling.NEAREST) for tile in row] for row in rows]
    _write_grid(path, rows, title=title, captions=RECONSTRUCTION if mask is not None else RECONSTRUCTION[::2])


def reconstruction_tiles(
    images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor | None, channels: Sequence[int] | None = None
) -> list[list[Image.Image]]:
    """Return the pictures RECONSTRUCTION of each image, at its own size; arguments as in `reconstruction_grid`."""
    images, prediction = images.cpu(), prediction.cpu()
    if channels is not None:
        images, prediction = images[:, channels], prediction[:, channels]
        prediction = _stretch_contrast(prediction, like=images)
        images = _stretch_contrast(images, like=images)
    prediction = prediction.clamp(0, 1)
    tiles = [images, prediction]
    if mask is not None:
        removed = mask.cpu().bool()
        visible = torch.where(removed, torch.full_like(images, 0.5), images)
        tiles = [images, visible, prediction, torch.where(removed, prediction, images)]
    tiles = torch.stack(tiles, dim=1).float()  # (B, 2 or 4, C, H, W)
    return [[to_pil_image(tile) for tile in row] for row in (tiles * 255).round().to(torch.uint8)]


def displayable(image: torch.Tensor) -> torch.Tensor:
    """Return an image (C, H, W), uint8 or float32 in [0, 1], as uint8 with one channel or three.

    8-bit colour and grey stay as they are. Others show their first three channels, or the first, contrast-stretched.
    """
    if image.dtype == torch.uint8 and len(image) in (1, 3):
        return image
    image = image[: 3 if len(image) >= 3 else 1]
    return (_stretch_contrast(image, like=image) * 255).round().to(torch.uint8)


def confusion_matrix(
    path: Path, labels: Sequence[int], predictions: Sequence[int], classes: Sequence[str], *, title: str
) -> bool:
    """Write a PNG of the confusion matrix and return True; return False for more than MOST_CLASSES classes.

    `labels` and `predictions` are class numbers, one per image. Colour and number of a cell are its share of the row's
    images in percent; cells below 0.5 % have no number.
    """
    if len(classes) > MOST_CLASSES:
        return False
    counts = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(counts, (np.asarray(labels), np.asarray(predictions)), 1)
    images = counts.sum(axis=1)
    percent = 100 * counts / np.maximum(1, images)[:, None]
    names = [_short_name(name) for name in classes]
    rows = [f"{name} ({count})" for name, count in zip(names, images, strict=True)]
    side = 0.3 * len(classes) + 3  # inches
    figure, axes = _figure(path, (max(side, 6), side), "predicted class, in percent of the images", "class (images)")
    figure.suptitle(title, wrap=True)
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(classes)), names, rotation=90, parse_math=False)
    axes.set_yticks(range(len(classes)), rows, parse_math=False)
    for row, column in np.argwhere(percent >= 0.5):
        share = percent[row, column]
        options = dict(size=7.5, ha="center", va="center", in_layout=False)  # or the layout would be slow
        axes.text(column, row, f"{share:.0f}", color="white" if share > 50 else "black", **options)
    figure.savefig(path, format="png")
    return True


def segmentation_grid(
    path: Path,
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    colours: np.ndarray,
    *,
    title: str,
) -> None:
    """Write a PNG with a row per image: image, annotation, prediction; below them a legend, largest classes first.

    A row is an image (C, H, W), uint8, C 1 or 3, an annotation and a prediction (H, W), of any sizes. IGNORED pixels of
    the annotation are hatched; the prediction is shown everywhere. `colours` (classes, 3) are uint8.
    """
    counts = np.zeros(256, np.int64)
    tiles = []
    for image, *masks in rows:
        counts += sum(np.bincount(mask.ravel(), minlength=256) for mask in masks)
        height, width = image.shape[1:]
        tile_width = width * round(256 / width) if width <= 170 else 256  # whole multiples keep pixels square
        size = (tile_width, max(1, round(height * tile_width / width)))
        labels, prediction = (
            np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) for mask in masks
        )
        known = colours.take(labels, axis=0, mode="clip")  # IGNORED is beyond the colours
        annotation = np.where((labels == IGNORED)[..., None], _hatching(size), known)
        resampling = Image.Resampling.BOX if tile_width < width else Image.Resampling.NEAREST
        picture = to_pil_image(torch.as_tensor(image)).resize(size, resampling)
        tiles.append([picture, Image.fromarray(annotation), Image.fromarray(colours[prediction])])
    legend = _legend(counts, classes, colours)
    _write_grid(path, tiles, title=title, captions=("image", "annotation", "prediction"), legend=legend)


def label_picture(path: Path, labels: np.ndarray, colours: np.ndarray) -> None:
    """Write labels (H, W), uint8, as a PNG with a palette: 0 is black, 1 .. N have the `colours` (N, 3), uint8."""
    picture = Image.fromarray(labels)
    picture.putpalette([0, 0, 0, *colours.ravel().tolist()])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def segmentation_overlay(
    path: Path, image: np.ndarray, labels: np.ndarray, classes: Sequence[str], colours: np.ndarray
) -> None:
    """Write a PNG of an image in light grey under the colours of its classes, with white borders and a legend.

    All arrays are uint8: the image (C, H, W) with C 1 or 3, class numbers (h, w) of any size, and colours (classes, 3).
    """
    height, width = image.shape[1:]
    scale = max(1, 512 // max(height, width))
    size = (width * scale, height * scale)
    numbers = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    grey = to_pil_image(torch.as_tensor(image)).convert("L")
    grey = np.asarray(grey.resize(size, Image.Resampling.NEAREST))[..., None]
    pixels = 0.3 * grey + 45 + 0.525 * colours[numbers]  # from 45 to 255
    for axis in (0, 1):
        changes = np.diff(numbers, axis=axis, append=numbers.take([-1], axis)) != 0
        pixels[changes] = 255
    picture = Image.fromarray((pixels + 0.5).astype(np.uint8))
    counts = sum(np.bincount(row, minlength=256) for row in labels)  # bincount of all rows would copy them as int64
    legend = _legend(counts, classes, (0.3 * 128 + 45 + 0.525 * colours + 0.5).astype(np.uint8))
    _write_grid(path, [[picture]], legend=legend)


def detection_grid(
    path: Path, rows: Sequence[tuple], classes: Sequence[str], colours: np.ndarray, *, title: str
) -> None:
    """Write a PNG with a row per image: annotations and detections; below them a legend.

    A row is an image (C, h, w), uint8, C 1 or 3, and two lists of `data.detection.Drawing`. `colours` (classes, 3) are
    uint8.
    """
    counts = np.bincount([drawing.label for _, *lists in rows for part in lists for drawing in part], minlength=256)
    tiles = []
    for image, *lists in rows:
        scale = max(1, round(320 / max(image.shape[1:])))
        tiles.append([_draw_objects(image, part, classes, colours, scale=scale) for part in lists])
    _write_grid(path, tiles, title=title, captions=("annotation", "detected"), legend=_legend(counts, classes, colours))


def detection_overlay(
    path: Path, image: np.ndarray, objects: Sequence, classes: Sequence[str], colours: np.ndarray
) -> None:
    """Write a PNG of an image (C, h, w), uint8, C 1 or 3, with its objects, see `detection_grid`, and a legend."""
    counts = np.bincount([drawing.label for drawing in objects], minlength=256)
    picture = detection_picture(image, objects, classes, colours)
    _write_grid(path, [[picture]], legend=_legend(counts, classes, colours))


def detection_picture(image: np.ndarray, objects: Sequence, classes: Sequence[str], colours: np.ndarray) -> Image.Image:
    """Return the picture of `detection_overlay`, without its legend."""
    return _draw_objects(image, objects, classes, colours, scale=max(1, 512 // max(image.shape[1:])))


def _draw_objects(
    image: np.ndarray, objects: Sequence, classes: Sequence[str], colours: np.ndarray, *, scale: int
) -> Image.Image:
    """Return an image, enlarged by `scale`, with boxes, names, scores and masks; the best objects are on top."""
    pixels = np.asarray(to_pil_image(torch.as_tensor(image)).convert("RGB")).repeat(scale, 0).repeat(scale, 1).copy()
    objects = sorted(objects, key=lambda drawing: drawing.score or 0)
    for drawing in objects:
        if drawing.mask is not None:
            inside = drawing.mask.repeat(scale, 0).repeat(scale, 1)
            pixels[inside] = (0.5 * pixels[inside] + 0.5 * colours[drawing.label]).astype(np.uint8)
    picture, font = Image.fromarray(pixels), ImageFont.load_default(size=11)
    draw = ImageDraw.Draw(picture)
    for drawing in objects:
        colour, box = tuple(colours[drawing.label].tolist()), [scale * value for value in drawing.box]
        draw.rectangle([box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)], outline=colour, width=2)
        if drawing.score is not None:
            text = f"{_short_name(classes[drawing.label])} {100 * drawing.score:.0f}"
            place = (box[0] + 2, max(0, box[1] - 13))
            draw.rectangle(draw.textbbox(place, text, font), fill=colour)
            draw.text(place, text, "black" if sum(colour) > 380 else "white", font)
    return picture


def attention_grid(path: Path, image: np.ndarray, maps: np.ndarray) -> None:
    """Write a PNG of an image and, over it, the attention of each query or head: bright where it is high.

    `image` is (C, H, W), uint8, C 1 or 3; `maps` are (Q, h, w), each drawn from its minimum to its maximum.
    """
    tiles = attention_tiles(image, maps)
    _write_grid(path, [tiles[start : start + 9] for start in range(0, len(tiles), 9)])


def attention_tiles(image: np.ndarray, maps: np.ndarray) -> list[Image.Image]:
    """Return the pictures of `attention_grid`: the image, and the attention of each query over it."""
    picture = _enlarged(image)
    tiles, size, dark = [picture], picture.size, Image.new("RGB", picture.size, "#101040")
    for attention in maps:
        share = (attention - attention.min()) / max(np.ptp(attention), 1e-12)
        light = Image.fromarray(np.uint8(20 + 230 * share)).resize(size, Image.Resampling.BICUBIC)
        tiles.append(Image.composite(picture, dark, light))
    return tiles


def colour_picture(path: Path, image: np.ndarray, colours: np.ndarray) -> None:
    """Write a PNG of an image (C, H, W), uint8, C 1 or 3, beside the colours (h, w, 3) in [0, 1] of its patches."""
    picture = _enlarged(image)
    patches = Image.fromarray(np.uint8(255 * colours + 0.5)).resize(picture.size, Image.Resampling.NEAREST)
    _write_grid(path, [[picture, patches]])


def loss_curve(path: Path, log: Sequence[dict]) -> None:
    """Write a PNG of the training loss in the lines of log.jsonl, and of the validation loss if there is one."""
    figure, axes = _figure(path, (8, 4), "optimizer step", "loss")
    for name, label, style in (
        ("loss", "training", dict(color="#08306b", marker=".", markersize=2)),
        ("val_loss", "validation", dict(color="#d94801", marker="o", markersize=4)),
    ):
        points = [(line["step"], line[name]) for line in log if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), linewidth=1, label=label, **style)
    if axes.lines:
        axes.legend(frameon=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def _figure(path: Path, size: tuple[float, float], xlabel: str, ylabel: str):
    """Return a figure of `size` (W, H) in inches and its axes, and create the folder of its file."""
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display

    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    return figure, figure.add_subplot(xlabel=xlabel, ylabel=ylabel)


def _enlarged(image: np.ndarray) -> Image.Image:
    """Return an image (C, H, W), uint8, C 1 or 3, in colour; up to 64 pixels wide, it is enlarged to at most 128."""
    scale = max(1, 128 // image.shape[2])
    size = (image.shape[2] * scale, image.shape[1] * scale)
    return to_pil_image(torch.as_tensor(image)).convert("RGB").resize(size, Image.Resampling.NEAREST)


def _stretch_contrast(image: torch.Tensor, *, like: torch.Tensor) -> torch.Tensor:
    """Scale channels (..., H, W) so that the 2nd and 98th percentiles of those of `like` become 0 and 1, and clip."""
    values = like.float().flatten(-2)
    ranks = (1 + round(share * (values.shape[-1] - 1)) for share in (0.02, 0.98))
    low, high = (values.kthvalue(rank).values[..., None, None] for rank in ranks)
    return ((image - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)


def _write_grid(path: Path, rows: list, *, title: str = "", captions: Sequence[str] = (), legend: Legend = ()) -> None:
    """Write a PNG of rows of equally high tiles, with a title, a caption above each column, and a legend below."""
    font = ImageFont.load_default(size=13)
    column = max(tile.width for row in rows for tile in row) + GAP
    width = max(GAP + len(rows[0]) * column, int(font.getlength(title)) + 2 * GAP, (GAP + LEGEND) * bool(legend))
    legend_columns = max(1, (width - GAP) // LEGEND)
    top = HEADER if captions else GAP
    bottom = top + sum(row[0].height + GAP for row in rows)
    height = bottom + math.ceil(len(legend) / legend_columns) * LINE + GAP * bool(legend)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((GAP, 6), title, "black", font)
    for i, caption in enumerate(captions):
        draw.text((GAP + i * column, 27), caption, "#444444", font)
    for row in rows:
        for i, tile in enumerate(row):
            canvas.paste(tile, (GAP + i * column, top))
        top += row[0].height + GAP
    for i, (name, swatch) in enumerate(legend):
        x, y = GAP + i % legend_columns * LEGEND, bottom + i // legend_columns * LINE
        canvas.paste(swatch, (x, y))
        draw.rectangle((x, y, x + 14, y + 14), outline="#888888")
        draw.text((x + 20, y + 7), _short_name(name), "black", font, "lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, compress_level=2)  # four times as fast as 6, and files a tenth larger


def _legend(counts: np.ndarray, classes: Sequence[str], colours: np.ndarray) -> Legend:
    """Return names and swatches of the classes, by their `counts` (256,) of pixels or objects, the largest first."""
    numbers = [number for number in np.argsort(-counts, kind="stable") if counts[number] and number != IGNORED]
    names = [(classes[number], Image.new("RGB", (14, 14), tuple(colours[number].tolist()))) for number in numbers]
    void = [("void: not labelled", Image.fromarray(_hatching((14, 14))))] if counts[IGNORED] else []
    return names + void


def _hatching(size: tuple[int, int]) -> np.ndarray:
    """Return slanted grey stripes (H, W, 3) of `size` (W, H), which no class colour resembles."""
    stripes = np.where(np.indices(size[::-1]).sum(axis=0) // 4 % 2, 110, 190).astype(np.uint8)
    return np.repeat(stripes[..., None], 3, axis=2)


def _short_name(text: str) -> str:
    """Return a name in one line of at most 24 letters that all fonts have."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or "?" * len(text)
    text = " ".join(text.split())
    return text if len(text) <= 24 else text[:21] + "..."

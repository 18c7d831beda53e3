"""Pictures that show what a model does."""

import unicodedata
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MOST_CLASSES = 50  # of a confusion matrix that can still be read
MOST_NAMES = 30  # of a legend
VOID = 255  # in an annotation: not labelled


def reconstruction_grid(
    path: Path,
    images: torch.Tensor,
    prediction: torch.Tensor,
    mask: torch.Tensor,
    *,
    title: str,
    uses_true_patch_statistics: bool,
    channels: Sequence[int] | None = None,
) -> None:
    """Writes a PNG with one row an image: original, what the encoder sees, prediction, prediction with pasted visible
    patches. Images and predictions are (B, C, H, W) in [0, 1] with C 1 or 3, the mask (B, 1, H, W), 1 = removed.

    With `channels`, the numbers of one channel or three, C may be any: those are shown, and in each image and channel
    the middle 96 % of the original's values are spread over black to white.
    """
    if channels is not None:
        images, prediction = images[:, channels], prediction[:, channels]
        low, high = (torch.stack([_quantile(image, share) for image in images.float()]) for share in (0.02, 0.98))
        title += (
            f" - channel{'s' * (len(channels) > 1)} {' '.join(map(str, channels))}, contrast of each image stretched"
        )
        images, prediction = (((x - low) / (high - low).clamp(min=1e-6)).clamp(0, 1) for x in (images, prediction))
    prediction = prediction.clamp(0, 1)
    seen = torch.where(mask.bool(), torch.full_like(images, 0.5), images)
    pasted = torch.where(mask.bool(), prediction, images)
    captions = ["original", "encoder sees", "prediction", "with visible patches"]
    if uses_true_patch_statistics:
        title += " - predictions use each patch's true mean and variance"
    picture_grid(path, [images, seen, prediction, pasted], captions, title=title)


def displayable(image: torch.Tensor) -> torch.Tensor:
    """An image (C, H, W), uint8 or float32 in [0, 1], as uint8 with one channel or three: the first of them, with the
    middle 96 % of each channel's values spread over black to white, unless it is fit to be shown as it is."""
    if image.dtype == torch.uint8 and len(image) in (1, 3):
        return image
    shown = image[: 3 if len(image) >= 3 else 1].float()
    low, high = (_quantile(shown, share) for share in (0.02, 0.98))
    return ((shown - low) / (high - low).clamp(min=1e-6) * 255).round().clamp(0, 255).to(torch.uint8)


def _quantile(image: torch.Tensor, share: float) -> torch.Tensor:
    """Of each channel (C, 1, 1): the value below which are so many of its pixels."""
    values = image.flatten(1)
    return values.kthvalue(1 + round(share * (values.shape[1] - 1)), dim=1).values[:, None, None]


def picture_grid(path: Path, columns: list[torch.Tensor], captions: list[str], *, title: str) -> None:
    """Writes a PNG whose columns are batches (B, C, H, W) in [0, 1], under captions; small images are enlarged."""
    height, width = columns[0].shape[-2:]
    scale = max(1, round(144 / width))
    height, width, gap = height * scale, width * scale, 8
    font = ImageFont.load_default(size=13)
    title_width = int(font.getlength(title)) + 2 * gap
    header = 48
    canvas = Image.new(
        "RGB",
        (max(title_width, len(columns) * (width + gap) + gap), header + len(columns[0]) * (height + gap)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 6), title, fill="black", font=font)
    for column, (batch, caption) in enumerate(zip(columns, captions, strict=True)):
        left = gap + column * (width + gap)
        draw.text((left, 27), caption, fill="#444444", font=font)
        pixels = (batch.float().cpu() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for row, image in enumerate(np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels):
            tile = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (left, header + row * (height + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def confusion_matrix(path: Path, counts: np.ndarray, classes: Sequence[str], *, title: str) -> None:
    """Writes a PNG of the counts (N, N) of images, rows their class, columns the class predicted.

    The colour and number of a cell are its share of the row's images, in percent; a cell below half a percent has no
    number. Raises ValueError for more than MOST_CLASSES classes.
    """
    counts = np.asarray(counts)
    if not len(counts) == len(classes) <= MOST_CLASSES:
        raise ValueError(f"{len(classes)} classes and counts {counts.shape}; expected one each, {MOST_CLASSES} at most")
    images = counts.sum(axis=1)
    percent = 100 * counts / np.maximum(1, images)[:, None]
    cell = 40 if len(classes) <= 12 else 30 if len(classes) <= 25 else 24
    font, small = (ImageFont.load_default(size=size) for size in (13, min(13, cell // 2 - 1)))
    names = [_shortened(_in_ascii(name), font, width=180) for name in classes]
    rows = [f"{name} ({count})" for name, count in zip(names, images, strict=True)]
    gap, line = 8, 20  # pixels
    left = 2 * gap + line + max(int(font.getlength(text)) for text in rows)
    top = 4 * gap + 3 * line + max(int(font.getlength(text)) for text in names)
    caption = "a cell: percent of the row's images, white 0, dark 100"
    width = max(left + len(classes) * cell, *(gap + int(font.getlength(text)) for text in (title, caption))) + gap
    canvas = Image.new("RGB", (width, top + len(classes) * cell + gap), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, gap), title, fill="black", font=font)
    draw.text((gap, gap + line), caption, fill="#444444", font=font)
    centre = (left + len(classes) * cell / 2, 2 * gap + 2.5 * line)
    draw.text(centre, "predicted class", fill="#444444", font=font, anchor="mm")
    middle = top + len(classes) * cell // 2
    _draw_upwards(canvas, (gap + line // 2, middle), "class (images)", "#444444", font, anchor="mm")
    for i, name in enumerate(names):
        _draw_upwards(canvas, (left + i * cell + cell // 2, top - gap // 2), name, "black", font, anchor="lm")
        draw.text((left - gap // 2, top + i * cell + cell // 2), rows[i], fill="black", font=font, anchor="rm")
        for j, share in enumerate(percent[i]):
            x, y = left + j * cell, top + i * cell
            colour = tuple(round(255 + (dark - 255) * share / 100) for dark in (8, 48, 107))
            draw.rectangle((x, y, x + cell, y + cell), fill=colour, outline="#dddddd")
            if share >= 0.5:
                ink, number = "white" if share > 50 else "black", str(int(share + 0.5))
                draw.text((x + cell / 2, y + cell / 2), number, fill=ink, font=small, anchor="mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def segmentation_grid(
    path: Path,
    rows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
    *,
    title: str,
) -> None:
    """Writes a PNG with one row an image: image, annotation, prediction, and below them the names of the colours, those
    of the most pixels first.

    `rows`: (image (C, H, W) uint8 with C 1 or 3, annotation (H, W), prediction (H, W)), arrays or tensors on a CPU, of
    any sizes; masks hold class numbers. What is VOID in the annotation is hatched there; the prediction is shown
    everywhere.
    """
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    counts = np.zeros(256, np.int64)
    tiles = []  # the three pictures of each row, all of one size
    for image, *masks in rows:
        image, annotation, prediction = (np.asarray(array) for array in (image, *masks))
        counts += sum(np.bincount(mask.ravel(), minlength=256) for mask in (annotation, prediction))
        image = np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3))
        width = _tile_width(image.shape[1])
        size = (width, max(1, round(image.shape[0] * width / image.shape[1])))
        smooth = Image.Resampling.BOX if width < image.shape[1] else Image.Resampling.NEAREST
        numbers = [
            np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST))
            for mask in (annotation, prediction)
        ]
        hatched = np.where((numbers[0] == VOID)[..., None], _hatching(size), palette[numbers[0]])
        row = [Image.fromarray(image).resize(size, smooth), hatched, palette[numbers[1]]]
        tiles.append([Image.fromarray(np.asarray(tile)) for tile in row])

    font, gap, line, header = ImageFont.load_default(size=13), 8, 20, 48  # pixels
    column = max(tile.width for row in tiles for tile in row) + gap
    legend = _legend(counts, classes, palette)
    top = header + sum(row[0].height + gap for row in tiles)
    height = top + -(-len(legend) // 3) * line + gap
    canvas = Image.new("RGB", (max(gap + 3 * column, int(font.getlength(title)) + 2 * gap), height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((gap, 6), title, fill="black", font=font)
    for i, caption in enumerate(("image", "annotation", "prediction")):
        draw.text((gap + i * column, 27), caption, fill="#444444", font=font)
    _draw_legend(canvas, legend, top=top, columns=3, column=column)
    y = header
    for row in tiles:
        for i, tile in enumerate(row):
            canvas.paste(tile, (gap + i * column, y))
        y += row[0].height + gap
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def label_picture(path: Path, labels: np.ndarray, colours: Sequence[tuple[int, int, int]]) -> None:
    """Writes a PNG of labels (H, W), uint8: its pixels are their numbers, and its palette shows 0 in black and 1 .. N
    in `colours`."""
    picture = Image.fromarray(np.asarray(labels, dtype=np.uint8))
    picture.putpalette([0, 0, 0, *np.asarray(colours, dtype=np.uint8).ravel().tolist()])
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def segmentation_overlay(
    path: Path,
    image: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Sequence[tuple[int, int, int]],
) -> None:
    """Writes a PNG of an image in light grey under the colours of its classes, which white lines part, and below it
    their names, those of the most pixels first.

    The image is uint8 (C, H, W) with C 1 or 3; the class numbers (h, w), uint8, are of any size. Small images are
    enlarged by whole numbers, so that their pixels stay alike.
    """
    palette = np.zeros((256, 3), np.float32)
    palette[: len(colours)] = colours
    height, width = image.shape[1:]
    scale = max(1, 512 // max(height, width))
    size = (width * scale, height * scale)
    numbers = np.asarray(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
    grey = Image.fromarray(np.ascontiguousarray(np.broadcast_to(image.transpose(1, 2, 0), (height, width, 3))))
    grey = np.asarray(grey.convert("L").resize(size, Image.Resampling.NEAREST))[..., None]
    pixels = 0.3 * grey + 45 + 0.525 * palette[numbers]  # from 45 to 255
    for axis in (0, 1):
        changes = np.diff(numbers, axis=axis, append=numbers.take([-1], axis)) != 0
        pixels[changes] = 255
    picture = Image.fromarray((pixels + 0.5).astype(np.uint8))

    gap, line = 8, 20  # pixels
    counts = sum(np.bincount(row, minlength=256) for row in labels)  # of all at once, in 64 bits, is large
    legend = _legend(counts, classes, (0.3 * 128 + 45 + 0.525 * palette + 0.5).astype(np.uint8))
    columns = min(len(legend), max(1, picture.width // 160))
    column = max(picture.width // columns, 160)
    top = gap + picture.height + gap
    shape = gap + max(picture.width, column) + gap, top - (-len(legend) // columns) * line + gap
    canvas = Image.new("RGB", shape, "white")
    canvas.paste(picture, (gap, gap))
    _draw_legend(canvas, legend, top=top, columns=columns, column=column)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path, compress_level=2)  # four times as fast as 6, and files a tenth larger


def _legend(counts: np.ndarray, classes: Sequence[str], palette: np.ndarray) -> list[tuple[str, Image.Image | None]]:
    """Names and swatches of the class numbers of which there are `counts` (256,) pixels, the most frequent first."""
    occurring = [number for number in np.argsort(-counts, kind="stable") if counts[number] and number != VOID]
    names = [(classes[number], Image.new("RGB", (14, 14), tuple(palette[number].tolist()))) for number in occurring]
    more = [(f"and {len(names) - MOST_NAMES} more", None)] if len(names) > MOST_NAMES else []
    void = [("void: not labelled", Image.fromarray(_hatching((14, 14))))] if counts[VOID] else []
    return names[:MOST_NAMES] + more + void


def _draw_legend(
    canvas: Image.Image, legend: list[tuple[str, Image.Image | None]], *, top: int, columns: int, column: int
) -> None:
    """Draws names beside their swatches, in lines of so many columns, `column` pixels wide."""
    draw, font, gap, line = ImageDraw.Draw(canvas), ImageFont.load_default(size=13), 8, 20
    for i, (name, swatch) in enumerate(legend):
        x, y = gap + i % columns * column, top + i // columns * line
        if swatch:
            canvas.paste(swatch, (x, y))
            draw.rectangle((x, y, x + 14, y + 14), outline="#888888")
        draw.text((x + 20, y + 7), _shortened(_in_ascii(name), font, width=column - 20 - gap), "black", font, "lm")


def _tile_width(width: int) -> int:
    """About 256 pixels: small images are enlarged by whole numbers, so that their pixels stay alike."""
    return width * round(256 / width) if width <= 170 else 256


def _hatching(size: tuple[int, int]) -> np.ndarray:
    """Slanted grey stripes (H, W, 3) of `size` (W, H), a colour that no class has."""
    x, y = np.meshgrid(*(np.arange(length) for length in size))
    stripes = np.where((x + y) // 4 % 2, 110, 190).astype(np.uint8)
    return np.repeat(stripes[..., None], 3, axis=2)


def loss_curve(
    path: Path, losses: Sequence[tuple[int, float]], *, validation: Sequence[tuple[int, float]] = ()
) -> None:
    """Writes a PNG of the training loss, and of the loss on held-out images where there is one, over the optimizer
    steps. Both are (step, loss), in the order of the steps."""
    from matplotlib.figure import Figure  # which takes a moment; not pyplot, which would look for a screen

    figure = Figure(figsize=(8, 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    few = "o" if len(losses) < 20 else ""
    axes.plot(*zip(*losses, strict=True), color="#08306b", linewidth=1, marker=few, markersize=4)
    if validation:
        line = dict(color="#d94801", linewidth=1, marker="o", markersize=4, label="validation")
        axes.plot(*zip(*validation, strict=True), **line)
        axes.lines[0].set_label("training")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _in_ascii(text: str) -> str:
    """Letters without their accents, and ? for what the font of Pillow does not have."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode() or "?" * len(text)


def _shortened(text: str, font: ImageFont.FreeTypeFont, *, width: int) -> str:
    """`text` on one line, its end left out where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    kept = bisect(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "...")) - 1
    return text[:kept] + "..."


def _draw_upwards(canvas: Image.Image, place: tuple[int, int], text: str, colour: str, font, *, anchor: str) -> None:
    """Draws text that reads from below; `anchor` is Pillow's, of the text before it is turned."""
    length = int(font.getlength(text)) + 1
    tile = Image.new("RGB", (length, 20), "white")
    ImageDraw.Draw(tile).text((0, 10), text, fill=colour, font=font, anchor="lm")
    x, y = place
    canvas.paste(tile.rotate(90, expand=True), (x - 10, y - (length if anchor == "lm" else length // 2)))

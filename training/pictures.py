"""Pictures that show what a model does."""

import unicodedata
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

MOST_CLASSES = 50  # of a confusion matrix that can still be read


def reconstruction_grid(
    path: Path,
    images: torch.Tensor,
    prediction: torch.Tensor,
    mask: torch.Tensor,
    *,
    title: str,
    uses_true_patch_statistics: bool,
) -> None:
    """Writes a PNG with one row an image: original, what the encoder sees, prediction, prediction with pasted visible
    patches. Images and predictions are (B, C, H, W) in [0, 1] with C 1 or 3, the mask (B, 1, H, W), 1 = removed.
    """
    prediction = prediction.clamp(0, 1)
    seen = torch.where(mask.bool(), torch.full_like(images, 0.5), images)
    pasted = torch.where(mask.bool(), prediction, images)
    captions = ["original", "encoder sees", "prediction", "with visible patches"]
    if uses_true_patch_statistics:
        title += " - predictions use each patch's true mean and variance"
    picture_grid(path, [images, seen, prediction, pasted], captions, title=title)


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

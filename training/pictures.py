"""Pictures that show what a model does."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont


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

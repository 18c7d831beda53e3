"""Metrics of reconstructions and segmentations, on the device.

Images are (B, C, H, W) in [0, 1], masks of patches (B, 1, H, W) with 1 = masked.
"""

import torch

IGNORED = 255  # the label of void pixels in an annotation, which no metric counts


def psnr(error: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (B,).

    Args:
        error: squared errors of a signal in [0, 1], (B, C, H, W).
        weight: weights of the pixels in the mean, (B, 1, H, W); None for equal ones.
    """
    if weight is None:
        mean = error.mean(dim=(1, 2, 3))
    else:
        mean = (error * weight).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * error.shape[1])
    return -10 * torch.log10(mean.clamp(min=1e-10))


def reconstruction_metrics(
    images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor, valid: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Return PSNR (dB) and SSIM (Wang et al. 2004) of each image, (B,), by the names of metrics.json.

    All are means over the `valid` pixels (B, 1, H, W), of which each image must have removed and visible ones.

    `masked_*` is taken over the removed pixels alone, `prediction_*` over the whole prediction, `pasted_*` with the
    visible pixels pasted over it. `masked_psnr_visible_mean` is the baseline that fills the removed pixels with the
    mean colour of the image's visible pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    prediction, removed, visible = prediction.clamp(0, 1), mask, 1 - mask
    if valid is not None:
        prediction = torch.where(valid, prediction, images)  # in the windows of SSIM, both have the same invalid pixels
        removed, visible = removed * valid, visible * valid
    pasted = torch.where(mask.bool(), prediction, images)
    mean_colour = visible_mean(images, visible)
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 changes SSIM by up to 0.005
        prediction_ssim, prediction_map = ssim(prediction, images, **options)
        pasted_ssim, pasted_map = ssim(pasted, images, **options)
    if valid is not None:
        prediction_ssim, pasted_ssim = weighted_mean(prediction_map, valid), weighted_mean(pasted_map, valid)
    error = (prediction - images).square()
    return {
        "masked_psnr": psnr(error, removed),
        "masked_ssim": weighted_mean(prediction_map, removed),
        "masked_psnr_visible_mean": psnr((mean_colour - images).square(), removed),
        "prediction_psnr": psnr(error, valid),
        "prediction_ssim": prediction_ssim,
        "pasted_psnr": psnr((pasted - images).square(), valid),
        "pasted_ssim": pasted_ssim,
    }


def visible_mean(images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Return the mean colour (B, C, 1, 1) of the pixels of images that are 1 in `visible` (B, 1, H, W)."""
    return (images * visible).sum(dim=(2, 3), keepdim=True) / visible.sum(dim=(2, 3), keepdim=True)


def sum_reconstruction_metrics(
    images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor, valid: torch.Tensor | None = None
) -> dict[str, float]:
    """Return the sums of `reconstruction_metrics` over images, and their `count`: those with a valid removed pixel."""
    if valid is not None:
        scored = (mask * valid).flatten(1).any(dim=1)
        if not scored.any():
            return {"count": 0}
        images, prediction, mask, valid = (part[scored] for part in (images, prediction, mask, valid))
    metrics = reconstruction_metrics(images, prediction, mask, valid)
    return {name: value.cpu().double().sum().item() for name, value in metrics.items()} | {"count": len(images)}


def weighted_mean(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the weighted means (B,) of values (B, C, H, W) with weights (B, 1, H, W)."""
    return (values.mean(dim=1, keepdim=True) * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def segmentation_areas(prediction: torch.Tensor, annotation: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Return the pixels of each class in the intersection, the prediction and the annotation: (3, num_classes), int64.

    `prediction` and `annotation` are class numbers of the same shape; ones beyond the classes raise ValueError.
    """
    agreed = torch.where(prediction == annotation, annotation, IGNORED)  # selecting the pixels by a mask is far slower
    predicted = torch.where(annotation == IGNORED, IGNORED, prediction)
    areas = [torch.bincount(numbers.flatten(), minlength=IGNORED + 1) for numbers in (agreed, predicted, annotation)]
    void = areas[2][IGNORED].clone()
    for area, name in zip(areas[1:], ("a prediction", "an annotation"), strict=True):
        area[IGNORED] -= void
        if area[num_classes:].any():
            largest = int(area.nonzero().max())
            raise ValueError(f"class number {largest} in {name}; expected 0 to {num_classes - 1}")
    return torch.stack([area[:num_classes] for area in areas])

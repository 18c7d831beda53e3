"""How good reconstructions are. Images are (B, C, H, W) in [0, 1], masks (B, 1, H, W) with 1 = removed."""

import torch


def psnr(error: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, one an image: (B, C, H, W) squared errors of a signal in [0, 1] -> (B,).

    `weight` (B, 1, H, W) limits the mean to some pixels.
    """
    if weight is None:
        mean = error.mean(dim=(1, 2, 3))
    else:
        mean = (error * weight).sum(dim=(1, 2, 3)) / (weight.sum(dim=(1, 2, 3)) * error.shape[1])
    return -10 * torch.log10(mean.clamp(min=1e-10))


def reconstruction_metrics(
    images: torch.Tensor, prediction: torch.Tensor, mask: torch.Tensor
) -> dict[str, torch.Tensor]:
    """PSNR (dB) and SSIM (Wang et al. 2004) of each image (B,), of what was predicted in three ways.

    `masked_*` looks at the removed pixels alone, `prediction_*` at the whole prediction, `pasted_*` at the visible
    pixels pasted over it. `masked_psnr_visible_mean` is what filling the removed pixels with the mean colour of the
    image's visible pixels reaches.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    prediction = prediction.clamp(0, 1)
    pasted = torch.where(mask.bool(), prediction, images)
    visible = 1 - mask
    mean_colour = (images * visible).sum(dim=(2, 3), keepdim=True) / visible.sum(dim=(2, 3), keepdim=True)
    options = {"data_range": 1.0, "reduction": "none", "return_full_image": True}
    prediction_ssim, ssim_map = ssim(prediction, images, **options)
    pasted_ssim, _ = ssim(pasted, images, **options)
    error = (prediction - images).square()
    return {
        "masked_psnr": psnr(error, mask),
        "masked_ssim": (ssim_map.mean(dim=1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3)),
        "masked_psnr_visible_mean": psnr((mean_colour - images).square(), mask),
        "prediction_psnr": psnr(error),
        "prediction_ssim": prediction_ssim,
        "pasted_psnr": psnr((pasted - images).square()),
        "pasted_ssim": pasted_ssim,
    }

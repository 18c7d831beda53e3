"""How good reconstructions, features and segmentations are.

Of reconstructions, images are (B, C, H, W) in [0, 1], masks (B, 1, H, W) with 1 = removed.
"""

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


def nearest(
    bank: torch.Tensor, bank_labels: torch.Tensor, queries: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine similarities and the labels of the k members of `bank` (N, D) that are nearest to each of `queries`
    (M, D): both (M, min(k, N)), the nearest first."""
    bank, queries = torch.nn.functional.normalize(bank), torch.nn.functional.normalize(queries)
    portion = max(1, 2**26 // max(1, len(bank)))  # of queries, so that their similarities take 256 MB at most
    found = [(part @ bank.T).topk(min(k, len(bank))) for part in queries.split(portion)]
    return torch.cat([part.values for part in found]), bank_labels[torch.cat([part.indices for part in found])]


def knn_vote(
    similarity: torch.Tensor, labels: torch.Tensor, num_classes: int, *, temperature: float = 0.07
) -> torch.Tensor:
    """The class of each query (M,) from its neighbours (M, k), each of which votes with exp(similarity / temperature)
    (Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", section 3.4)."""
    votes = torch.zeros(len(similarity), num_classes, device=similarity.device)
    return votes.scatter_add_(1, labels, (similarity / temperature).exp()).argmax(dim=1)


def linear_sums(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """What `linear_vote` needs to know of features (N, D) and labels (N,): (D + 1, D + 1 + num_classes), float64. Those
    of several parts of the data are added."""
    dim = features.shape[1]
    sums = torch.zeros(dim + 1, dim + 1 + num_classes, dtype=torch.float64, device=features.device)
    for part, own_labels in zip(features.split(8192), labels.split(8192), strict=True):  # in float64 it is large
        x = torch.cat([part, torch.ones_like(part[:, :1])], dim=1).double()
        sums[:, : dim + 1] += x.T @ x
        sums[:, dim + 1 :].T.index_add_(0, own_labels, x)
    return sums


def linear_vote(sums: torch.Tensor, queries: torch.Tensor, *, ridge: float = 1e-3) -> torch.Tensor:
    """The class of each of `queries` (M, D) by the linear classifier of least squares, in closed form: no learning
    rate, no epochs. `ridge` is the penalty on weights of features that are scaled to variance 1."""
    dim = len(sums) - 1
    count, total, moments = sums[dim, dim], sums[dim], sums[:dim]
    mean, class_mean = total[:dim] / count, total[dim + 1 :] / count
    covariance = moments[:, :dim] / count - mean.outer(mean)
    with_classes = moments[:, dim + 1 :] / count - mean.outer(class_mean)
    penalty = ridge * covariance.diagonal().clamp(min=1e-12)
    weight = torch.linalg.solve(covariance + penalty.diag(), with_classes)  # (D, num_classes)
    return ((queries.double() - mean) @ weight + class_mean).argmax(dim=1)


def segmentation_areas(
    prediction: torch.Tensor, annotation: torch.Tensor, num_classes: int, *, ignore: int = 255
) -> torch.Tensor:
    """Pixels of each class (3, num_classes), int64: where prediction and annotation agree, in the prediction, in the
    annotation. Both hold class numbers and have one shape; pixels whose annotation is `ignore`, a number that no class
    has, count nowhere.

    Raises ValueError for a number beyond the classes at any other pixel, RuntimeError for different shapes.
    """
    agreed = torch.where(prediction == annotation, annotation, ignore)  # to pick the pixels themselves is far slower
    predicted = torch.where(annotation == ignore, ignore, prediction)
    areas = [torch.bincount(numbers.flatten(), minlength=ignore + 1) for numbers in (agreed, predicted, annotation)]
    void = areas[2][ignore].clone()
    for found, name in zip(areas[1:], ("a prediction", "an annotation"), strict=True):
        found[ignore] -= void
        if found[num_classes:].any():
            largest = int(found.nonzero().max())
            raise ValueError(f"class number {largest} in {name}; expected 0 to {num_classes - 1}")
    return torch.stack([found[:num_classes] for found in areas])

"""Look inside a trained encoder, and reconstruct images from several masks or from a given mask.

Models must be in evaluation mode and are not changed. Images (B, C, H, W) are normalized.

Legend: B images, L patches, K visible patches, D width, S masks.
"""

import copy
import math

import torch
import torch.nn.functional as F

from modeling.mae import MaskedAutoencoder
from modeling.vit import VisionTransformer, patchify, run_blocks

TAILS = 0.02  # share of the patches that is clipped at either end of a colour channel


@torch.no_grad()
def patch_features(encoder: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Return the patch tokens (B, L, D), float32, after the final norm of the encoder.

    Encoders of segmenters, detectors and classifiers with mean pooling have no final norm.
    """
    return encoder.split(encoder(images))[1].float()


@torch.no_grad()
def attention_maps(encoder: VisionTransformer, images: torch.Tensor) -> torch.Tensor:
    """Return the attention (B, heads, L) of the class token to the patches in the last block, float32.

    With several class tokens, it is their mean. The softmax is over all tokens, so the weights of a head sum to 1 minus
    its attention to the class tokens.
    """
    grid, n = encoder.grid_of(images), encoder.num_cls_tokens
    tokens = encoder.embed(patchify(images, encoder.patch_size), grid=grid)
    *blocks, last = encoder.blocks
    tokens = run_blocks(blocks, tokens, checkpointed=False, grid=grid)
    queries, keys, _ = (part.float() for part in last.attn.project(last.norm1(tokens)))
    scores = queries[:, :, :n] @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5  # (B, heads, class tokens, N)
    if last.attn.bias_grid:
        scores = scores + last.attn.relative_position_bias(grid, n)[:, :n]
    return scores.softmax(dim=-1)[..., n:].mean(dim=2)


def feature_colours(features: torch.Tensor) -> torch.Tensor:
    """Return the first three principal components of features (B, L, D) as colours (B, L, 3) in [0, 1].

    All images share the components, so equal colours mean similar features. Each component is scaled so that the 2nd
    and 98th percentiles of all patches become 0 and 1, and clipped. A component without variance becomes 0.5. The
    coefficient of largest magnitude is made positive, so that the sign is deterministic.
    """
    count, mean = features.shape[0] * features.shape[1], features.mean(dim=(0, 1), dtype=torch.float64)
    products = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for image in features:  # one at a time, because float64 takes twice the memory
        centred = image.double() - mean
        products += centred.T @ centred
    variances, vectors = torch.linalg.eigh(products / count)  # in order of ascending variance
    components = vectors[:, -3:].flip(1)  # (D, 3)
    largest = components.gather(0, components.abs().argmax(dim=0, keepdim=True))
    components = components * largest.sign()
    values = torch.stack([(image.double() - mean) @ components for image in features])  # (B, L, 3)
    ranks = (1 + round(share * (count - 1)) for share in (TAILS, 1 - TAILS))
    low, high = (values.flatten(0, 1).kthvalue(rank, dim=0).values for rank in ranks)
    varies = variances[-3:].flip(0) > 1e-12 * (variances.sum() + mean.square().sum())  # beyond rounding
    colours = ((values - low) / (high - low).clamp(min=1e-30)).clamp(0, 1)
    return torch.where(varies, colours, 0.5).float()


def similarities(features: torch.Tensor, image: int, patch: int) -> torch.Tensor:
    """Return the cosine similarities (B, L) of features (B, L, D) to the feature of one patch of one image."""
    return F.cosine_similarity(features, features[image, patch], dim=-1)


def keep_patches(model: MaskedAutoencoder, num_kept: int) -> MaskedAutoencoder:
    """Return a model with the same weights that sees exactly `num_kept` patches; `model` is unchanged.

    If the noise is a mask (1: masked) with `num_kept` zeros, the new model masks exactly these patches.

    Raises:
        ValueError: if no patch would be visible or masked.
    """
    num_patches = math.prod(model.encoder.grid)
    if not 0 < num_kept < num_patches:
        raise ValueError(f"{num_kept} of {num_patches} patches would be visible; expected some visible and some masked")
    model = copy.copy(model)  # shares all modules and parameters
    model.mask_ratio = 1 - (num_kept + 0.5) / num_patches  # `count` rounds down; the half keeps rounding errors away
    return model


def complementary_noise(noise: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Return the noise (S, B, L) of the fewest masks that together mask every patch: S = L / (L - K), rounded up.

    The first mask is that of `noise` (B, L). Each further mask covers the next L - K patches in the cyclic order of the
    noise.
    """
    num_patches = noise.shape[1]
    num_removed = num_patches - num_kept
    ranks = noise.argsort(dim=1, stable=True).argsort(dim=1)
    shifts = num_removed * torch.arange(math.ceil(num_patches / num_removed), device=noise.device)
    return ((ranks - shifts[:, None, None]) % num_patches).float()


@torch.no_grad()
def fill(
    model: MaskedAutoencoder, images: torch.Tensor, noise: torch.Tensor, *, true_statistics: bool = True
) -> torch.Tensor:
    """Reconstruct all patches of images (B, C, H, W), each from masks that cover it, in the space of the images.

    The masks are those of `complementary_noise`. A patch that several of them cover is the mean of its predictions.
    Without `true_statistics`, normalized patches get statistics interpolated from the visible patches.
    """
    total, count = 0, 0
    for each in complementary_noise(noise, model.num_kept):
        _, prediction, removed = model(images, each)
        mask = model.pixel_mask(removed)
        pixels = model.reconstruct(images, prediction, mask=None if true_statistics else removed)
        total, count = total + pixels * mask, count + mask
    return total / count

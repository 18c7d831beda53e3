"""A frozen encoder whose patch tokens are the target of pre-training.

Legend: as in targets.py.
"""

import hashlib
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from modeling.files import WeightsError
from modeling.hub import download, is_on_hub
from modeling.trained import open_trained
from modeling.vit import Grid
from modeling.weights import open_weights

RESIZED = {"interpolate_pos_encoding": True}
# `model_type` of encoders that run in transformers -> options of their forward pass. "clip" and "siglip" are models of
# images and text; only their vision tower is used.
TOWERS = {"dinov2": {}, "dinov2_with_registers": {}, "dinov3_vit": {}}
TOWERS |= {"clip": RESIZED, "clip_vision_model": RESIZED, "siglip": RESIZED, "siglip_vision_model": RESIZED}


class Teacher(nn.Module):
    """Compute the layer-normalized patch tokens of images.

    Images are resized if needed, so that the teacher has the same grid of patches as the student. `description` names
    the model, its settings and assumptions.

    Args:
        model: returns tokens (B, N, T), the patches last, or an output of transformers with `last_hidden_state`.
        patch_size: patch size of the model, in pixels.
        grid: patches of the student, h and w, unless `forward` gets another grid.
        width: T.
        statistics: mean and standard deviation of the channels, for the normalization of images in [0, 1].
        options: keyword arguments of the model.
    """

    def __init__(self, model: nn.Module, *, patch_size: int, grid: Grid, width: int, statistics: tuple, options: dict):
        super().__init__()
        self.model, self.options = model.eval().requires_grad_(False), options
        self.patch_size, self.grid, self.width = patch_size, grid, width
        size = "{} x {}".format(*(count * patch_size for count in grid))
        self.description = f"{type(model).__name__}, {width} wide, images of {size}, mean {statistics[0]}, "
        self.description += f"std {statistics[1]}"
        self.register_buffer("mean", torch.tensor(statistics[0]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(statistics[1]).view(-1, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor, grid: Grid | None = None) -> torch.Tensor:
        """Return the tokens (B, L, T), float32, of images (B, C, H, W), uint8 or float32 in [0, 1]."""
        grid = grid or self.grid
        size = tuple(count * self.patch_size for count in grid)
        images = images if images.is_floating_point() else images.float() / 255
        images = (images - self.mean) / self.std
        if images.shape[2:] != size:
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
        output = self.model(images, **self.options)
        tokens = getattr(output, "last_hidden_state", output)[:, -math.prod(grid) :].float()
        return F.layer_norm(tokens, tokens.shape[-1:])

    def fingerprint(self) -> str:
        """Return a hash of the weights without their names, which differ between versions of transformers."""
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def open_teacher(path: str, *, grid: Grid, in_channels: int, value_range: tuple | None = None) -> Teacher:
    """Open a frozen encoder for images whose patches form `grid`.

    Args:
        path: weights that `open_trained` reads, or a folder or hf:OWNER/NAME with a DINOv2, DINOv3, CLIP or SigLIP.
        value_range: pixel values that become 0 and 1; None: 0 and 255.

    Raises:
        WeightsError: if the weights cannot be read, or need images with other channels or another value range.
    """
    folder = download(path, whole=False) if is_on_hub(path) else Path(path)
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):  # a file, a run, or a configuration that `open_trained` explains
        kind = None
    if kind in TOWERS:
        return _open_tower(folder, grid, in_channels, TOWERS[kind])
    sizes = open_weights(folder).sizes
    _check_channels(path, sizes["in_channels"], in_channels)
    size = tuple(sizes["patch_size"] * count for count in grid)
    trained = open_trained(folder, whole=False, img_size=size)
    # Without a range, the pixels are 8-bit, or the weights of another library do not state it
    if trained.value_range and list(trained.value_range) != list(value_range or (0, 255)):
        theirs, ours = ("{:g} to {:g}".format(*each) for each in (trained.value_range, value_range or (0, 255)))
        raise WeightsError(f"{path}: the teacher needs pixels from {theirs}, but the data have {ours}; give another")
    statistics = trained.mean, trained.std
    shape = dict(patch_size=sizes["patch_size"], grid=grid, width=trained.encoder.embed_dim)
    teacher = Teacher(trained.encoder, **shape, statistics=statistics, options={})
    teacher.description += "".join(f"; assumed: {assumption}" for assumption in trained.assumed)
    return teacher


def _open_tower(folder: Path, grid: Grid, in_channels: int, options: dict) -> Teacher:
    """Open an encoder that runs in transformers, without running code from its folder."""
    from transformers import AutoModel

    try:
        processor = json.loads((folder / "preprocessor_config.json").read_text())
        statistics = processor["image_mean"], processor["image_std"]
        load = partial(AutoModel.from_pretrained, local_files_only=True, dtype=torch.float32, output_loading_info=True)
        model, report = load(folder)
        model = getattr(model, "vision_model", model)
        _check_tower(model, report)
    except Exception as error:  # transformers raises exceptions of many types
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise WeightsError(
            f"{folder}: cannot be read ({reason}); expected config.json, preprocessor_config.json with image_mean and "
            "image_std, and weights; copy the folder again"
        ) from error
    config = model.config
    _check_channels(folder, config.num_channels, in_channels)
    if not all(isinstance(values, list) and len(values) == in_channels for values in statistics):
        expected = f"expected lists of {in_channels} numbers in image_mean and image_std"
        raise WeightsError(f"{folder}: preprocessor_config.json has {statistics}; {expected}; copy the folder again")
    shape = dict(patch_size=config.patch_size, grid=grid, width=config.hidden_size)
    return Teacher(model, **shape, statistics=statistics, options=options)


def _check_tower(model: nn.Module, report: dict) -> None:
    """Raise ValueError for weights that are missing, not finite or of a wrong shape."""
    bad = sorted(name for name in report["missing_keys"] if "pooler" not in name and "head" not in name)
    if bad or report["mismatched_keys"]:
        raise ValueError(f"missing or misshapen weights: {', '.join([*bad, *map(str, report['mismatched_keys'])][:4])}")
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError("weights that are not finite")


def _check_channels(path: str | Path, theirs: int, ours: int) -> None:
    if theirs != ours:
        raise WeightsError(f"{path}: input_channels of the teacher is {theirs} instead of {ours}; give another teacher")

"""Files of weights: which one a path leads to, the parameters in it, and what stands beside it.

Nothing in a file is executed. What the names of parameters mean is weights.py's.
"""

import argparse
import contextlib
import json
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from modeling.hub import HubError, download, is_on_hub

POOL_SCALES = [1, 2, 3, 6]  # of pyramid pooling in an UperNet
WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # of DistributedDataParallel and torch.compile
WEIGHT_FILES = ("ema.safetensors", "model.safetensors", "pytorch_model.bin")  # the first in a folder is read


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit; the message has the value, what was expected, the remedy."""


def find_weights(path: str | Path, *, whole: bool) -> Path:
    """What `read_state_dict` is to read where `path` may also be a run folder or an exported `encoder/`.

    `whole` asks for the autoencoder where there is one: `encoder/pretraining/` of a run, `pretraining/` of an
    `encoder/`. Otherwise an encoder is enough: `encoder/` of a run. Of one that trained a classifier or segmentation
    model it is `model/`; of a run that has none of these yet, its newest whole checkpoint. Files and other folders with
    weights are returned as they are, and of hf:OWNER/NAME[@revision] the local copy. Raises WeightsError for a path
    that is not there, and for a folder that has none of these.
    """
    if is_on_hub(path):
        subfolders = ["pretraining", ""] if whole else [""]
        try:
            path = download(str(path), weight_files=WEIGHT_FILES, subfolders=subfolders)
        except HubError as error:
            raise WeightsError(str(error)) from error
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        hint = f", or hf:{path} for the Hub" if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) else ""
        raise WeightsError(
            f"{path}: no such file or folder; expected weights or a run folder; correct the path{hint}, or download "
            "them first"
        )
    encoder = path / "encoder"
    exported = [path / "pretraining", path, encoder / "pretraining"] if whole else [path, encoder]
    exported.append(path / "model")
    for folder in [*exported, *sorted(path.glob("checkpoints/step_*"), reverse=True)]:
        # The run writes these last; without one, the folder is half written or half removed.
        finished = folder == path or (folder / "config.json").is_file() or (folder / "state.json").is_file()
        if finished and any((folder / name).is_file() for name in WEIGHT_FILES):
            return folder
    if (path / "args.json").is_file() or (path / "checkpoints").is_dir():
        expected = "encoder/pretraining/" if whole else "encoder/, model/"
        raise WeightsError(
            f"{path}: a run that has no weights yet; expected {expected} or a whole checkpoint in checkpoints/; "
            "wait for its first checkpoint or give another path"
        )
    raise WeightsError(
        f"{path}: a folder without weights; expected {' or '.join(WEIGHT_FILES)}, or a run's checkpoints/, encoder/ or "
        "model/; give one of these or the file itself"
    )


class Stored(NamedTuple):
    """What parameters do not tell of themselves; None where nobody does."""

    grid: tuple[int, int] | None = None  # h w patches of the position tables
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    mean: list[float] | None = None  # of the channels, by which images were normalised
    std: list[float] | None = None
    classes: list[str] | None = None  # names, in the order of the head's rows
    pooling: str | None = None  # "mean" or "cls"; timm has others
    layers: list[int] | None = None  # the blocks, from 0, that a segmentation head sees
    crop_ratio: float | None = None  # of a classifier's evaluation: the part of the resized image that is seen
    resize: list[int] | None = None  # LONG, SHORT: the sides that images fit in a segmenter's evaluation
    mask_ratio: float | None = None  # of an autoencoder
    norm_pix_loss: bool | None = None
    value_range: list[float] | None = None  # what pixels become 0 and 1; None: 0 and 255
    norm_eps: float | None = None  # of LayerNorm, where it is not this project's 1e-6
    unlike: list[str] | None = None  # what the weights were trained with and no module of this project has


def read_stored(path: str | Path) -> Stored:
    """What stands beside weights: in the config.json of a folder, transformers' or timm's, or in the args.json of a
    checkpoint's run. Raises WeightsError for a config.json that is damaged."""
    folder = Path(path)
    if folder.name in WEIGHT_FILES:
        folder = folder.parent
    if (folder / "config.json").is_file():
        try:
            return _stored_in_config(json.loads((folder / "config.json").read_text()), folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, LookupError) as error:
            raise WeightsError(
                f"{folder / 'config.json'}: cannot be read ({type(error).__name__}: {error}); expected the "
                "configuration of a ViT, as transformers or timm write it; copy it again"
            ) from error
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        run = json.loads((folder.resolve().parent.parent / "args.json").read_text())
        flags = run["flags"]
        sides = flags.get("img_size") or [flags["crop_size"]] * 2  # of segmentation
        grid = tuple(side // flags["patch_size"] for side in sides)
        heads = flags["encoder_num_heads"], flags.get("decoder_num_heads")  # pre-training's alone
        told = run.get("classes"), flags.get("pooling"), flags.get("layers")
        others = {name: flags.get(name) for name in ("resize", "mask_ratio", "norm_pix_loss", "value_range")}
        return Stored(grid, *heads, flags["mean"], flags["std"], *told, **others)
    return Stored()


def _stored_in_config(config: dict, folder: Path) -> Stored:
    """What a folder's config.json tells, and the preprocessor_config.json beside it."""
    sizes = config.get("backbone_config", config)  # UperNet's has those of its encoder apart
    if "image_size" not in sizes:
        return _stored_by_timm(config)
    sides = sizes["image_size"] if isinstance(sizes["image_size"], list) else [sizes["image_size"]] * 2
    height, width = (side // sizes["patch_size"] for side in sides)
    stages = config.get("backbone_config", {}).get("out_features", [])
    processor = {}
    with contextlib.suppress(FileNotFoundError):
        processor = json.loads((folder / "preprocessor_config.json").read_text())
    names = config.get("id2label")
    classes = [str(names[index]) for index in sorted(names, key=int)] if names else None
    if classes == [f"LABEL_{i}" for i in range(len(classes or []))]:
        classes = None  # nobody named them
    pooling = None
    if any("ForImageClassification" in name for name in config.get("architectures") or []):
        pooling = "mean" if config["model_type"] == "beit" and config.get("use_mean_pooling", True) else "cls"
    unlike = [] if sizes.get("hidden_act", "gelu") == "gelu" else [f"the activation {sizes['hidden_act']}"]
    if sizes.get("add_fpn") and config.get("pool_scales", POOL_SCALES) != POOL_SCALES:
        unlike.append(f"the pyramid pooling {' '.join(map(str, config['pool_scales']))}")
    norm_eps = float(sizes.get("layer_norm_eps", 1e-12))  # transformers leaves its default out
    if norm_eps > 1e-5:
        unlike.append(f"the epsilon {norm_eps:g} in norms")
    resize = config.get("evaluation", {}).get("resize")
    if resize is None and "backbone_config" in config:  # an older folder of a run, whose flags tell it
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            resize = json.loads((folder.resolve().parent / "args.json").read_text())["flags"]["resize"]
    if resize is not None:
        resize = [int(side) for side in resize]
        _, _ = resize
    return Stored(
        (height, width),
        int(sizes["num_attention_heads"]),
        sizes.get("decoder_num_attention_heads"),
        _mean_in_range(processor.get("image_mean"), config.get("value_range")),
        processor.get("image_std"),
        classes,
        pooling,
        layers=[int(stage.removeprefix("stage")) - 1 for stage in stages] or None,
        crop_ratio=config.get("pretrained_cfg", {}).get("crop_pct") or _crop_ratio(processor),
        resize=resize,
        mask_ratio=config.get("mask_ratio"),
        norm_pix_loss=config.get("norm_pix_loss"),
        value_range=config.get("value_range"),
        norm_eps=None if norm_eps == 1e-6 else norm_eps,
        unlike=unlike or None,
    )


def _mean_in_range(mean: list[float] | None, value_range: list[float] | None) -> list[float] | None:
    """Means of pixels that were multiplied to a range of length 1 -> those in [0, 1]."""
    if mean is None or value_range is None:
        return mean
    low, high = value_range
    return [value - low / (high - low) for value in mean]


def _crop_ratio(processor: dict) -> float | None:
    """The part of a resized image that the centre crop of a preprocessor_config.json takes, where it does what
    evaluation does here: a bicubic resize that keeps proportions, and such a crop."""
    if not processor.get("do_center_crop") or processor.get("resample") != 3:
        return None
    sides = processor.get("crop_size"), processor.get("size")
    crop, size = (side.get("shortest_edge", side.get("height")) if isinstance(side, dict) else side for side in sides)
    return crop / size if crop and size and crop <= size else None


def _stored_by_timm(config: dict) -> Stored:
    """What timm's own config.json tells: sizes only where they are not those of the architecture that it names."""
    pretrained, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    grid = None
    if "img_size" in arguments and "patch_size" in arguments:
        sides = arguments["img_size"] if isinstance(arguments["img_size"], list) else [arguments["img_size"]] * 2
        height, width = (side // arguments["patch_size"] for side in sides)
        grid = height, width
    names = config.get("label_names") or pretrained.get("label_names")
    classes = [str(name) for name in (names.values() if isinstance(names, dict) else names)] if names else None
    pooling = arguments.get("global_pool") or config.get("global_pool") or None
    pooling = {"avg": "mean", "token": "cls"}.get(pooling, pooling)
    activation = arguments.get("act_layer", "gelu")
    return Stored(
        grid,
        arguments.get("num_heads"),
        None,
        pretrained.get("mean"),
        pretrained.get("std"),
        classes,
        pooling,
        crop_ratio=pretrained.get("crop_pct"),
        unlike=None if activation == "gelu" else [f"the activation {activation}"],
    )


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The parameters in a .safetensors or PyTorch file, or in a folder that holds one, under the names they have there.

    Takes them out of {'model': ...} or {'state_dict': ...} and strips the prefixes of wrappers. Nothing in the file is
    executed. Raises WeightsError for a path that is not there, a file that is cut, and one that holds other objects.
    """
    path = Path(path)
    if path.is_dir():
        file = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            expected = " or ".join(WEIGHT_FILES)
            raise WeightsError(f"{path}: a folder without weights; expected {expected}; give the file itself")
        path = file
    if not path.is_file():
        raise WeightsError(f"{path}: no such file; expected weights (.safetensors, .pth, .pt, .bin); correct the path")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the official code stores its flags as one
                state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: refused, as it is damaged or holds objects that run code when they are read; expected tensors; "
            "if you trust its source, save its state dict as .safetensors"
        ) from error
    except Exception as error:  # what a cut file raises depends on where it is cut
        reason = str(error).partition("\n")[0]
        reason = reason if " " in reason else "it is no file of weights"
        raise WeightsError(f"{path}: not readable ({reason}); expected a whole file; copy it again") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not state or not _holds_tensors(state):
        raise WeightsError(f"{path}: holds no state dict; expected names and tensors, maybe under 'model'; save those")
    return {WRAPPERS.sub("", name): value for name, value in state.items()}


def _holds_tensors(state: dict) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())

"""Read files of weights and the configurations beside them. No code in a file is executed."""

import argparse
import contextlib
import json
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file

from modeling.upernet import POOL_SCALES

WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)_orig_mod\.")  # DistributedDataParallel, torch.compile
INDEX = ".index.json"  # suffix of files that list the shard of each parameter
WEIGHT_FILES = ("ema.safetensors", "model.safetensors", "pytorch_model.bin")
WEIGHT_FILES += ("model.safetensors" + INDEX, "pytorch_model.bin" + INDEX)  # the first that a folder has is read


class WeightsError(ValueError):
    """Raised for weights that cannot be read or do not fit.

    `message` is one line. `settings` maps arguments of models and scripts to the values that would fit; "N" stands for
    a number that no file states.
    """

    def __init__(self, message: str, settings: dict[str, object] | None = None):
        super().__init__(message, settings)
        self.message, self.settings = message, settings or {}

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.message}; set {settings}" if settings else self.message


class Stored(NamedTuple):
    """Facts about a model from the files beside its weights, which parameters do not show; None if unknown."""

    grid: tuple[int, int] | None = None  # h and w of the position tables, in patches
    num_heads: int | None = None
    decoder_num_heads: int | None = None
    mean: list[float] | None = None  # of the channels, for the normalization of images in [0, 1]
    std: list[float] | None = None
    classes: list[str] | None = None  # in the order of the head's outputs
    pooling: str | None = None  # "mean", "cls" or "attentive"; timm has others
    problem: str | None = None  # of a classifier: "labels" or "numbers"; None for classes
    standardization: dict[str, list[float]] | None = (
        None  # mean, std and bias of exported numbers, see `export_classifier`
    )
    layers: list[int] | None = None  # indices of the blocks that feed a segmentation head
    window_size: int | None = None  # side of a detector's attention windows, in patches; 0: none
    class_ids: list[int] | None = None  # numbers of a detector's classes in the annotations
    crop_ratio: float | None = None  # side of the centre crop / side of the resized image, in evaluation
    resize: list[int] | None = None  # LONG and SHORT side that images fit in a segmenter's evaluation
    mask_offset: int | None = None  # label of a segmenter's first class in the masks that it was trained on
    void_label: int | None = None  # another label in these masks, of pixels without a class
    mask_ratio: float | None = None  # of an autoencoder
    target: str | None = None  # what the autoencoder predicts, see `modeling.targets`
    value_range: list[float] | None = None  # pixels that become 0 and 1; None: 0 and 255
    norm_eps: float | None = None  # epsilon of LayerNorm, unless it is 1e-6 as here
    unsupported: str | None = None  # description of a feature that no model here has


def read_stored(path: str | Path) -> Stored:
    """Read the config.json of transformers or timm beside weights, or the args.json of a checkpoint's run.

    Raises:
        WeightsError: for a damaged config.json.
    """
    folder = Path(path)
    if folder.name in WEIGHT_FILES:
        folder = folder.parent
    file = folder / "config.json"
    if file.is_file():
        try:
            return _read_config(json.loads(file.read_text()), folder)
        except Exception as error:  # a damaged configuration can raise any exception
            raise WeightsError(
                f"{file}: cannot be read ({type(error).__name__}: {error}); expected the configuration of a ViT, as "
                "transformers or timm write it; copy it again"
            ) from error
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        run = json.loads((folder.resolve().parent.parent / "args.json").read_text())
        flags = run["flags"]
        facts = {name: flags[name] for name in Stored._fields if name in flags}
        facts.setdefault("target", _pixel_target(flags))
        return Stored(**facts)._replace(
            grid=_grid(flags.get("img_size") or flags["crop_size"], flags["patch_size"]),
            num_heads=flags["encoder_num_heads"],
            classes=run.get("classes"),
            class_ids=run.get("class_ids"),
            problem=flags.get("target"),
        )
    return Stored()


def _pixel_target(settings: dict) -> str | None:
    """Return the target that `norm_pix_loss` means in transformers' config.json and in args.json of older runs."""
    return {True: "normalized", False: "pixels"}.get(settings.get("norm_pix_loss"))


def _grid(img_size: int | list[int], patch_size: int) -> tuple[int, int]:
    height, width = img_size if isinstance(img_size, list) else (img_size, img_size)
    return height // patch_size, width // patch_size


def _read_config(config: dict, folder: Path) -> Stored:
    """Return the facts in `config`, a folder's config.json, and in its preprocessor_config.json."""
    sizes = config.get("backbone_config", config)  # UperNet's config nests the sizes of its encoder
    if "image_size" not in sizes:
        return _read_timm_config(config)
    stages = config.get("backbone_config", {}).get("out_features", [])
    layers = [int(stage.removeprefix("stage")) - 1 for stage in stages] or config.get("backbone_out_indices")
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text()) if file.is_file() else {}
    names = config.get("id2label") or {}
    classes = [str(names[index]) for index in sorted(names, key=int)]
    if classes == [f"LABEL_{i}" for i in range(len(classes))]:
        classes = None  # transformers' default names
    pooling = config.get("pooling")  # of models that only this project loads
    if any("ForImageClassification" in name for name in config.get("architectures") or []):
        pooling = "mean" if config["model_type"] == "beit" and config.get("use_mean_pooling", True) else "cls"
    activation = sizes.get("hidden_act", "gelu")
    unsupported = None if activation == "gelu" else f"the activation {activation}"
    pool_scales = config.get("pool_scales", POOL_SCALES)
    if sizes.get("add_fpn") and tuple(pool_scales) != POOL_SCALES:
        unsupported = f"the pyramid pooling {' '.join(map(str, pool_scales))}"
    norm_eps = float(sizes.get("layer_norm_eps", 1e-12))  # transformers does not write its default
    if norm_eps > 1e-5:
        unsupported = f"the epsilon {norm_eps:g} in norms"
    mean, value_range = processor.get("image_mean"), config.get("value_range")
    if mean and value_range:  # undo the shift that `export` adds for other libraries
        low, high = value_range
        mean = [value - low / (high - low) for value in mean]
    return Stored(
        grid=_grid(sizes["image_size"], sizes["patch_size"]),
        num_heads=int(sizes["num_attention_heads"]),
        decoder_num_heads=sizes.get("decoder_num_attention_heads"),
        mean=mean,
        std=processor.get("image_std"),
        classes=classes,
        pooling=pooling,
        problem={"multi_label_classification": "labels", "regression": "numbers"}.get(config.get("problem_type")),
        standardization=config.get("standardization"),
        layers=layers,
        window_size=config.get("window_size"),
        class_ids=config.get("class_ids"),
        crop_ratio=config.get("pretrained_cfg", {}).get("crop_pct"),
        **{name: config.get("evaluation", {}).get(name) for name in ("resize", "mask_offset", "void_label")},
        mask_ratio=config.get("mask_ratio"),
        target=config.get("target") or _pixel_target(config),
        value_range=value_range,
        norm_eps=None if norm_eps == 1e-6 else norm_eps,
        unsupported=unsupported,
    )


def _read_timm_config(config: dict) -> Stored:
    """Return the facts in timm's config.json, which states only sizes that differ from the architecture's."""
    pretrained, arguments = config.get("pretrained_cfg", config), config.get("model_args", {})
    names = config.get("label_names") or pretrained.get("label_names") or []
    names = names.values() if isinstance(names, dict) else names
    pooling = arguments.get("global_pool") or config.get("global_pool") or None
    activation = arguments.get("act_layer", "gelu")
    has_grid = {"img_size", "patch_size"} <= arguments.keys()
    return Stored(
        grid=_grid(arguments["img_size"], arguments["patch_size"]) if has_grid else None,
        num_heads=arguments.get("num_heads"),
        mean=pretrained.get("mean"),
        std=pretrained.get("std"),
        classes=[str(name) for name in names] or None,
        pooling={"avg": "mean", "token": "cls"}.get(pooling, pooling),
        crop_ratio=pretrained.get("crop_pct"),
        unsupported=None if activation == "gelu" else f"the activation {activation}",
    )


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read the parameters in a .safetensors or PyTorch file, or in a folder with one, under their original names.

    An index is followed to its shards. Parameters are taken out of {"model": ...} or {"state_dict": ...}, and prefixes
    of wrappers are removed.

    Raises:
        WeightsError: if a file is damaged or has no state dict.
    """
    path = Path(path)
    if path.is_dir():
        path = next(path / name for name in WEIGHT_FILES if (path / name).is_file())
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if _begins_with(path, b"version https://git-lfs"):
        raise WeightsError(f"{path}: a pointer of Git LFS, not the weights themselves; get these with git lfs pull")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # of flags in official checkpoints
                state = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: not read, because it is damaged or holds objects that run code; expected tensors; if "
            "you trust its source, save its state dict as .safetensors"
        ) from error
    except Exception as error:  # the type for a truncated file depends on where it ends
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise WeightsError(f"{path}: not readable ({reason}); expected a whole file; copy it again") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    pairs = state.items() if isinstance(state, dict) else ()
    if not pairs or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in pairs):
        raise WeightsError(f"{path}: holds no state dict; expected names and tensors, maybe under 'model'; save those")
    return {WRAPPERS.sub("", name): value for name, value in pairs}


def _begins_with(path: Path, start: bytes) -> bool:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read(len(start)) == start
    return False


def _read_shards(path: Path) -> dict[str, torch.Tensor]:
    """Read the parameters in the shards that an index names; raise WeightsError if the index is damaged."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        shards = sorted({*places.values()})
        if not shards or any(Path(name).name != name or name.endswith(INDEX) for name in shards):
            raise ValueError("its weight_map names no files beside it")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise WeightsError(f"{path}: not readable ({reason}); expected an index of shards; copy it again") from error
    state = {}
    for name in shards:
        state |= read_state_dict(path.with_name(name))
    missing = {WRAPPERS.sub("", name) for name in places} - state.keys()
    if missing:
        raise WeightsError(f"{path}: no shard holds {min(missing)}, one of {len(missing)}; copy the shards again")
    return state

"""Writing weights: our modules -> folders that transformers, timm and this project load.

Configurations are plain JSON, so none of these libraries is needed to write them. Legend: as in mae.py.
"""

import copy
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

from modeling.classifier import Classifier
from modeling.files import POOL_SCALES
from modeling.mae import MaskedAutoencoder
from modeling.upernet import LinearHead, Segmenter
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import QKV, TRANSFORMERS_NAMES, TRANSFORMERS_QKV, rename

CROP_RATIO = 0.875  # of evaluation: the part of the resized image that is seen
KEY_BIAS = TRANSFORMERS_QKV[1] + "bias"
BEIT = {  # that computes what a ViT without a final norm does
    "model_type": "beit",
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.0,
    "drop_path_rate": 0.0,
}


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters under the names of MaskedAutoencoder, Classifier and Segmenter -> those of transformers' files, which
    its 4.x and 5.x read.

    The inverse of `weights.to_ours`.
    """
    theirs = {}
    for name, value in state.items():
        if QKV in name:
            parts = zip((name.replace(QKV, part) for part in TRANSFORMERS_QKV), value.chunk(3), strict=True)
        else:
            parts = [(name, value)]
        theirs.update((rename(part, TRANSFORMERS_NAMES), tensor) for part, tensor in parts)
    return theirs


def to_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters under the names of MaskedAutoencoder or Classifier -> those of the official code's files, which are
    timm's where there is no decoder.

    The inverse of `weights.to_ours`.
    """
    return {name.removeprefix("encoder."): value for name, value in state.items()}


def export_encoder(
    encoder: VisionTransformer,
    folder: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    value_range: Sequence[float] | None = None,
) -> None:
    """A folder for `AutoModel.from_pretrained(FOLDER)`, `timm.create_model("local-dir:FOLDER", pretrained=True)` and
    `files.read_state_dict(FOLDER)`, which all compute the same features.

    `mean` and `std`, one number a channel, are those the images were normalised with, in units of [0, 1]; pixels have
    the `value_range` (those that became 0 and 1), by default that of 8 bits. Needs transformers 4.52, whose
    `transformers_weights` lets one config.json name a file for each library.
    """
    state = encoder.state_dict()
    theirs = to_transformers({f"encoder.{name}": value for name, value in state.items()})
    theirs = {name.removeprefix("vit."): value for name, value in theirs.items()}
    # AutoModel always adds a pooler: the identity, with the linear activation below, hands on the cls token as it is.
    theirs["pooler.dense.weight"] = torch.eye(encoder.embed_dim)
    theirs["pooler.dense.bias"] = torch.zeros(encoder.embed_dim)

    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        **_vit_config(encoder),
        "pooler_act": "linear",
        "transformers_weights": "transformers_model.safetensors",
        **_timm_config(encoder, mean, std),
    }
    weights = {"model.safetensors": state, "transformers_model.safetensors": theirs}
    _write(folder, weights, config, _preprocessor(encoder, mean, std), value_range)


def export_classifier(
    model: Classifier,
    folder: str | Path,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float,
    value_range: Sequence[float] | None = None,
) -> None:
    """A folder for `AutoModelForImageClassification.from_pretrained(FOLDER)`, transformers'
    `pipeline("image-classification", FOLDER)`, `timm.create_model("local-dir:FOLDER", pretrained=True)` and
    `files.read_state_dict(FOLDER)`, which all compute the same logits.

    `classes` are the names of the labels in their order, `crop_ratio` the part of the resized image that evaluation
    sees; the other values and the version of transformers as in `export_encoder`. The BatchNorm of a linear probe
    becomes a part of the head, with the same results. In transformers, mean pooling is BEiT's; images that are not
    square take its wrapper of timm, as BEiT's positions are square, and its own processors would stretch them. The
    pipeline makes colour of every image, so it is for models of three channels alone. Raises ValueError where there are
    more or fewer names than classes.
    """
    if len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} names for {model.num_classes} classes")
    encoder, mean_pooled = model.encoder, model.pooling == "mean"
    state = _folded(model)
    weights = {"model.safetensors": to_official(state)}
    if encoder.img_size[0] != encoder.img_size[1]:
        library = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    else:
        theirs = to_transformers(state)
        library = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **_vit_config(encoder)}
        if mean_pooled:
            theirs = _beit(theirs, "beit.")
            library |= {"architectures": ["BeitForImageClassification"], **BEIT}
        weights["transformers_model.safetensors"] = theirs
        library |= {"transformers_weights": "transformers_model.safetensors", **_class_names(classes)}
    pooling = "avg" if mean_pooled else "token"
    config = library | _timm_config(encoder, mean, std, crop_ratio, classes=classes, global_pool=pooling)
    _write(folder, weights, config, _preprocessor(encoder, mean, std, crop_ratio), value_range)


def _beit(theirs: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Parameters of `vit` as those of a BEiT, which has no key biases: they add the same to all products of a query,
    which the softmax takes away."""
    return {re.sub(r"^vit\.", prefix, name): t for name, t in theirs.items() if not name.endswith(KEY_BIAS)}


def export_segmenter(
    model: Segmenter,
    folder: str | Path,
    *,
    classes: Sequence[str],
    mean: Sequence[float],
    std: Sequence[float],
    resize: Sequence[int],
    value_range: Sequence[float] | None = None,
) -> None:
    """A folder for `UperNetForSemanticSegmentation.from_pretrained(FOLDER)`, transformers'
    `pipeline("image-segmentation", FOLDER)` and `files.read_state_dict(FOLDER)`, which all compute the same logits;
    the last reads the auxiliary head and BatchNorm of a linear head too.

    `classes` are the names of the classes in their order, `resize` (LONG, SHORT) the sides that images fit in this
    project's evaluation; the other values and the version of transformers as in `export_encoder`. A linear head becomes
    an UperNet of one level, with the same results. The pipeline makes colour of every image, so it is for models of
    three channels alone. Raises ValueError where there are more or fewer names than classes, and for an encoder whose
    own images are not square.
    """
    encoder = model.encoder
    if len(classes) != model.num_classes:
        raise ValueError(f"{len(classes)} names for {model.num_classes} classes")
    height, width = encoder.img_size
    if height != width:
        raise ValueError(f"an encoder for {height} x {width} images; the positions of transformers' BEiT are square")
    upernet, state = model.head == "upernet", model.state_dict()
    theirs = state
    if not upernet:
        theirs = {name: value for name, value in state.items() if name.startswith("encoder.")}
        theirs |= _linear_as_upernet(model.decode_head)
    theirs = _beit(to_transformers(theirs), "backbone.")
    backbone = {
        **_vit_config(encoder),
        **BEIT,
        "use_relative_position_bias": encoder.relative_position_bias,
        "layer_scale_init_value": 0.0 if encoder.layer_scale is None else encoder.layer_scale or 1.0,  # 0 means none
        "batch_norm_eps": 1e-5,  # without which transformers 5.5 fails
        "out_features": [f"stage{layer + 1}" for layer in model.layers],
        "add_fpn": upernet,
    }
    config = {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": backbone,
        "hidden_size": model.head_width if upernet else 2 * model.num_classes,
        "pool_scales": POOL_SCALES if upernet else [],
        "use_auxiliary_head": model.auxiliary,
        "auxiliary_in_channels": encoder.embed_dim,
        "auxiliary_channels": model.auxiliary_head.classifier.in_channels if model.auxiliary else 256,
        "transformers_weights": "transformers_model.safetensors",
        "evaluation": {"resize": list(resize)},  # this project's; other libraries pass over it
        **_class_names(classes),
    }
    preprocessor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "do_reduce_labels": True,  # files of annotations have 0 for no class, then the classes from 1
    }
    weights = {"model.safetensors": state, "transformers_model.safetensors": theirs}
    _write(folder, weights, config, preprocessor, value_range)


def _linear_as_upernet(head: LinearHead) -> dict[str, torch.Tensor]:
    """The head of an UperNet of one level that computes what a linear head does.

    The BatchNorm becomes a part of the classifier, z = W x + b. Twice as wide as there are classes, the bottleneck
    gives relu(z) and relu(-z), the next convolution hands them on, and their difference is z. Of 3x3 weights, only
    those in the middle are not zero.
    """
    norm, classifier = copy.deepcopy(head.batch_norm).cpu().double(), copy.deepcopy(head.classifier).cpu().double()
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    weight = classifier.weight.flatten(1)  # (N, D)
    bias = classifier.bias + weight @ (norm.bias - norm.running_mean * scale)
    weight, eye = weight * scale, torch.eye(len(bias))
    state = {"classifier.weight": torch.cat([eye, -eye], dim=1)[:, :, None, None], "classifier.bias": 0 * bias}
    for name, middle, shift in (
        ("bottleneck", torch.cat([weight, -weight]), torch.cat([bias, -bias])),
        ("fpn_bottleneck", torch.eye(2 * len(bias)), torch.zeros(2 * len(bias))),
    ):
        state |= {
            f"{name}.conv.weight": F.pad(middle[:, :, None, None], (1, 1, 1, 1)),
            f"{name}.batch_norm.weight": torch.ones_like(shift),
            f"{name}.batch_norm.bias": shift,
            f"{name}.batch_norm.running_mean": torch.zeros_like(shift),
            f"{name}.batch_norm.running_var": torch.ones_like(shift) - 1e-5,  # which BatchNorm adds again
            f"{name}.batch_norm.num_batches_tracked": torch.tensor(0),
        }
    return {f"decode_head.{name}": value for name, value in state.items()}


def _class_names(classes: Sequence[str]) -> dict:
    return {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def _folded(model: Classifier) -> dict[str, torch.Tensor]:
    """The parameters of `model` on the CPU, with the BatchNorm of a linear probe made a part of the head."""
    state = {name: value.cpu() for name, value in model.state_dict().items() if not name.startswith("head_norm.")}
    if model.linear_probe:
        norm = model.head_norm
        mean, variance = norm.running_mean.cpu().double(), norm.running_var.cpu().double()
        weight = state["head.weight"].double() * (variance + norm.eps).rsqrt()
        state |= {"head.weight": weight, "head.bias": state["head.bias"].double() - weight @ mean}
    return state


def export_autoencoder(
    model: MaskedAutoencoder,
    folder: str | Path,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    value_range: Sequence[float] | None = None,
) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained(FOLDER)` and `files.read_state_dict(FOLDER)`.

    `mean`, `std` and `value_range` as in `export_encoder`. transformers' ViTMAE takes square images only: for
    others, the folder is for `read_state_dict` alone.
    """
    block = model.decoder_blocks[0]
    config = {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEForPreTraining"],
        **_vit_config(model.encoder),
        "decoder_hidden_size": model.decoder_embed.out_features,
        "decoder_num_hidden_layers": len(model.decoder_blocks),
        "decoder_num_attention_heads": block.attn.num_heads,
        "decoder_intermediate_size": block.mlp.fc1.out_features,
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": model.norm_pix_loss,
    }
    weights = {"model.safetensors": to_transformers(model.state_dict())}
    _write(folder, weights, config, _preprocessor(model.encoder, mean, std), value_range)


def _vit_config(encoder: VisionTransformer) -> dict:
    height, width = encoder.img_size
    return {
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.in_channels,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.embed_dim * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,  # the library's default of 1e-12 moves features by 1e-4
    }


def _timm_config(
    encoder: VisionTransformer,
    mean: Sequence[float],
    std: Sequence[float],
    crop_ratio: float = CROP_RATIO,
    *,
    classes: Sequence[str] = (),
    global_pool: str = "token",
) -> dict:
    sizes = {key: getattr(encoder, key) for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    config = {
        "architecture": _architecture(encoder),
        "num_classes": len(classes),
        "num_features": encoder.embed_dim,
        "model_args": {"img_size": list(encoder.img_size), "in_chans": encoder.in_channels, **sizes},
        "pretrained_cfg": {
            "input_size": [encoder.in_channels, *encoder.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": crop_ratio,
            "mean": list(mean),
            "std": list(std),
            "num_classes": len(classes),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if classes:
        config |= {"global_pool": global_pool, "label_names": list(classes)}
        config["model_args"]["global_pool"] = global_pool
    return config


def _preprocessor(
    encoder: VisionTransformer, mean: Sequence[float], std: Sequence[float], crop_ratio: float = CROP_RATIO
) -> dict:
    height, width = encoder.img_size
    # Rounded down, as timm and torchvision do. A short side alone does not tell how to cover a crop that is not square.
    resized_height, resized_width = (int(side / crop_ratio + 1e-6) for side in (height, width))
    square = height == width
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resized_height} if square else {"height": resized_height, "width": resized_width},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def _architecture(encoder: VisionTransformer) -> str:
    """timm's name for this size; any ViT of its own for another, as `model_args` gives every size anyway."""
    for name, size in SIZES.items():
        if all(getattr(encoder, key) == value for key, value in size.items()):
            return f"vit_{name}_patch{encoder.patch_size}_224"
    return "vit_base_patch16_224"


def _write(
    folder: str | Path,
    weights: dict[str, dict[str, torch.Tensor]],
    config: dict,
    preprocessor: dict,
    value_range: Sequence[float] | None,
) -> None:
    if value_range is not None:
        config = {**config, "value_range": list(value_range)}  # this project's; other libraries pass over it
        low, high = value_range
        mean = [value + low / (high - low) for value in preprocessor["image_mean"]]  # theirs only multiply pixels
        preprocessor = {**preprocessor, "rescale_factor": 1 / (high - low), "image_mean": mean}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, state in weights.items():
        # Copies, as a part of q, k, v is a view, and safetensors refuses tensors that share memory. Counts stay.
        types = {name: torch.float32 if value.is_floating_point() else value.dtype for name, value in state.items()}
        state = {n: t.detach().to("cpu", types[n], copy=True).contiguous() for n, t in state.items()}
        (folder / file).write_bytes(save(state, metadata={"format": "pt"}))
    for file, content in (("preprocessor_config.json", preprocessor), ("config.json", config)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")

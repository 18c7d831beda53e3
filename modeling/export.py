"""Export modules to folders that transformers, timm and this project load, without needing these libraries."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from modeling.classifier import Classifier
from modeling.decoder import CrossDecoder
from modeling.detector import Detector
from modeling.layouts import QKV, TRANSFORMERS_NAMES, TRANSFORMERS_QKV, State, rename
from modeling.mae import MaskedAutoencoder
from modeling.targets import NormalizedPixels, Pixels
from modeling.upernet import POOL_SCALES, FeaturePyramid, Segmenter
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import Model

CROP_RATIO = 0.875  # side of the centre crop / side of the resized image, in evaluation at 224 pixels
Floats = Sequence[float]
BEIT = {  # settings with which BEiT computes the same as a ViT without a final norm
    "model_type": "beit",
    "use_absolute_position_embeddings": True,
    "use_mean_pooling": True,
    "layer_scale_init_value": 0.0,
    "drop_path_rate": 0.0,
}


def to_transformers(state: State) -> State:
    """Rename our parameters as in the files of transformers 4 and 5; `layouts.to_ours` renames them back."""
    theirs = {}
    for name, value in state.items():
        parts = [(name, value)]
        if QKV in name:
            parts = zip((name.replace(QKV, part) for part in TRANSFORMERS_QKV), value.chunk(3), strict=True)
        theirs.update((rename(part, TRANSFORMERS_NAMES), tensor) for part, tensor in parts)
    return theirs


def to_official(state: State) -> State:
    """Rename the parameters of a MaskedAutoencoder or Classifier as in the official MAE and timm."""
    return {re.sub(r"^decoder\.", "decoder_", name.removeprefix("encoder.")): t for name, t in state.items()}


def libraries_of(model: Model) -> list[str]:
    """Return which of transformers and timm load the exported folder of a model as a whole."""
    encoder = getattr(model, "encoder", model)
    has_head = isinstance(model, Classifier | Segmenter)
    if (
        isinstance(model, Detector)
        or getattr(model, "pooling", None) == "attentive"
        or (has_head and encoder.num_cls_tokens > 1)
    ):
        return []
    if encoder.num_cls_tokens > 1:
        return [] if pixio_misfit(encoder) else ["transformers"]
    return ["transformers"] if isinstance(model, Segmenter) else ["transformers", "timm"]


def pixio_misfit(encoder: VisionTransformer) -> str | None:
    """Return why transformers' PixioModel cannot represent an encoder of several class tokens, None if it can."""
    if encoder.img_size[0] != encoder.img_size[1]:
        return "takes square images only"
    return "takes whole MLP ratios only" if encoder.mlp_ratio % 1 else None


def loading_commands(encoder: VisionTransformer, folder: Path) -> str:
    """Return lines with a command for each library that loads the encoder in `folder`; "" if there is none."""
    code = {
        "timm": f"import timm; timm.create_model('local-dir:{folder}', pretrained=True)",
        "transformers": f"from transformers import AutoModel; AutoModel.from_pretrained('{folder}')",
    }
    commands = [f'  python -c "{line}"' for library, line in code.items() if library in libraries_of(encoder)]
    return "\n".join([" Use the encoder:", *commands] if commands else [])


def export_encoder(
    encoder: VisionTransformer, folder: str | Path, *, mean: Floats, std: Floats, value_range: Floats | None = None
) -> None:
    """Write a folder for transformers' `AutoModel`, timm's `local-dir:FOLDER` and this project.

    An encoder with several class tokens becomes transformers' `PixioModel`, see `pixio_misfit`; timm has no such model.
    Other encoders need transformers 4.52, whose `transformers_weights` lets config.json name a file for each library.

    Args:
        mean, std: normalization of images in [0, 1], one number per channel.
        value_range: pixel values that become 0 and 1; None: 0 and 255.
    """
    theirs = to_transformers({f"encoder.{name}": value for name, value in encoder.state_dict().items()})
    theirs = {name.removeprefix("vit."): value for name, value in theirs.items()}
    statistics = (mean, std, value_range)
    if encoder.num_cls_tokens > 1:
        ratio = encoder.mlp_ratio if encoder.mlp_ratio % 1 else int(encoder.mlp_ratio)
        config = {"model_type": "pixio", "architectures": ["PixioModel"], **_vit_config(encoder), "mlp_ratio": ratio}
        config["pretrained_cfg"] = {"crop_pct": CROP_RATIO}  # other libraries ignore it
        return _write(folder, {"model.safetensors": theirs}, config, _preprocessor(encoder), statistics)
    # AutoModel always adds a pooler. This one, with the linear activation below, returns the cls token unchanged.
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
    weights = {"model.safetensors": encoder.state_dict(), "transformers_model.safetensors": theirs}
    _write(folder, weights, config, _preprocessor(encoder), statistics)


def export_classifier(
    model: Classifier,
    folder: str | Path,
    *,
    classes: Sequence[str],
    mean: Floats,
    std: Floats,
    crop_ratio: float,
    value_range: Floats | None = None,
) -> None:
    """Write a folder for transformers' `AutoModelForImageClassification`, timm's `local-dir:FOLDER` and this project.

    The BatchNorm of a probe and the standardization of numbers are folded into the head. In transformers, a model with
    mean pooling becomes a BEiT. BEiT needs square images, so models of other images use transformers' wrapper of timm.
    transformers' pipeline converts images to RGB, so it works only with three channels. Only this project loads
    attentive pooling and classifiers with several class tokens. The encoder of such a model is also written to
    `encoder/`, for other libraries, unless mean pooling removed its final norm.

    Args:
        classes: names of classes, labels or numbers, in the order of the logits.
        crop_ratio: side of the centre crop / side of the resized image, in evaluation.
        mean, std, value_range: as in `export_encoder`.
    """
    encoder, mean_pooled = model.encoder, model.pooling == "mean"
    state = _fold_into_head(model)
    names = _class_names(classes)
    if model.problem != "classes":
        names["problem_type"] = {"labels": "multi_label_classification", "numbers": "regression"}[model.problem]
    if model.problem == "numbers":
        # Other libraries ignore this. Their bias includes the mean, so ours could not be recovered exactly from it.
        parts = dict(
            mean=model.number_mean, std=model.number_std, bias=_fold_into_head(model, in_units=False)["head.bias"]
        )
        names["standardization"] = {name: part.tolist() for name, part in parts.items()}
    if not libraries_of(model):
        kind = {"model_type": "vit_classifier", "pooling": model.pooling}
        kind = {"model_type": "attentive_probe"} if model.pooling == "attentive" else kind
        config = {**kind, **_vit_config(encoder), "pretrained_cfg": {"crop_pct": crop_ratio}} | names
        statistics = (mean, std, value_range)
        _write(folder, {"model.safetensors": state}, config, _preprocessor(encoder, crop_ratio), statistics)
        if not mean_pooled:
            export_encoder(encoder, Path(folder) / "encoder", mean=mean, std=std, value_range=value_range)
        return
    weights = {"model.safetensors": to_official(state)}
    if encoder.img_size[0] != encoder.img_size[1]:
        library = {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"]}
    else:
        theirs = to_transformers(state)
        library = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **_vit_config(encoder)}
        if mean_pooled:
            theirs = _to_beit(theirs, "beit.")
            library |= {"architectures": ["BeitForImageClassification"], **BEIT}
        weights["transformers_model.safetensors"] = theirs
        library |= {"transformers_weights": "transformers_model.safetensors"}
    library |= names
    pooling = "avg" if mean_pooled else "token"
    config = library | _timm_config(encoder, mean, std, crop_ratio, classes=classes, global_pool=pooling)
    _write(folder, weights, config, _preprocessor(encoder, crop_ratio), (mean, std, value_range))


def _to_beit(theirs: State, prefix: str) -> State:
    """Rename the parameters of `vit` to those of a BEiT, without key biases, which cancel in the softmax."""
    key_bias = TRANSFORMERS_QKV[1] + "bias"
    return {re.sub(r"^vit\.", prefix, name): t for name, t in theirs.items() if not name.endswith(key_bias)}


def export_segmenter(
    model: Segmenter,
    folder: str | Path,
    *,
    classes: Sequence[str],
    mean: Floats,
    std: Floats,
    resize: Sequence[int],
    value_range: Floats | None = None,
    masks: dict[str, int | None] | None = None,
) -> None:
    """Write a folder for transformers' `AutoModelForSemanticSegmentation` and this project.

    For transformers, a linear head becomes an equivalent UperNet, see `LinearHead.to_transformers`; this project loads
    the linear head itself. An encoder for DPT must have no relative position bias and no LayerScale. transformers' DPT
    resizes positions differently, so its results agree only for images of the encoder's size, which its processor
    makes. transformers' pipeline works only with three channels. transformers has no models with several class tokens,
    so only this project loads these.

    Args:
        classes: names, in the order of the logits.
        resize: LONG and SHORT side that images fit into in this project's evaluation.
        mean, std, value_range: as in `export_encoder`.
        masks: "mask_offset" and "void_label" of the training masks.
    """
    state, head = model.state_dict(), model.decode_head.to_transformers()
    theirs = to_transformers({name: value for name, value in state.items() if not name.startswith("decode_head.")})
    if not libraries_of(model):
        config = {"model_type": "vit_segmenter", **_vit_config(model.encoder), "backbone_out_indices": model.layers}
    elif model.decode_head.model_type == "dpt":
        config, theirs = _dpt_config(model), {re.sub(r"^vit\.", "dpt.", name): t for name, t in theirs.items()}
        dim = model.encoder.embed_dim
        theirs |= {"dpt.layernorm.weight": torch.ones(dim), "dpt.layernorm.bias": torch.zeros(dim)}  # without effect
    else:
        config = _upernet_config(model, len(head["decode_head.bottleneck.conv.weight"]))
        theirs = _to_beit(theirs, "backbone.")
    config |= {"evaluation": {"resize": list(resize), **(masks or {})}}  # other libraries ignore it
    weights = {"model.safetensors": state}
    if libraries_of(model):
        config["transformers_weights"] = "transformers_model.safetensors"
        weights["transformers_model.safetensors"] = theirs | head
    config |= _class_names(classes)
    height, width = model.encoder.img_size
    preprocessor = {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # bilinear
        "do_reduce_labels": True,  # in annotations, 0 means no class and classes start at 1
    }
    _write(folder, weights, config, preprocessor, (mean, std, value_range))


def export_detector(
    model: Detector,
    folder: str | Path,
    *,
    classes: Sequence[str],
    class_ids: Sequence[int] | None = None,
    mean: Floats,
    std: Floats,
    value_range: Floats | None = None,
) -> None:
    """Write a folder for this project; no other library has this model.

    Args:
        classes: names, without the background.
        class_ids: their numbers in the annotations; None: from 1.
        mean, std, value_range: as in `export_encoder`.
    """
    config = {"model_type": "vit_detector", **_vit_config(model.encoder), "window_size": model.window}
    config["class_ids"] = list(class_ids or range(1, len(classes) + 1))
    preprocessor = {"do_resize": True, "size": {"longest_edge": model.encoder.img_size[0]}, "do_pad": True}
    weights = {"model.safetensors": model.state_dict()}
    _write(folder, weights, config | _class_names(classes), preprocessor, (mean, std, value_range))


def _upernet_config(model: Segmenter, width: int) -> dict:
    """Return the configuration of transformers' UperNet with `width` channels and a BEiT as backbone."""
    encoder, has_pyramid = model.encoder, isinstance(model.fpn, FeaturePyramid)
    backbone = {
        **_vit_config(encoder),
        **BEIT,
        "use_relative_position_bias": encoder.relative_position_bias,
        "layer_scale_init_value": 0.0 if encoder.layer_scale is None else encoder.layer_scale or 1.0,  # 0 means none
        "batch_norm_eps": 1e-5,  # transformers 5.5 fails without it
        "out_features": [f"stage{layer + 1}" for layer in model.layers],
        "add_fpn": has_pyramid,
    }
    return {
        "model_type": "upernet",
        "architectures": ["UperNetForSemanticSegmentation"],
        "backbone_config": backbone,
        "hidden_size": width,
        "pool_scales": list(POOL_SCALES) if has_pyramid else [],
        "use_auxiliary_head": model.auxiliary,
        "auxiliary_in_channels": encoder.embed_dim,
        "auxiliary_channels": model.auxiliary_head.classifier.in_channels if model.auxiliary else 256,
    }


def _dpt_config(model: Segmenter) -> dict:
    """Return the configuration of transformers' DPT with its own ViT."""
    return {
        "model_type": "dpt",
        "architectures": ["DPTForSemanticSegmentation"],
        **_vit_config(model.encoder),
        "backbone_out_indices": model.layers,
        "readout_type": "ignore",
        "neck_hidden_sizes": [model.head_width] * len(model.layers),
        "fusion_hidden_size": model.head_width,
        "use_batch_norm_in_fusion_residual": True,
        "use_bias_in_fusion_residual": False,
        "use_auxiliary_head": False,
    }


def _class_names(classes: Sequence[str]) -> dict:
    return {
        "id2label": {str(index): name for index, name in enumerate(classes)},
        "label2id": {name: index for index, name in enumerate(classes)},
    }


def _fold_into_head(model: Classifier, *, in_units: bool = True) -> State:
    """Return the parameters on the CPU, with the BatchNorm and (if `in_units`) the scale of numbers in the head."""
    apart = ("head_norm.", "number_")
    state = {name: value.cpu() for name, value in model.state_dict().items() if not name.startswith(apart)}
    weight, bias = state["head.weight"].double(), state["head.bias"].double()
    if model.probe:
        norm = model.head_norm
        weight = weight * (norm.running_var.cpu().double() + norm.eps).rsqrt()
        bias = bias - weight @ norm.running_mean.cpu().double()
    if model.problem == "numbers" and in_units:
        std = model.number_std.cpu().double()
        weight, bias = weight * std[:, None], bias * std + model.number_mean.cpu().double()
    return state | {"head.weight": weight, "head.bias": bias}


def vit_mae_misfit(model: MaskedAutoencoder) -> str | None:
    """Return the reason why transformers' ViTMAE cannot represent an autoencoder, None if it can."""
    height, width = model.encoder.img_size
    if isinstance(model.decoder, CrossDecoder):
        return "has no cross-attention decoder"
    if not isinstance(model.target, Pixels | NormalizedPixels):
        return "predicts pixels only"
    if model.encoder.num_cls_tokens > 1:
        return "has one class token"
    return None if height == width else "takes square images only"


def export_autoencoder(
    model: MaskedAutoencoder, folder: str | Path, *, mean: Floats, std: Floats, value_range: Floats | None = None
) -> None:
    """Write a folder for this project, and for transformers' `ViTMAEForPreTraining` unless `vit_mae_misfit`."""
    decoder, state = model.decoder, model.state_dict()
    library = {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"]}
    if isinstance(decoder, CrossDecoder):
        library = {"model_type": "cross_mae", "decoder_inputs": "weighted" if decoder.reads_layers else "last"}
    elif not isinstance(model.target, Pixels | NormalizedPixels):
        library = {"model_type": "masked_autoencoder"}
    elif model.encoder.num_cls_tokens > 1:
        library = {"model_type": "pixio_mae"}
    else:
        state = to_transformers(state)
    config = {
        **library,
        **_vit_config(model.encoder),
        "decoder_hidden_size": decoder.embed_dim,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.num_heads,
        "decoder_intermediate_size": int(decoder.embed_dim * decoder.mlp_ratio),
        "mask_ratio": model.mask_ratio,
        "norm_pix_loss": isinstance(model.target, NormalizedPixels),
        "target": model.target.name,
    }
    _write(folder, {"model.safetensors": state}, config, _preprocessor(model.encoder), (mean, std, value_range))


def _vit_config(encoder: VisionTransformer) -> dict:
    height, width = encoder.img_size
    several = {"n_cls_tokens": encoder.num_cls_tokens} if encoder.num_cls_tokens > 1 else {}
    return several | {
        "image_size": height if height == width else [height, width],
        "patch_size": encoder.patch_size,
        "num_channels": encoder.in_channels,
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": int(encoder.embed_dim * encoder.mlp_ratio),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": 1e-6,  # the library's default of 1e-12 changes features by 1e-4
    }


def _timm_config(
    encoder: VisionTransformer, mean: Floats, std: Floats, crop_ratio=CROP_RATIO, *, classes=(), global_pool="token"
) -> dict:
    sizes = {key: getattr(encoder, key) for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    known = [
        f"vit_{name}_patch{size['patch_size']}_224" for name, size in SIZES.items() if size.items() <= sizes.items()
    ]
    config = {
        "architecture": known[0] if known else "vit_base_patch16_224",  # any, because `model_args` has all sizes
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


def _preprocessor(encoder: VisionTransformer, crop_ratio: float = CROP_RATIO) -> dict:
    height, width = encoder.img_size
    # Rounded down, as in timm and torchvision. A shortest edge would not cover every crop that is not square.
    resized_height, resized_width = (int(side / crop_ratio + 1e-6) for side in (height, width))
    square = height == width
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": resized_height} if square else {"height": resized_height, "width": resized_width},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }


def _write(folder: str | Path, weights: dict[str, State], config: dict, preprocessor: dict, statistics: tuple) -> None:
    """Write weights, config.json and preprocessor_config.json; `statistics` are mean, std and value range."""
    mean, std, value_range = statistics
    low, high = value_range or (0, 255)
    preprocessor |= {"do_rescale": True, "rescale_factor": 1 / (high - low), "do_normalize": True}
    preprocessor["image_mean"] = [value + low / (high - low) for value in mean]  # other libraries can only scale
    preprocessor["image_std"] = list(std)
    if value_range is not None:
        config = {**config, "value_range": list(value_range)}  # other libraries ignore it
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, state in weights.items():
        # Copies, because q, k and v are views, and safetensors refuses tensors that share memory.
        types = {name: torch.float32 if value.is_floating_point() else value.dtype for name, value in state.items()}
        state = {n: t.detach().to("cpu", types[n], copy=True).contiguous() for n, t in state.items()}
        (folder / file).write_bytes(save(state, metadata={"format": "pt"}))
    for file, content in (("preprocessor_config.json", preprocessor), ("config.json", config)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")

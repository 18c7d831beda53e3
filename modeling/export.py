"""Writing weights: our modules -> folders that transformers, timm and this project load.

Configurations are plain JSON, so none of these libraries is needed to write them. Legend: as in mae.py.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save

from modeling.mae import MaskedAutoencoder
from modeling.vit import SIZES, VisionTransformer
from modeling.weights import QKV, TRANSFORMERS_NAMES, TRANSFORMERS_QKV, rename

CROP_RATIO = 0.875  # of evaluation: the part of the resized image that is seen


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters under MaskedAutoencoder's names -> those of transformers' files, which its 4.x and 5.x read.

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


def export_encoder(
    encoder: VisionTransformer, folder: str | Path, *, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A folder for `AutoModel.from_pretrained(FOLDER)`, `timm.create_model("local-dir:FOLDER", pretrained=True)` and
    `weights.read_state_dict(FOLDER)`, which all compute the same features.

    `mean` and `std`, one number a channel, are those the images were normalised with, in units of [0, 1]. Needs
    transformers 4.52, whose `transformers_weights` lets one config.json name a file for each library.
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
        # what follows is timm's
        "architecture": _architecture(encoder),
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": {
            "img_size": list(encoder.img_size),
            "in_chans": encoder.in_channels,
            **{key: getattr(encoder, key) for key in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")},
        },
        "pretrained_cfg": {
            "input_size": [encoder.in_channels, *encoder.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": CROP_RATIO,
            "mean": list(mean),
            "std": list(std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    weights = {"model.safetensors": state, "transformers_model.safetensors": theirs}
    _write(folder, weights, config, _preprocessor(encoder, mean, std))


def export_autoencoder(
    model: MaskedAutoencoder, folder: str | Path, *, mean: Sequence[float], std: Sequence[float]
) -> None:
    """A folder for `ViTMAEForPreTraining.from_pretrained(FOLDER)` and `weights.read_state_dict(FOLDER)`.

    `mean` and `std` as in `export_encoder`. transformers' ViTMAE takes square images only: for others, the folder is
    for `read_state_dict` alone.
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
    _write(folder, weights, config, _preprocessor(model.encoder, mean, std))


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


def _preprocessor(encoder: VisionTransformer, mean: Sequence[float], std: Sequence[float]) -> dict:
    height, width = encoder.img_size
    # Rounded down, as timm and torchvision do. A short side alone does not tell how to cover a crop that is not square.
    resized_height, resized_width = int(height / CROP_RATIO), int(width / CROP_RATIO)
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


def _write(folder: str | Path, weights: dict[str, dict[str, torch.Tensor]], config: dict, preprocessor: dict) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file, state in weights.items():
        # Copies, as a part of q, k, v is a view, and safetensors refuses tensors that share memory.
        state = {n: t.detach().to("cpu", torch.float32, copy=True).contiguous() for n, t in state.items()}
        (folder / file).write_bytes(save(state, metadata={"format": "pt"}))
    for file, content in (("preprocessor_config.json", preprocessor), ("config.json", config)):
        (folder / file).write_text(json.dumps(content, indent=2) + "\n")

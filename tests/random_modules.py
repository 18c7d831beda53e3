"""Build small modules for tests, and randomize their parameters."""

import torch
from torch import nn

from modeling.decoder import DECODERS
from modeling.mae import MaskedAutoencoder
from modeling.targets import TARGETS
from modeling.vit import VisionTransformer

EXTRAS = ("drop_path", "relative_position_bias", "layer_scale")


def randomize(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Add noise to every parameter, so that a swap of two would be noticed; switch to evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def new_encoder(**options) -> VisionTransformer:
    """Build an encoder from its sizes, options of `add_extras` and `gradient_checkpointing`."""
    extras = {name: options.pop(name) for name in EXTRAS if name in options}
    checkpointed = options.pop("gradient_checkpointing", False)
    encoder = VisionTransformer(**options).initialize().add_extras(**extras)
    encoder.gradient_checkpointing = checkpointed
    return encoder


def build_autoencoder(encoder: VisionTransformer, **options) -> MaskedAutoencoder:
    """Build an autoencoder around an encoder; `options` have the names of the scripts' flags."""
    names = [name for name in options if name.startswith("decoder_")]
    kind = options.pop("decoder", "self")
    sizes = {name.removeprefix("decoder_"): options.pop(name) for name in names}
    target = TARGETS[options.pop("target", "normalized")](encoder, options.pop("width", None))
    sizes |= dict(num_outputs=target.width, custom_weight_init=options.pop("custom_weight_init", True))
    return MaskedAutoencoder(encoder, DECODERS[kind](encoder, **sizes), target, **options)

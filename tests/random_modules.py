"""Random parameters for the modules of tests."""

import torch
from torch import nn


def randomise(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Move every parameter of `module`, so that no two could be swapped unnoticed; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return module.eval()

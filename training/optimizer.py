"""AdamW and its parameter groups."""

import torch
from torch import nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, bias_weight_decay: bool = False, norm_weight_decay: bool = False
) -> list[dict]:
    """Two groups of the parameters that train: decayed, and not decayed.

    Not decayed are biases and the weights of norms, unless asked for (a norm's bias counts as the norm's), and what
    `model.no_weight_decay()` names. Each group also lists its parameters' `names`.
    """
    excluded = set(model.no_weight_decay())
    groups = {decay: {"params": [], "names": [], "weight_decay": decay} for decay in (weight_decay, 0.0)}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=module_name, recurse=False):
            if not parameter.requires_grad:
                continue
            if isinstance(module, NORMS):
                decays = norm_weight_decay
            elif name.endswith("bias"):
                decays = bias_weight_decay
            else:
                decays = name not in excluded
            group = groups[weight_decay if decays else 0.0]
            group["params"].append(parameter)
            group["names"].append(name)
    return [group for group in groups.values() if group["params"]]


def adamw(groups: list[dict], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017) with the fused kernel. The schedule sets the rate before every step."""
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

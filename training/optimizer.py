"""AdamW, LARS and their parameter groups."""

import torch
from torch import nn

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    bias_weight_decay: bool = False,
    norm_weight_decay: bool = False,
    layer_decay: float = 1.0,
) -> list[dict]:
    """The parameters that train, in groups of one `weight_decay` and one `lr_scale`; each also lists their `names`.

    Not decayed are biases and the weights of norms, unless asked for (a norm's bias counts as the norm's), and what
    `model.no_weight_decay()` names. With `layer_decay` below 1, lower layers learn slower (Clark et al. 2020,
    "ELECTRA", appendix; Bao et al. 2021, "BEiT", for ViT): the scale of layer i of n is layer_decay^(n - i), where the
    model answers with `layer_index(name)` and `num_layers`, the index of its head.
    """
    excluded = set(model.no_weight_decay())
    groups: dict[tuple[float, float], dict] = {}
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
            decay = weight_decay if decays else 0.0
            scale = 1.0 if layer_decay == 1 else layer_decay ** (model.num_layers - model.layer_index(name))
            new = {"params": [], "names": [], "weight_decay": decay, "lr_scale": scale}
            group = groups.setdefault((scale, -decay), new)
            group["params"].append(parameter)
            group["names"].append(name)
    return [groups[key] for key in sorted(groups)]  # the lowest layer first, and what decays before what does not


def adamw(groups: list[dict], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2017) with the fused kernel. The schedule sets the rate before every step."""
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def lars(groups: list[dict]) -> torch.optim.Optimizer:
    """LARS (You et al. 2017, "Large Batch Training of Convolutional Networks") with momentum 0.9 and trust coefficient
    0.001. The schedule sets the rate before every step.

    Parameters of one dimension neither decay nor have a trust ratio: for them it is SGD with momentum.
    """
    from timm.optim import Lars

    split = []
    for group in groups:
        for adapted in (True, False):
            own = [parameter for parameter in group["params"] if (parameter.ndim > 1) == adapted]
            decay = group["weight_decay"] if adapted else 0.0
            # Without always_adapt, timm's would leave the trust ratio out where nothing decays
            new = {"params": own, "weight_decay": decay, "lr_scale": group["lr_scale"], "always_adapt": adapted}
            split += [new] if own else []
    return Lars(split, lr=0.0, momentum=0.9, trust_coeff=0.001)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the rate of every group: `learning_rate` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)  # a checkpoint of before has no scales

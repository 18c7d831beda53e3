"""AdamW, LARS and their parameter groups."""

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from training.sharding import whole

DECAY_FLAGS = ("weight_decay", "bias_weight_decay", "norm_weight_decay", "layer_decay")
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    bias_weight_decay: bool = False,
    norm_weight_decay: bool = False,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Return the parameters that train in groups of one `weight_decay` and one `lr_scale`.

    Biases and norms are not decayed unless asked for (a norm's bias counts as the norm's), nor are the parameters in
    `model.no_weight_decay()`. With `layer_decay` below 1, lower layers learn slower (Clark et al. 2020, "ELECTRA",
    appendix; Bao et al. 2021, "BEiT", for ViT): the scale of layer i of n is layer_decay^(n - i), where the model gives
    `layer_index(name)`, and `num_layers`, the index of its head.
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
            new = {"params": [], "weight_decay": decay, "lr_scale": scale}
            groups.setdefault((scale, -decay), new)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]  # the lowest layer first, and decayed parameters first


def adamw(groups: list[dict], *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2017) with the fused kernel; the schedule sets its learning rate every step."""
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)


def lars(groups: list[dict]) -> torch.optim.Optimizer:
    """Return LARS (You et al. 2017, "Large Batch Training of Convolutional Networks").

    Its momentum is 0.9, its trust coefficient 0.001; the schedule sets its learning rate every step. Parameters of one
    dimension neither decay nor have a trust ratio: for them it is SGD with momentum.
    """
    from timm.optim import Lars

    split = []
    for group in groups:
        for adapted in (True, False):
            own = [parameter for parameter in group["params"] if (parameter.ndim > 1) == adapted]
            decay = group["weight_decay"] if adapted else 0.0
            # Without always_adapt, timm leaves the trust ratio out if nothing decays
            new = {"params": own, "weight_decay": decay, "lr_scale": group["lr_scale"], "always_adapt": adapted}
            split += [new] if own else []
    return Lars(split, lr=0.0, momentum=0.9, trust_coeff=0.001)


def clip_gradients(accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the global norm of the gradients, unless `max_norm` is 0; return the norm before, (), on the device."""
    if max_norm:
        return accelerator.clip_grad_norm_(model.parameters(), max_norm)
    accelerator.unscale_gradients()  # of fp16's loss scaler
    return whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group: `learning_rate` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)  # older checkpoints have no scales


def build_average(model: nn.Module, decay: float) -> nn.Module:
    """Return the exponential moving average of a model's weights, with its latest buffers; update it every step."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, exclude_buffers=True)

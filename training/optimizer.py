"""AdamW, LARS, Muon and their parameter groups."""

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from training.sharding import whole

DECAY_FLAGS = ("weight_decay", "bias_weight_decay", "norm_weight_decay", "layer_decay")
MUON_PARTS = {"qkv": 3, "kv": 2}  # number of matrices in a layer's weight, by its name; 1 for others
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    *,
    bias_weight_decay: bool = False,
    norm_weight_decay: bool = False,
    layer_decay: float = 1.0,
) -> list[dict]:
    """Return the trainable parameters in groups that share `weight_decay` and `lr_scale`.

    Biases and norms are not decayed unless asked for (a norm's bias counts as the norm's), nor are the parameters in
    `model.no_weight_decay()`. With `layer_decay` below 1, lower layers learn slower (Clark et al. 2020, "ELECTRA",
    appendix; Bao et al. 2021, "BEiT", for ViT): the scale of a layer is layer_decay^(n - i), where i is the model's
    `layer_index(name)`, and n its `num_layers`, the index of the head.
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


def check_muon(optimizer: str) -> list[str]:
    """Return an error message if --optimizer is muon and this torch has no Muon."""
    if optimizer != "muon" or hasattr(torch.optim, "Muon"):
        return []
    return [f"--optimizer muon needs torch 2.9, this is torch {torch.__version__}; upgrade it, or leave the flag out"]


def muon(groups: list[dict], model: nn.Module, *, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return Muon for the weights of the Linear layers in a model's blocks, and AdamW for all other parameters."""
    parts = {
        module.weight: MUON_PARTS.get(name.rpartition(".")[2], 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in name
    }
    split = []
    for group in groups:
        for number in (0, *sorted(set(parts.values()))):
            own = [parameter for parameter in group["params"] if parts.get(parameter, 0) == number]
            split += [group | {"params": own, "muon_parts": number}] if own else []
    return MuonWithAdamW(split, betas=betas)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) and AdamW as one optimizer.

    Groups whose `muon_parts` is 0 take steps of AdamW. The other weights take steps of Muon, each as that many matrices
    of equal height: queries, keys and values are orthogonalized separately, as Jordan et al. recommend. Steps of Muon
    are scaled to the root mean square of AdamW's (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2),
    so that one learning rate and weight decay suit both.
    """

    def __init__(self, groups: list[dict], *, betas: tuple[float, float]):
        super().__init__(groups, {"lr": 0.0})
        self.adamw = adamw([group for group in self.param_groups if not group["muon_parts"]], betas=betas)

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "adamw": self.adamw}  # for copies

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take a step; `closure` is not supported."""
        self.adamw.state = self.state  # loading a checkpoint replaces state and groups
        self.adamw.param_groups = [group for group in self.param_groups if not group["muon_parts"]]
        self.adamw.step()
        for group in self.param_groups:
            if group["muon_parts"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict) -> None:
        state = {}
        for weight in group["params"]:
            if weight not in self.state:
                self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            tensors = weight, weight.grad, self.state[weight]["momentum_buffer"]
            views = (tensor.detach().chunk(group["muon_parts"]) for tensor in tensors)
            for matrix, gradient, buffer in zip(*views, strict=True):
                matrix.grad = gradient
                state[matrix] = {"momentum_buffer": buffer}
        options = dict(lr=group["lr"], weight_decay=group["weight_decay"], adjust_lr_fn="match_rms_adamw")
        optimizer = torch.optim.Muon(list(state), **options)  # a new one, as views do not follow weights to a device
        optimizer.state.update(state)
        optimizer.step()


def clip_gradients(accelerator, model: nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the global norm of the gradients, unless `max_norm` is 0; return the norm before clipping, ()."""
    if max_norm:
        return accelerator.clip_grad_norm_(model.parameters(), max_norm)
    accelerator.unscale_gradients()  # fp16's loss scaler has multiplied them
    return whole(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group: `learning_rate` times the group's `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)  # older checkpoints have no scales


def build_average(model: nn.Module, decay: float) -> nn.Module:
    """Return the exponential moving average of a model's weights, with its latest buffers; update it every step."""
    from timm.utils import ModelEmaV3

    return ModelEmaV3(model, decay=decay, exclude_buffers=True)

"""FSDP2: training on a share of the weights (Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`).

With Accelerate's `fsdp_version: 2`, weights, gradients and the optimizer's moments are split over the processes, and
the weights of a block are gathered while it is computed. Only the training step runs on sharded weights. Validation,
pictures and exports take an unsharded copy, because processes differ in what they evaluate, and every forward pass on
sharded weights needs all of them.
"""

import copy
import os
import warnings
from collections.abc import Callable
from functools import partial

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def configure_sharding(
    accelerator, *, compiled: bool, auto_micro_batch: bool, optimizer: str | None = None
) -> tuple[bool, list[str]]:
    """Make FSDP2, if Accelerate runs it, compute what DDP would.

    Args:
        compiled: --compile.
        auto_micro_batch: --micro_batch_size auto.
        optimizer: --optimizer.

    Returns:
        Whether it is configured to checkpoint activations, and error messages, one per problem. Accelerate's
        checkpointing is turned off, because it would draw other random numbers when it recomputes; the blocks' own has
        to take its place.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return False, []
        problem = f"Accelerate is configured for FSDP and runs without it on {accelerator.device}"
        return False, [f"{problem}; start it with `accelerate launch` on GPUs, or take a configuration without FSDP"]
    plugin = accelerator.state.fsdp_plugin

    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    checkpointing = bool(plugin.activation_checkpointing)
    plugin.activation_checkpointing = False
    plugin.mixed_precision_policy = None  # the loop autocasts: weights and residuals stay in float32
    plugin.cpu_ram_efficient_loading = False  # every process has the weights already
    plugin.auto_wrap_policy = transformer_auto_wrap_policy

    options = {
        "Accelerate's fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "--compile": compiled,
        "--mixed_precision fp16": accelerator.mixed_precision == "fp16",
        "--micro_batch_size auto": auto_micro_batch,  # which tries steps that are not sharded
        "--optimizer muon": optimizer == "muon",  # which needs whole matrices
    }
    return checkpointing, [
        f"{name} does not work with FSDP2; leave it out, or run without FSDP" for name, on in options.items() if on
    ]


def wrap(accelerator, model: nn.Module, optimizer) -> tuple[nn.Module, torch.optim.Optimizer, Callable]:
    """Prepare model and optimizer with Accelerate.

    Returns:
        Both, and `plain_model()`, which returns the model neither wrapped nor sharded, with its current weights. Every
        process must call it, and gets the same module each time.
    """
    if not accelerator.is_fsdp2:
        model, optimizer = accelerator.prepare(model, optimizer)
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the loop autocasts itself
        return model, optimizer, lambda: plain
    classes = {type(module).__name__ for module in model.modules()}
    accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(classes & {"Block", "CrossBlock"})
    # torch 2.14 warns of outputs that are views, as those of every Linear are; the loop changes none in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plain = copy.deepcopy(model).to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, partial(_copy_weights, model, plain)


def _copy_weights(model: nn.Module, plain: nn.Module) -> nn.Module:
    target = plain.state_dict()
    for name, tensor in model.state_dict().items():
        target[name].copy_(whole(tensor))
    return plain


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded. Every process must call it; the device is not synchronized."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: dict, *, keep: bool) -> dict:
    """Return a nested dict of whole tensors on the CPU; none unless `keep`. Every process must call it."""
    gathered = {}
    for name, value in state.items():
        if isinstance(value, dict):
            gathered[name] = gather_state(value, keep=keep)
        else:
            tensor = whole(value)  # one at a time, as they may not fit on a device together
            if keep:
                gathered[name] = tensor.cpu()
    return gathered


def share_of(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """Return this process's share of a whole tensor, split like the tensor `like` if that is sharded."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

"""FSDP2: training on a share of the weights (Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`).

With Accelerate's `fsdp_version: 2`, weights, gradients and the optimizer's moments are split over the processes, and
the weights of a block are gathered while it is computed. Only the training step runs on sharded weights. Validation,
pictures and exports take an unsharded copy, because processes differ in what they evaluate, and every forward pass on
sharded weights needs all of them.
"""

import copy
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

BLOCK = "Block"  # class name of the modules that FSDP wraps


def configure_sharding(accelerator, *, compiled: bool, auto_micro_batch: bool) -> list[str]:
    """Make FSDP2, if Accelerate runs it, compute what DDP would, and return error messages, one per problem.

    Args:
        compiled: --compile.
        auto_micro_batch: --micro_batch_size auto.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
            return []
        return [
            f"Accelerate is configured for FSDP and runs without it on {accelerator.device}; start it with `accelerate "
            "launch` on GPUs, or take a configuration without FSDP"
        ]
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return [f"Accelerate is configured for FSDP {plugin.fsdp_version}; only 2 works: set fsdp_version: 2"]

    from torch.distributed.checkpoint import HuggingFaceStorageWriter
    from torch.distributed.fsdp import CPUOffloadPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.mixed_precision_policy = None  # the loop autocasts: weights and residuals stay in float32
    plugin.cpu_ram_efficient_loading = False  # every process has the weights already
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, [BLOCK]

    errors = []
    if "save_distributed" not in inspect.signature(HuggingFaceStorageWriter).parameters:
        errors.append(f"torch {torch.__version__} is too old for checkpoints of FSDP2; install a newer one")
    settings = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing_offload": getattr(plugin, "activation_checkpointing_offload", False),
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        "parallelism_config": accelerator.parallelism_config is not None,
    }
    flags = {
        "--compile": compiled,
        "--mixed_precision fp16": accelerator.mixed_precision == "fp16",
        "--micro_batch_size auto": auto_micro_batch,  # which tries steps that are not sharded
    }
    errors += [f"Accelerate's {name} does not work here; leave it out" for name, on in settings.items() if on]
    return errors + [
        f"{name} does not work with FSDP2; leave it out, or run without FSDP" for name, on in flags.items() if on
    ]


def take_activation_checkpointing(accelerator) -> bool:
    """Turn off Accelerate's activation checkpointing, and return whether it was on.

    It would draw other random numbers when it recomputes; the blocks' own gradient checkpointing takes its place.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    on = plugin is not None and bool(plugin.activation_checkpointing)
    if on:
        plugin.activation_checkpointing = False
    return on


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
    # In torch 2.14 about outputs that are views, as those of every Linear; the loop changes none in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    plain = copy.deepcopy(model).to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, partial(_copy_weights, model, plain)


def _copy_weights(model: nn.Module, plain: nn.Module) -> nn.Module:
    target = plain.state_dict()
    for name, tensor in whole_tensors(model):
        target[name].copy_(tensor)
    return plain


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded. Every process must call it; no device waits."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and whole tensors of a model's state, one at a time. Every process must take all of them."""
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor.detach())


def is_sharded(model: nn.Module) -> bool:
    """Return True if each process has a share of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def share_of(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """Return this process's share of a whole tensor, split like the tensor `like` if that is sharded."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def write_moments(folder: Path, model: nn.Module, optimizer, group) -> None:
    """Write the optimizer's state into a new folder, as safetensors of torch.distributed.checkpoint.

    Tensors are named PARAMETER.KEY, and each process writes its share. Every process must call it; if one fails, all
    raise. `group` is the processes' group on the CPU, None for the default one.
    """
    import torch.distributed.checkpoint as checkpoint

    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{key}": value for parameter, kept in optimizer.state.items() for key, value in kept.items()
    }
    try:
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save(dict(sorted(tensors.items())), storage_writer=writer, process_group=group)
    except checkpoint.api.CheckpointException as error:  # which is no subclass of Exception
        raise next(iter(error.failures.values()))[0] from error


def read_moments(folder: Path, model: nn.Module, optimizer) -> dict[int, dict[str, torch.Tensor]]:
    """Return the state that `write_moments` wrote, by the parameters' numbers in the optimizer.

    The number of processes, and whether they shard, may differ from those that wrote it.
    """
    import torch.distributed.checkpoint as checkpoint

    reader, parameters = checkpoint.HuggingFaceStorageReader(str(folder)), dict(model.named_parameters())
    tensors = {}
    try:
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            parameter = parameters[name.rpartition(".")[0]]
            size = stored.size
            tensors[name] = torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about running in a single process
            checkpoint.load(tensors, storage_reader=reader)
    except checkpoint.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
    numbers = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {parameter: number for number, parameter in enumerate(numbers)}
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        moments.setdefault(numbers[parameters[parameter]], {})[key] = tensor
    return moments

"""FSDP2: training on a share of the weights (Zhao et al. 2023, "PyTorch FSDP"; torch's `fully_shard`).

Where Accelerate is configured with `fsdp_version: 2`, weights, gradients and the optimizer's moments are split over the
processes, and a block's weights are put together while it is computed. Only the training step runs on them. Whatever
else looks at the model (validation, pictures, exports) takes an unsharded copy, as processes differ in what they
evaluate, and sharded weights need all of them for every forward pass.
"""

import argparse
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

BLOCK = "Block"  # the module whose weights are put together at a time


def resolve_sharding(args: argparse.Namespace, accelerator) -> list[str]:
    """Makes FSDP2, where Accelerate runs it, compute what several whole copies would; what is wrong, a line each.

    Turns its activation checkpointing into --gradient_checkpointing, in `args` too.
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
    if plugin.activation_checkpointing:  # Accelerate's draws other random numbers when it computes again
        args.gradient_checkpointing, plugin.activation_checkpointing = True, False

    errors = []
    if "save_distributed" not in inspect.signature(HuggingFaceStorageWriter).parameters:
        errors.append(f"torch {torch.__version__} is too old for checkpoints of FSDP2; install a newer one")
    settings = {
        "fsdp_offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "fsdp_activation_checkpointing_offload": getattr(plugin, "activation_checkpointing_offload", False),
        "fsdp_ignored_modules": plugin.ignored_modules is not None,
        "parallelism_config": accelerator.parallelism_config is not None,
    }
    flags = {"--compile": args.compile, "--mixed_precision fp16": accelerator.mixed_precision == "fp16"}
    flags |= {"--micro_batch_size auto": args.micro_batch_size == "auto"}  # tries a step that is not sharded
    errors += [f"Accelerate's {name} does not work here; leave it out" for name, on in settings.items() if on]
    return errors + [
        f"{name} does not work with FSDP2; leave it out, or run without FSDP" for name, on in flags.items() if on
    ]


def prepare(accelerator, model: nn.Module, optimizer) -> tuple[nn.Module, torch.optim.Optimizer, Callable]:
    """What Accelerate makes of both, and `plain_model()`: the model as it was, neither wrapped nor sharded, with the
    weights that it has now. Every process must call that, and all get the same module each time."""
    if not accelerator.is_fsdp2:
        model, optimizer = accelerator.prepare(model, optimizer)
        plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # the loop says itself where it autocasts
        return model, optimizer, lambda: plain
    plain = copy.deepcopy(model).to(accelerator.device)
    model, optimizer = accelerator.prepare(model, optimizer)
    return model, optimizer, partial(_copy_weights, model, plain)


def _copy_weights(model: nn.Module, plain: nn.Module) -> nn.Module:
    target = plain.state_dict()
    for name, tensor in whole_tensors(model):
        target[name].copy_(tensor)
    return plain


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may have a share, put together. Every process must call it; no device waits."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and whole tensors of a model's state, one at a time. Every process must take all of them."""
    for name, tensor in model.state_dict().items():
        yield name, whole(tensor.detach())


def is_sharded(model: nn.Module) -> bool:
    """Whether processes have shares of the weights."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def share_of(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """This process's share of a whole tensor that is the same on all, split as `like` is where that is of its shape."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def write_moments(folder: Path, model: nn.Module, optimizer, group) -> None:
    """Writes what an optimizer keeps of each parameter, named PARAMETER.KEY, into a folder that is made: each process
    its share, as safetensors of torch.distributed.checkpoint. Every process must call it; where one fails, all raise.

    `group` is of processes and on the CPU, None for the default one.
    """
    import torch.distributed.checkpoint as checkpoint

    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{key}": value for parameter, kept in optimizer.state.items() for key, value in kept.items()
    }
    try:
        writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
        checkpoint.save(dict(sorted(tensors.items())), storage_writer=writer, process_group=group)
    except checkpoint.api.CheckpointException as error:  # no Exception
        raise next(iter(error.failures.values()))[0] from error


def read_moments(folder: Path, model: nn.Module, optimizer) -> dict[int, dict[str, torch.Tensor]]:
    """What `write_moments` wrote, by the parameters' numbers in the optimizer, however many processes wrote it and read
    it, sharded or not. Raises an Exception where that fails."""
    import torch.distributed.checkpoint as checkpoint

    reader, parameters = checkpoint.HuggingFaceStorageReader(str(folder)), dict(model.named_parameters())
    tensors = {}
    try:
        for name, stored in reader.read_metadata().state_dict_metadata.items():
            parameter = parameters[name.rpartition(".")[0]]
            size = stored.size
            tensors[name] = torch.zeros_like(parameter) if size == parameter.shape else torch.zeros(size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single process, that it is one
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

"""Tests of synchronized BatchNorm on two processes, against PyTorch's BatchNorm of the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import Start, finish_several
from torch import nn

from modeling.batch_norm import BatchNorm

CASES = [(torch.float32, None, 1e-6), (torch.float32, "aot_eager", 1e-6), (torch.bfloat16, None, 1e-2)]


def whole_batch():
    """Return a BatchNorm, a batch whose halves and channels differ, and the gradient of its output."""
    generator = torch.Generator().manual_seed(0)
    maps, grad = torch.randn(2, 6, 5, 4, 3, generator=generator)
    maps = maps * torch.linspace(0.1, 3, 5)[:, None, None] + torch.linspace(-1, 1, 6)[:, None, None, None]
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 5))
        norm.bias.copy_(torch.linspace(-1, 1, 5))
    return norm, maps, grad


def work(rank, folder):
    """Run the process of this rank: write the results from its half of the batch, in all cases."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([normalize_half(rank, dtype, backend) for dtype, backend, _ in CASES], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def normalize_half(rank, dtype, backend):
    """Return the output, gradients and state after a process has normalized its half."""
    plain, maps, grad = whole_batch()
    norm = BatchNorm(5)
    norm.load_state_dict(plain.state_dict())
    norm.synchronized = True
    if backend:
        norm.compile(fullgraph=True, dynamic=False, backend=backend)
    half = maps.chunk(2)[rank].to(dtype).requires_grad_()
    output = norm(half)
    output.backward(grad.chunk(2)[rank].to(dtype))
    grads = {name: parameter.grad for name, parameter in norm.named_parameters()}
    norm(1000 + maps.chunk(2)[rank].to(dtype))  # a mean far from zero must not make the variance inexact
    alone = norm.eval()(maps[:1]) if rank == 0 else None  # evaluation must not wait for the other process
    return dict(output=output, grad=half.grad, grads=grads, alone=alone, state=norm.state_dict())


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    code = "import sys; from test_batch_norm import work; work(int(sys.argv[1]), sys.argv[2])"
    (folder / "work.py").write_text(code)
    finish_several([Start(folder / "work.py", rank, folder, cwd=folder) for rank in range(2)])
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_two_processes_normalize_as_one(ranks, number):
    (dtype, _, tolerance), halves = CASES[number], [results[number] for results in ranks]
    norm, maps, grad = whole_batch()
    norm, start = norm.double(), copy.deepcopy(norm.state_dict())
    maps = maps.to(dtype).double().requires_grad_()
    output = norm(maps)
    output.backward(grad.to(dtype).double())

    def close(found, expected, tolerance=tolerance):
        assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()

    close(torch.cat([half["output"] for half in halves]), output)
    close(torch.cat([half["grad"] for half in halves]), maps.grad)
    for name, parameter in norm.named_parameters():
        close(sum(half["grads"][name] for half in halves), parameter.grad)
    with torch.no_grad():
        norm(1000 + maps)
    for half in halves:
        assert half["output"].dtype == half["grad"].dtype == dtype
        assert {value.dtype for value in half["state"].values()} == {torch.float32, torch.int64}
        assert half["state"].keys() == start.keys() and half["state"]["num_batches_tracked"] == 2
        if dtype == torch.float32:
            for name in ("running_mean", "running_var"):
                close(half["state"][name], norm.state_dict()[name], 2e-5)
    if dtype == torch.float32:
        close(halves[0]["alone"], norm.eval()(maps[:1]), 1e-4)

from types import SimpleNamespace

import pytest
import torch

from training.launch import RunError
from training.memory import SHARE, available_memory, fit_micro_batch, fits_on_gpu, largest
from training.plan import BatchPlan, Memory, needed_memory


def test_the_largest_that_fits_is_found():
    for count in range(8):
        sizes = [3 * size for size in range(1, count + 1)]
        for limit in range(30):
            asked = []
            found = largest(sizes, lambda size, limit=limit, asked=asked: asked.append(size) or size <= limit)
            assert found == max([size for size in sizes if size <= limit], default=None)
            assert len(asked) <= 3


def test_memory_of_a_model():
    model = torch.nn.Linear(9, 10)

    def needed(*, half=False, processes=1, sharded=False, **options):
        precision = "bf16" if half else "no"
        accelerator = SimpleNamespace(mixed_precision=precision, num_processes=processes, is_fsdp2=sharded)
        return needed_memory(model, 5.0, accelerator, **options)

    assert needed() == Memory(16 * 100, 5.0)
    assert needed(half=True, processes=2, optimizer="lars", averaged=True) == Memory((4 + 2 + 4 + 4 + 4 + 4) * 100, 5.0)
    assert needed(processes=4, sharded=True) == Memory((16 / 4 + 4) * 100, 5.0)
    model.weight.requires_grad = False
    assert needed().fixed == 4 * 100 + 12 * 10


def test_what_is_free_is_what_a_control_group_allows(tmp_path):
    own, group = tmp_path / "own", tmp_path / "groups" / "job_7" / "step_0"
    group.mkdir(parents=True)
    own.write_text("0::/job_7/step_0\n")
    free = available_memory(tmp_path / "groups", own)
    assert free > 10**6
    for folder, limit in ((group, "max"), (group.parent, "5000000")):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text("4000000\n")
    assert available_memory(tmp_path / "groups", own) == 10**6
    (group.parent / "memory.stat").write_text("anon 1000\nfile 9\ninactive_file 2000000\nactive_file 1500000\n")
    assert available_memory(tmp_path / "groups", own) == 4_500_000  # what caches files is given up
    (group / "memory.max").write_text("3000000\n")
    assert available_memory(tmp_path / "groups", own) == 0
    assert available_memory(tmp_path, tmp_path / "missing") > 10**6


@pytest.mark.parametrize(
    "room, held, expected",  # images that fit; the checkpoint's micro-batch
    [(100, None, 24), (24, None, 24), (23, None, 12), (7, None, 6), (5, None, 4), (2, None, 2), (100, 6, 6), (4, 6, 4)],
)
def test_the_global_batch_is_kept_in_micro_batches_that_fit(monkeypatch, room, held, expected):
    memory = Memory(1000.0, 10.0)
    monkeypatch.setattr("training.memory.available_memory", lambda: (1000 + 10 * room) / SHARE + 1)
    accelerator, crew = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(any=lambda here: here)
    options = dict(allowed=lambda size: size % 2 == 0, held=held, accelerator=accelerator, crew=crew)
    plan = fit_micro_batch(BatchPlan(48, 24, 24), memory, None, **options)
    assert plan == BatchPlan(48, 24, expected) and plan.accumulation == 24 // expected


def test_what_does_not_fit_at_all_is_told(monkeypatch):
    monkeypatch.setattr("training.memory.available_memory", lambda: 10**9)
    accelerator, crew = SimpleNamespace(device=torch.device("cpu")), SimpleNamespace(any=lambda here: here)
    options = dict(allowed=lambda size: size > 1, held=None, accelerator=accelerator, crew=crew)
    with pytest.raises(
        RunError, match="a micro-batch of 2 does not fit into memory: it takes about 3 GB a process; give"
    ):
        fit_micro_batch(BatchPlan(8, 8, 8), Memory(2e9, 5e8), None, **options)


def test_a_trial_that_wants_too_much_does_not_fit():
    """torch tells a want of memory by an exception of its own; any other one is an error of the run."""

    def step(size):
        if size > 4:
            raise torch.OutOfMemoryError("no room")
        if size == 3:
            raise ValueError("something else")

    cpu = torch.device("cpu")
    assert fits_on_gpu(step, 4, cpu) and not fits_on_gpu(step, 5, cpu)
    with pytest.raises(ValueError):
        fits_on_gpu(step, 3, cpu)

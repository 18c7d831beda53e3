from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from training.launch import RunError
from training.memory import check_memory, fit_micro_batch


def fit(sizes, limit, *, elsewhere=100):
    """Return the size that is chosen if `limit` images fit here and `elsewhere` on another process, and all trials."""
    trials = []

    def step(size):
        trials.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("no room")

    def any_process(here):
        return here or trials[-1] > elsewhere

    return fit_micro_batch(sizes, step, device=torch.device("cpu"), any_process=any_process), trials


@pytest.mark.parametrize("count", range(1, 9))
def test_the_largest_size_that_fits(count):
    sizes = [3 * size for size in range(1, count + 1)]
    for limit in range(3, 30):
        micro, trials = fit(sizes, limit)
        assert micro == max(size for size in sizes if size <= limit)
        assert trials[0] == sizes[-1] and len(trials) == len({*trials})
    with pytest.raises(RunError, match="a micro-batch of 3 does not fit on the GPU; give --gradient_checkpointing"):
        fit(sizes, 2)


def test_the_process_with_the_least_memory_decides():
    assert fit([1, 2, 4, 8], 100, elsewhere=5)[0] == fit([1, 2, 4, 8], 5)[0] == 4


def test_the_peak_memory_of_the_trials_is_forgotten(monkeypatch):
    calls, device = [], torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1000))
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments, name=name: calls.append((name, *arguments)))

    def step(size):
        calls.append(size)
        if size > 2:
            raise torch.OutOfMemoryError("no room")

    with FakeTensorMode():
        assert fit_micro_batch([1, 2, 4], step, device=device, any_process=bool) == 2
    end = [("empty_cache",), ("reset_peak_memory_stats", device)]
    assert calls == [4, *end, 2, *end]


def test_memory_that_the_machine_lacks(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    check_memory("--cache_features", 1000)
    expected = (
        r"--cache_features needs 1e.15 GB of memory in each of 4 processes of this machine, .* free; leave it out"
    )
    with pytest.raises(RunError, match=expected):
        check_memory("--cache_features", 10**24)

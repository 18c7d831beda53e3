"""What the processes of a run agree on: that a signal asks them to stop, and whatever one of them found."""

import signal

import torch
import torch.distributed as dist


class Crew:
    """The processes of a run, of which each notes SIGTERM, SIGUSR1 and Ctrl-C; the loop asks once a step.

    Several agree by one integer over a group on the CPU, so that the device is never waited for. A second Ctrl-C ends
    its process at once.
    """

    def __init__(self):
        self.signal_name: str | None = None
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._note)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None

    def _note(self, number: int, frame) -> None:
        self.signal_name = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def wanted(self) -> bool:
        """Whether any process was asked to stop."""
        return self.any(self.signal_name is not None)

    def any(self, here: bool) -> bool:
        """Whether `here` is true on any process. Every process must ask."""
        if self.group is None:
            return here
        value = torch.tensor(int(here))
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return bool(value)

    def gather(self, here: list) -> list:
        """The lists of all processes, joined. Every process must ask."""
        if self.group is None:
            return here
        parts: list[list] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, here, group=self.group)
        return [item for part in parts for item in part]

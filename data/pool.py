"""Worker processes that share a task, and end with the process that they work for."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor


@contextlib.contextmanager
def mapping(processes: int) -> Iterator:
    """A `map` over so many worker processes, in order; the usual one for one process."""
    if processes <= 1:
        yield map
        return
    with ProcessPoolExecutor(processes, initializer=watch_parent) as pool:
        yield pool.map


def watch_parent() -> None:
    """Ends this worker process, from a thread of its own, when the main one is gone, even killed: it would wait for
    work for ever."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()

"""Share work among worker processes that end with the process that started them."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial


@contextlib.contextmanager
def mapping(processes: int, chunk_size: int = 1) -> Iterator:
    """Yield a `map` over this many worker processes, which keeps the order; for one process the built-in `map`.

    A worker takes `chunk_size` items at a time.
    """
    if processes <= 1:
        yield map
        return
    with ProcessPoolExecutor(processes, initializer=watch_parent) as pool:
        yield partial(pool.map, chunksize=chunk_size)


def watch_parent() -> None:
    """End this worker process from a thread when the main process is gone, even killed, instead of waiting forever."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()

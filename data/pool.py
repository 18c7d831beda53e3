"""Run work in worker processes that end with the main process, and explain why loader workers fail."""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing.queues import Queue

from torch._utils import ExceptionWrapper

SHARED_MEMORY = "/dev/shm"  # where the workers of torch's loader put batches


class WorkerError(RuntimeError):
    """End the run because loader workers cannot work; the message is one line with the cause and the flag to change."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code  # training/launch.py recognizes this error by it


@contextlib.contextmanager
def mapping(processes: int, chunk_size: int = 1) -> Iterator:
    """Yield a function like `map` that runs in this many worker processes; for one process, yield `map` itself.

    Results come in order. A worker takes `chunk_size` items at a time.
    """
    if processes <= 1:
        yield map
        return
    with ProcessPoolExecutor(processes, initializer=watch_parent) as pool:
        yield partial(pool.map, chunksize=chunk_size)


def watch_parent() -> None:
    """Start a thread that ends this worker process when the main process ends, even if it is killed."""

    def end() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def report_unsent() -> None:
    """Make this loader worker send an error in place of a batch that cannot be sent.

    Python would drop the batch, and the main process would wait for it forever.
    """

    def send(queue: Queue, error: Exception, item: tuple) -> None:
        queue.put((item[0], ExceptionWrapper(where="in a loader worker")))

    Queue._on_queue_feeder_error = send


def check_shared_memory(batch_bytes: int, num_workers: int) -> None:
    """Raise WorkerError if the batches of all processes on this machine do not fit in shared memory.

    A worker prepares two batches ahead, for training and, while these wait, also for validation: four in all.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return
    per_worker = 4 * batch_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = shutil.disk_usage(SHARED_MEMORY).free
    if num_workers * per_worker > free:
        raise WorkerError(
            f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, and --num_workers {num_workers} needs "
            f"{num_workers * per_worker / 1e6:.0f} MB for batches of {batch_bytes / 1e6:.1f} MB; give --num_workers "
            f"{free // per_worker}, a smaller batch, or more room (docker run --shm-size)",
            exit_code=2,
        )


def guarded_batches(start: Callable[[], Iterator]) -> Iterator:
    """Start a loader's workers, and return an iterator over the batches.

    The iterator raises WorkerError if a worker dies or cannot send a batch. torch's handler of SIGCHLD is removed,
    as it raises anywhere in the main thread. A dead worker is noticed within five seconds of waiting for its batch.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    with _explaining([]):
        batches = start()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, handler)
    return _yield_batches(batches)


def _yield_batches(batches: Iterator) -> Iterator:
    workers = getattr(batches, "_workers", [])
    while True:
        with _explaining(workers):
            try:
                batch = next(batches)
            except StopIteration:
                return
        yield batch


@contextlib.contextmanager
def _explaining(workers: list) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        text = _explain(error, workers)
        if text is None:
            raise
        raise WorkerError(text) from error


def _explain(error: Exception, workers: list) -> str | None:
    """Return the reason why loader workers cannot work, and the remedy; None for errors of other kinds."""
    text, number = str(error), getattr(error, "errno", None)
    if "shared memory" not in text:
        time.sleep(0.1)  # a worker that was killed needs time to get its exit code
    dead = [worker.exitcode for worker in workers if worker.exitcode]
    if "AF_UNIX path too long" in text:
        return f"{tempfile.gettempdir()} is too long a path for the loader's sockets; set TMPDIR to a shorter one"
    if number == errno.EMFILE or "Too many open files" in text or "ancdata" in text:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"more than {limit} files are open, most of them batches; give fewer --num_workers, or ulimit -n 65536"
    if "shared memory" in text or -signal.SIGBUS in dead:
        free = shutil.disk_usage(SHARED_MEMORY).free / 1e6
        return (
            f"{SHARED_MEMORY} is too small for the loader's batches ({free:.0f} MB are free); give fewer --num_workers "
            "(0 needs none), a smaller batch, or more room (docker run --shm-size)"
        )
    if number in (errno.EAGAIN, errno.ENOMEM):
        return f"a loader worker cannot be started ({error.strerror}); give fewer --num_workers"
    if dead:
        cause = signal.Signals(-dead[0]).name if dead[0] < 0 else f"exit code {dead[0]}"
        cause += " (killed, as when memory runs out)" if dead[0] == -signal.SIGKILL else ""
        return f"a loader worker ended by {cause}; give fewer --num_workers or a smaller batch"
    return None

import os
import signal

import pytest

from training.stopping import Stopper


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_are_noted(name):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        stopper = Stopper()
        assert not stopper.wanted()
        os.kill(os.getpid(), getattr(signal, name))
        assert stopper.wanted() and stopper.signal_name == name
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_one_process_agrees_with_itself():
    stopper = Stopper()
    assert stopper.any(True) and not stopper.any(False) and stopper.gather([1, 2]) == [1, 2]

import os
import signal

import pytest

from training.processes import Crew


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_signals_are_noted(name):
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        crew = Crew()
        assert not crew.wanted()
        os.kill(os.getpid(), getattr(signal, name))
        assert crew.wanted() and crew.signal_name == name
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_one_process_agrees_with_itself():
    crew = Crew()
    assert crew.any(True) and not crew.any(False) and crew.gather([1, 2]) == [1, 2]

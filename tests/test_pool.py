import os
import time

import psutil
from conftest import ROOT, Start

from data.pool import mapping


def square(number):
    return number, os.getpid()


def test_several_processes_give_the_same_in_the_same_order():
    with mapping(1) as in_order:
        assert list(in_order(square, range(9))) == [(number, os.getpid()) for number in range(9)]
    with mapping(2) as in_order:
        found = list(in_order(square, range(9)))
    assert [number for number, _ in found] == [*range(9)] and os.getpid() not in {pid for _, pid in found}


def test_workers_end_with_a_process_that_is_killed(tmp_path):
    code = tmp_path / "code.py"
    code.write_text(
        f"import sys, time\nsys.path[0] = {str(ROOT)!r}\nfrom data.pool import mapping\n"
        "with mapping(3) as in_order:\n"
        "    list(in_order(abs, range(99)))\n"
        "    open('ready', 'w').close()\n"
        "    time.sleep(300)\n"
    )
    process = Start(code, cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 3
    process.kill()
    process.communicate(timeout=60)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive

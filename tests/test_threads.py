"""The threads of the compiled operators, and those of PyTorch beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from sparc_fast.ops.idle_threads import _missing

_cpu = pytest.importorskip("sparc_fast._cpu")


def selected(threads: int) -> Tensor:
    scores = torch.randn(256, 300, generator=torch.Generator().manual_seed(0))
    indices = torch.empty(256, 7, dtype=torch.int32)
    _cpu.topk_rows(indices, scores, 7, threads)
    return indices


def test_callers_at_once_share_the_threads_and_get_the_same() -> None:
    expected, results = selected(1), []
    callers = [threading.Thread(target=lambda: results.extend(selected(4) for _ in range(50))) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 200
    assert all(torch.equal(result, expected) for result in results)


FORKED = """
import os, torch, test_threads
expected = test_threads.selected(4)
child = os.fork()
if child == 0:
    os._exit(0 if all(torch.equal(test_threads.selected(4), expected) for _ in range(50)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_computes_as_its_parent_did() -> None:
    subprocess.run([sys.executable, "-c", FORKED], cwd=os.path.dirname(__file__), check=True, timeout=600)


@pytest.mark.parametrize(("cpus", "threads"), [(2, 2), (8, 8), (64, 32), (8, 16), (3, 2)])
def test_where_pytorch_uses_most_cpus_it_has_more_threads_than_cpus(cpus: int, threads: int) -> None:
    groups = _missing(cpus, threads)
    assert threads + groups * (threads - 1) > cpus
    assert groups == 0 or threads + (groups - 1) * (threads - 1) <= cpus


@pytest.mark.parametrize(("cpus", "threads"), [(64, 4), (8, 1), (1, 1)])
def test_few_threads_among_many_cpus_make_few_more(cpus: int, threads: int) -> None:
    assert _missing(cpus, threads) == (2 if threads > 1 else 0)


ASLEEP = """
import os, torch
torch.set_num_threads(len(os.sched_getaffinity(0)) + 1)
from sparc_fast.ops.idle_threads import GRAIN, _sleep
import threading
before, started = len(os.listdir("/proc/self/task")), threading.Event()
threading.Thread(target=_sleep, args=(torch.get_num_threads(), started), daemon=True).start()
started.wait()
assert len(os.listdir("/proc/self/task")) == before + torch.get_num_threads()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_a_thread_asleep_keeps_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", ASLEEP], check=True, timeout=600)

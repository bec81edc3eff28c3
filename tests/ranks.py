"""Processes of torch.distributed that run one function after another, each on all of them; a hang is a failure."""

from __future__ import annotations

import faulthandler
import io
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sparc_fast

Result = TypeVar("Result")
NEED_RANKS = [
    pytest.mark.distributed,
    pytest.mark.skipif(not dist.is_available(), reason="no torch.distributed"),
]
"""Marks of tests that need them."""
LOADED = [
    "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.tensor", "sparc_fast.cli", "sparc_fast.distributed",
    "sparc_fast.evaluate", "sparc_fast.ops.cpu", "sparc_fast.training", "pytest",
]  # fmt: skip


def context() -> Any:
    """Where they can be, processes are forked from one that has no threads and has loaded once what each needs."""
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    forking, here = mp.get_context("forkserver"), Path.cwd()
    forking.set_forkserver_preload(LOADED)
    os.chdir(Path(sparc_fast.__file__).parents[1])  # it finds first what is where it begins
    ensure_running()
    os.chdir(here)
    return forking


def in_fork(function: Callable[..., Result], *arguments: Any) -> Result:
    """What it returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        return pool.submit(function, *arguments).result()


class _Pickler(pickle.Pickler):
    """Tensors by their bytes, which take no file and no memory of their own."""

    def reducer_override(self, found: Any) -> Any:
        if not isinstance(found, torch.Tensor):
            return NotImplemented
        flat = found.detach().reshape(-1).contiguous()
        return _tensor, (bytearray(flat.view(torch.uint8).numpy()), found.dtype, found.shape)


def _tensor(numbers: bytearray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.frombuffer(numbers, dtype=dtype).view(shape) if numbers else torch.empty(shape, dtype=dtype)


def _send(pipe: Connection, told: Any) -> None:
    pickled = io.BytesIO()
    _Pickler(pickled).dump(told)
    pipe.send_bytes(pickled.getbuffer())


class Ranks:
    """P processes over gloo; ``ranks(function, *arguments, **named)`` gives what the function returned in each."""

    def __init__(self, n: int) -> None:
        self.n, self._stacks = n, Path(tempfile.mkdtemp())
        of_ranks = context()
        self._pipes, self._processes = [], []
        for rank in range(n):
            here, there = of_ranks.Pipe()
            process = of_ranks.Process(target=_serve, args=(rank, n, str(self._stacks), there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 600, **named: Any) -> list[Any]:
        for pipe in self._pipes:
            _send(pipe, (function, arguments, named))
        end, results = time.monotonic() + timeout, {}
        while len(results) < self.n and time.monotonic() < end:
            for rank, pipe in enumerate(self._pipes):
                if rank not in results and pipe.poll(0.01):
                    results[rank] = pipe.recv()
                    if results[rank][0]:  # the others may wait for it
                        end = min(end, time.monotonic() + 10)
        failed = "\n".join(f"rank {rank}: {error}" for rank, (error, _) in results.items() if error)
        if len(results) < self.n:
            late = [rank for rank in range(self.n) if rank not in results]
            words = f"ranks {late} have not returned from {function.__name__}\n{failed}\n{self.stacks()}"
            self.close()
            raise AssertionError(words)
        if failed:
            raise AssertionError(failed)
        return [results[rank][1] for rank in range(self.n)]

    def stacks(self) -> str:
        """Where every rank stands."""
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
        time.sleep(1)
        return "\n".join(f"rank {path.name}:\n{path.read_text()}" for path in sorted(self._stacks.glob("[0-9]*")))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def here() -> tuple[int, int]:
    """(the rank that this process is, how many there are)"""
    return dist.get_rank(), dist.get_world_size()


def own(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows, as evenly as can be."""
    rank, n = here()
    return x.tensor_split(n)[rank]


def _serve(rank: int, n: int, folder: str, pipe: Connection) -> None:
    faulthandler.register(signal.SIGUSR1, (Path(folder) / str(rank)).open("w"), all_threads=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=n)
    while True:
        try:
            function, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            _send(pipe, ("", function(*arguments, **named)))
        except Exception:
            _send(pipe, (traceback.format_exc(), None))

"""The machine that a plan is for: this one, measured, or another one, described."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sparc_fast.files import atomic_path

from . import process_memory
from .roofline import Roofline, measure_roofs, processor

GPU_OVERHEAD = 2**30
"""Bytes of a CUDA context, cuBLAS and compiled kernels: estimated, not measured."""


@dataclass(frozen=True)
class Machine:
    """What a run can have."""

    name: str
    device: str
    """"cpu" or "cuda"."""
    memory: int
    """Bytes: of the system, or of the GPU."""
    overhead: int
    """Bytes that are taken before there is a model."""
    host_overhead: int
    """The same of the process beside a GPU; on a CPU the same number."""
    threads: int
    roofs: Roofline | None = None
    """None: no time is told."""

    @classmethod
    def here(cls, device: str = "cpu", *, memory: int | None = None, roofs: Roofline | None = None) -> Machine:
        """This machine, with what it has now: takes a few seconds and 1 GiB, unless `roofs` are given.

        A "cuda" device that is not here must be described: `memory` and, for times, `roofs`.

        Raises:
            ValueError: there is no such device here and `memory` is not given.
        """
        overhead = int(process_memory.in_own_process("-c", _PRINT_OVERHEAD, str(torch.get_num_threads())))
        if device == "cpu":
            memory = memory or _free_memory()
            return cls(
                processor(), "cpu", memory, overhead, overhead, torch.get_num_threads(), roofs or measure_roofs()
            )
        name = "a CUDA device"
        if not device.startswith("cuda"):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:1 to plan for, got {device!r}")
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name(device)
            memory = memory or torch.cuda.mem_get_info(device)[0]
        if memory is None:
            raise ValueError(f"memory of the machine must be given for {device}, which is not here: --machine-memory")
        return cls(name, "cuda", memory, GPU_OVERHEAD, overhead, torch.get_num_threads(), roofs)

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """What `save` wrote; ValueError where the file is something else."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"roofs must be a file that describes a machine, but there is no file {path}")
        try:
            return _machine(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"roofs must describe a machine, as --save-roofs writes it, but {path}: {error}"
            ) from error

    def save(self, path: str | Path) -> None:
        """As JSON, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


_PRINT_OVERHEAD = """
import sys, torch
from sparc_fast.planning import process_memory
torch.set_num_threads(int(sys.argv[1]))
print(process_memory.after_training_steps())
"""


def _machine(content: Any) -> Machine:
    if not isinstance(content, Mapping) or set(content) != {f.name for f in fields(Machine)}:
        raise ValueError(f"expected {', '.join(f.name for f in fields(Machine))}")
    machine = Machine(**{**content, "roofs": Roofline(**content["roofs"]) if content["roofs"] is not None else None})
    numbers = [machine.memory, machine.overhead, machine.host_overhead, machine.threads]
    roofs = {} if machine.roofs is None else asdict(machine.roofs)
    rates = [rate for name, rate in roofs.items() if (name, rate) != ("gather", None)]
    if not all(isinstance(number, int) and number >= 0 for number in numbers) or machine.device not in ("cpu", "cuda"):
        raise ValueError("memory, overhead and threads must be integers >= 0, and device cpu or cuda")
    if not all(isinstance(rate, int | float) and rate > 0 for rate in rates):
        raise ValueError("roofs must be numbers > 0, in bytes and FLOP a second")
    return machine


def _free_memory() -> int:
    """What the system could give, and what this process holds: it ends before the run begins, or is the run's."""
    free = process_memory.available_bytes()
    if free is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return free + process_memory.resident("RssAnon")

"""What memory a process holds and held, and what the system could still give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import sparc_fast
from sparc_fast.ops.huge_pages import give_back_freed

ROOT = Path("/sys/fs/cgroup")


def available_bytes(root: Path = ROOT, groups: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the system could still give, within the limits of this process's control groups; None if it is not said."""
    lines = _lines("/proc/meminfo")
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    return min(free + _left_in_groups(root, groups), default=None)


def _left_in_groups(root: Path, groups: Path) -> list[int]:
    """Of each limit that holds for this process, what is left of it; file pages are given up for memory."""
    found = []
    for line in _lines(groups):
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            base, limit, usage, pages = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            pages = "total_inactive_file"
        else:
            continue
        folder = base / path.lstrip("/")
        # in a container the path may be the host's: what is visible from here is then at the base
        for group in {base, *(g for g in (folder, *folder.parents) if g.is_relative_to(base))}:
            most, used = _number(group / limit), _number(group / usage)
            if most is None or used is None:
                continue
            kept = next((int(s.split()[1]) for s in _lines(group / "memory.stat") if s.split()[0] == pages), 0)
            found.append(max(0, most - used + kept))
    return found


def resident(field: str) -> int:
    """VmRSS, now, RssAnon, the same without files, or VmHWM, the peak, in bytes; not on Linux always the peak."""
    for line in _lines("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> None:
    """VmHWM starts again from here."""
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def in_own_process(*arguments: str) -> str:
    """What a fresh Python with these arguments, which finds what this one finds, prints.

    Raises:
        RuntimeError: it failed; the message ends with what it said.
    """
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # from the installed package's own folder: `-m` puts the current one first, and a checkout there would shadow it
    folder = Path(sparc_fast.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments[:3])} failed: {done.stderr.strip()[-500:]}")
    return done.stdout


def after_training_steps() -> int:
    """Bytes resident once a small model has made two steps: the libraries, and threads that wait."""
    model = sparc_fast.SPARC({"a": 64, "b": 48}, n_latents=1024, k=16)
    optimizer = sparc_fast.SparcAdam(model)
    for _ in range(2):
        optimizer.step(torch.ones(64, 112, dtype=torch.float32, device="cpu"))
    del model, optimizer
    give_back_freed()
    return resident("VmRSS")


def _number(path: Path) -> int | None:
    """None where there is no such file, or "max" in it."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []

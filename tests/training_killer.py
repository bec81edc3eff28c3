"""Run training in processes that are killed again and again."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import torch
from training_runs import RUNS, config, files

import sparc_fast as sf
from sparc_fast.training import Trainer


def killed_run(name: str, folder: Path) -> list[tuple[str, int]]:
    """One of `RUNS`, by the children of this process, which has no threads: (where it died, status) of every session."""
    torch.set_num_threads(1)
    sf.SparcAdam(sf.SPARC({"a": 2}, 2, 1)).step(torch.ones(1, 2))  # what is loaded with the first step, loaded once
    chance, changes = random.Random(name), RUNS[name]
    # at certain places: a random step, a checkpoint written but not there, there but the old one not yet deleted
    places = ("step", "replace", "unlink", "step")
    ends = [(place, session(folder, changes, die=(place, chance.randint(2, 6)))) for place in places]
    while ends[-1][1] != 0:  # and at any time; ever later, so that it ends
        after = chance.uniform(0, 0.05 * 1.6 ** (len(ends) - len(places) + 1))
        ends.append(("time", session(folder, changes, after=after)))
    return ends


def session(
    folder: Path, changes: dict[str, Any], die: tuple[str, int] | None = None, after: float | None = None
) -> int:
    """The status of a process that trains: 0, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        train(folder, changes, die)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(folder: Path, changes: dict[str, Any], die: tuple[str, int] | None) -> None:
    status = 1
    try:
        with Trainer(config(**changes), folder, files=files()) as trainer:
            if die is not None:
                place, count = die
                owner, name = {
                    "step": (trainer, "_train_on"), "replace": (os, "replace"), "unlink": (Path, "unlink"),
                }[place]  # fmt: skip
                setattr(owner, name, killing(getattr(owner, name), count))
            trainer.run()
        status = 0
    finally:
        os._exit(status)


def killing(function, count):  # type: ignore[no-untyped-def]
    """The function, but the call number `count` is this process's last."""
    calls = 0

    def called(*args, **kwargs):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return called

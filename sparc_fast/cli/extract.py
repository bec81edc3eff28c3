"""Turn pictures and texts into features with models of your own choice: a folder that `--data` takes as it takes files.

The same command goes on where a stopped or killed one was. `sparc-fast extract emoji` does it for emoji, with data and
models from pip packages alone.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparc_fast.sizes import counted
from sparc_fast.training.progress import Bar, duration

if TYPE_CHECKING:
    from sparc_fast.extract import Extracted

__all__ = ["add_arguments", "run", "to_folder"]

EVERY = 10.0  # seconds from one line to the next


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to extract, where to, and what of the settings may be said here."""
    parser.add_argument("settings", metavar="extract.toml or emoji", help="the samples and the models, or the emoji")
    parser.add_argument("--out", type=Path, required=True, help="folder of the features; one that was begun goes on")
    parser.add_argument("--batch-size", type=int, help="items that go through a model together")
    parser.add_argument("--threads", type=int, help="that read pictures")
    parser.add_argument("--device", help="auto (a GPU where there is one), cpu, cuda or cuda:1")
    parser.add_argument("--progress", choices=("auto", "lines", "none"), default="auto", help="on standard error")


def run(arguments: argparse.Namespace) -> int:
    """Extract, and say what came of it."""
    if missing := [name for name, module in (("pillow", "PIL"), ("pyarrow", "pyarrow")) if find_spec(module) is None]:
        raise ImportError(f"extracting needs {' and '.join(missing)}: pip install 'sparc_fast[extract]'")
    flags = {name: getattr(arguments, name) for name in ("batch_size", "threads", "device")}
    changed = {name: value for name, value in flags.items() if value is not None}
    done = to_folder(arguments.settings, arguments.out, arguments.progress, **changed)
    if done is None:
        return 128 + signal.SIGINT
    left_out = f", {done.failed:,} left out ({done.folder / 'failed.jsonl'} says why)" if done.failed else ""
    print(f"{counted(done.items, 'item')}{left_out}; now: sparc-fast train --data {arguments.out} --out run …")
    return 0


def to_folder(settings: str, out: Path, how: str = "auto", **changed: Any) -> Extracted | None:
    """Extract, telling how far it is; None where somebody stopped it."""
    from sparc_fast import extract

    progress = _Progress(how)
    try:
        if settings == "emoji":
            return extract.extract_emoji(out, progress=progress, say=progress.say, **changed)
        extraction = extract.read_extraction(settings, **changed)
        return extract.extract(extraction, out, progress=progress, say=progress.say)
    except KeyboardInterrupt:
        progress.say(f"stopped; the same command goes on from what {out} has")
        return None
    finally:
        progress.close()


class _Progress:
    """A bar where there is a terminal and rich, else a line now and then."""

    def __init__(self, how: str) -> None:
        self._shown = how != "none"
        self._bar = Bar() if how == "auto" and sys.stderr.isatty() and find_spec("rich") is not None else None
        self._began: tuple[float, int] | None = None
        self._said = time.perf_counter()

    def __call__(self, done: int, total: int | None) -> None:
        now = time.perf_counter()
        if self._began is None:
            self._began = now, done
            if self._bar is not None:
                self._bar.start(done, total, 1)
        if self._bar is not None:
            self._bar.advance(done)
        elif now - self._said >= EVERY or (done == total and now - self._began[0] >= EVERY):
            self._said = now
            speed = (done - self._began[1]) / max(now - self._began[0], 1e-9)
            left = "" if total is None or not speed else f", {duration((total - done) / speed)} left"
            self.say(f"{done:,}{'' if total is None else f' of {total:,}'} items, {speed:,.0f} rows/s{left}")

    def say(self, words: str) -> None:
        if self._bar is not None:
            self._bar.say(words)
        elif self._shown:
            print(words, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

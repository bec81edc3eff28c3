"""What happened when: one line for every time somebody worked on a run."""

from __future__ import annotations

import json
import os
import platform
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sparc_fast.version import __version__


class Session:
    """Begun now; `end` adds it to sessions.jsonl. Times are kept apart from metrics.jsonl, which is repeatable."""

    def __init__(self, step: int, device: torch.device, backend: str) -> None:
        self._clock = time.perf_counter()
        self._step = step
        self._about: dict[str, Any] = {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "host": platform.node(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "backend": backend,
            "threads": torch.get_num_threads(),
            "process": os.getpid(),
            "sparc_fast": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "from_step": step,
        }

    def end(self, path: Path, step: int, batch_size: int, how: str) -> None:
        """How it ended: "finished", a signal's name, or an error's."""
        seconds = time.perf_counter() - self._clock
        rows = (step - self._step) * batch_size
        line = {**self._about, "to_step": step, "seconds": round(seconds, 3), "rows_per_second": round(rows / seconds)}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "ended": how}) + "\n")

"""What `sparc-fast plan --ranks` says a rank holds beside its share of weights and moments is what it takes."""

from __future__ import annotations

import gc
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import NEED_RANKS, Ranks

from sparc_fast.ops.huge_pages import give_back_freed
from sparc_fast.planning import Machine, Roofline, memory, plan
from sparc_fast.planning.process_memory import forget_peak, resident
from sparc_fast.training import Config, Trainer

pytestmark = [
    *NEED_RANKS,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc"),
]
MACHINE = Machine("a machine", "cpu", 2**36, 0, 0, 1, Roofline(copy=2e10, float32=1e11, bfloat16=4e11))
WIDTHS = (128, 64, 64)

RUNS: dict[str, dict[str, Any]] = {
    "many samples, few latents": {"n_latents": 2048, "k": 16, "batch_size": 16384, "calibrate": False},
    "few samples, many latents": {"n_latents": 65536, "k": 16, "batch_size": 64},
    "accumulated": {"n_latents": 12288, "k": 16, "batch_size": 8192, "accumulate": 2},
    "bfloat16, local": {
        "n_latents": 32768, "k": 16, "batch_size": 2048, "dtype": "bfloat16", "moments": "bfloat16", "selection": "local",
    },
    "BatchTopK": {"n_latents": 16384, "k": 8, "batch_size": 8192, "selection": "batch"},
}  # fmt: skip


def taken(settings: dict[str, Any], folder: str) -> int:
    """Bytes of a run's peak beyond what a rank holds once it has trained a tiny model."""
    tiny = {**settings, "n_latents": 64, "k": 4, "batch_size": 64, "accumulate": 1}
    for name, changes in (("tiny", tiny), ("run", settings)):
        gc.collect()
        give_back_freed()
        before = resident("VmRSS")
        forget_peak()
        with Trainer(Config(**changes), Path(folder) / name) as trainer:
            trainer.run()
        del trainer
    return resident("VmHWM") - before


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, random = tmp_path_factory.mktemp("streams"), np.random.default_rng(0)
    for s, width in enumerate(WIDTHS):
        np.save(folder / f"{s}.npy", random.standard_normal((34000, width), dtype=np.float32))
    return {f"stream{s}": str(folder / f"{s}.npy") for s in range(len(WIDTHS))}


@pytest.mark.parametrize("name", RUNS)
def test_the_peak_of_a_rank_is_within_15_percent_of_what_is_planned(
    name: str, streams: dict[str, str], tmp_path: Path
) -> None:
    settings = {"steps": 3, "auxk": 0, "lr": 1e-3, "memory": 2**28, **RUNS[name], "data": streams}
    found = plan(Config(**settings), machine=MACHINE, dead=1.0, ranks=2)
    with closing(Ranks(2)) as two:
        measured = two(taken, settings, str(tmp_path))
    for bytes in measured:
        assert found.peak == pytest.approx(bytes, rel=memory.ACCURACY), f"{found}"
        assert bytes > 2**27

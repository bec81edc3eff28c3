"""A model in several processes: DistributedDataParallel computes what one process would, and what cannot is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    meeting = tmp_path_factory.mktemp("replicas") / "meeting"
    commands = [
        [sys.executable, str(Path(__file__).with_name("replica.py")), str(rank), str(meeting)] for rank in (0, 1)
    ]
    processes = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    results = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), "\n".join(errors for _, errors in results)
    return [json.loads(printed.splitlines()[-1]) for printed, _ in results]


def test_gradients_and_dead_latents_are_those_of_all_samples(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["gradients differ by"] < 1e-6
        assert of_rank["silence"]


def test_a_calibration_in_one_process_reaches_all(found: list[dict[str, Any]]) -> None:
    assert [of_rank["calibrated"] for of_rank in found] == [True, True]


def test_the_fused_optimizer_refuses_to_train_replicas_apart(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        assert of_rank["step"].startswith("SparcAdam must run in one process, got 2")
        assert of_rank["wrapped"].startswith("model must be a SPARC, got DistributedDataParallel")

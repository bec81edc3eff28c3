"""`torchrun -m sparc_fast train`: one command for one process and many, killed and gone on with."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, redirect_stderr
from pathlib import Path

import pytest
import torch
from ranks import NEED_RANKS, Ranks
from training_runs import save_run

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.training import read_metrics

pytestmark = [*NEED_RANKS, pytest.mark.skipif(sys.platform != "linux", reason="no torchrun here")]
STEPS, EVERY = 120, 10


def start(folder: Path, out: str) -> subprocess.Popen[str]:
    """With two ranks, which are started again once."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", "-m", "sparc_fast", "train", str(folder / "train.json")]
    command += ["--out", str(folder / out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )


def process_of(rank: int, torchrun: int) -> int:
    """Of a rank, by the variables that its parent gave it."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun and f"RANK={rank}" in (path / "environ").read_text().split("\0"):
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


def command(folder: Path, out: str, *settings: str) -> int:
    return cli.main(["train", str(folder / "train.json"), "--out", str(folder / out), "--progress", "none", *settings])


def until_there(folder: Path, out: str) -> Iterator[None]:
    """While there is no checkpoint."""
    until = time.monotonic() + 600
    while not (folder / out / "checkpoints" / f"step-{EVERY:09d}").is_dir():
        assert time.monotonic() < until
        yield time.sleep(0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("torchrun")
    save_run(folder, 2000, steps=STEPS, checkpoint_every=EVERY, keep=1000)
    return folder


@pytest.fixture(scope="module")
def finished(folder: Path, two: Ranks) -> Path:
    """Of a run that nobody disturbed."""
    assert two(command, folder, "whole") == [0, 0]
    return folder / "whole"


@pytest.fixture(scope="module")
def restarted(folder: Path) -> tuple[str, str]:
    """What torchrun and the ranks that it started print and say, one of which was killed after the first checkpoint."""
    run = start(folder, "restarted")
    try:
        for _ in until_there(folder, "restarted"):
            assert run.poll() is None, run.communicate()
        os.kill(process_of(1, run.pid), signal.SIGKILL)
        printed, errors = run.communicate(timeout=600)
    finally:
        run.kill()
    assert run.returncode == 0, errors
    return printed, errors


def test_the_command_of_one_process_trains_on_several_and_speaks_once(folder: Path, restarted: tuple[str, str]) -> None:
    printed, _ = restarted
    assert printed.count("steps done") == 1
    assert f"{STEPS} steps done" in printed
    assert sf.SPARC.load(folder / "restarted" / "model.safetensors").W_enc.shape == (64, 500)


RULES = {
    "jumprelu": ("--selection", "jumprelu", "--matryoshka", "9", "30"),
    "private": ("--private", "a=12", "b=25", "--private-k", "2"),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_trains_on_several_processes_as_on_one(folder: Path, three: Ranks, rule: str) -> None:
    settings = *RULES[rule], "--steps", "20", "--support-dropout", "0"
    assert three(command, folder, f"{rule} of three", *settings) == [0, 0, 0]
    assert command(folder, rule, *settings) == 0
    model, expected = (sf.SPARC.load(folder / out / "model.safetensors") for out in (f"{rule} of three", rule))
    assert model.config() == expected.config()
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


def assert_same_bits(folder: Path, out: str) -> None:
    for name in ("model.safetensors", "metrics.jsonl"):
        assert (folder / out / name).read_bytes() == (folder / "whole" / name).read_bytes()


def killed(folder: Path, out: str) -> None:
    """Rank 0 is killed after the first checkpoint; the other writes down how the command ended."""

    def kill() -> None:
        for _ in until_there(folder, out):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    if torch.distributed.get_rank() == 0:
        threading.Thread(target=kill, daemon=True).start()
    with redirect_stderr(io.StringIO()) as errors:
        status = command(folder, out)
    (folder / "ended").write_text(f"{status} {errors.getvalue()}")


def test_a_killed_rank_ends_the_others_by_name_and_the_run_goes_on_to_the_same_bits(
    folder: Path, two: Ranks, finished: Path
) -> None:
    ended, until = folder / "ended", time.monotonic() + 600
    with closing(Ranks(2)) as some:
        with pytest.raises(EOFError):
            some(killed, folder, "killed")
        while not (ended.exists() and ended.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
    assert re.fullmatch(r"1 sparc-fast: rank 0 is gone, .*\n", ended.read_text())
    assert not (folder / "killed" / "model.safetensors").exists()
    assert two(command, folder, "killed") == [0, 0]
    assert read_metrics(folder / "killed" / "sessions.jsonl")[-1]["from_step"] >= EVERY
    assert_same_bits(folder, "killed")


def test_torchrun_starts_the_ranks_again_which_go_on_to_the_same_bits(
    folder: Path, restarted: tuple[str, str], finished: Path
) -> None:
    _, errors = restarted
    assert re.search(r"rank 1 is gone|local_rank: 1\b", errors), errors
    session = read_metrics(folder / "restarted" / "sessions.jsonl")[-1]
    assert session["from_step"] >= EVERY
    assert session["ended"] == "finished"
    assert_same_bits(folder, "restarted")

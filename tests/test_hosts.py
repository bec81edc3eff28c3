"""Two hosts, which are network namespaces joined by a cable: replicas of the latents, and what a lost host means."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks
from training_runs import rows

import sparc_fast as sf
from sparc_fast import cli

MAY = sys.platform == "linux" and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (MAY and torch.distributed.is_available()) and os.environ.get("SPARC_FAST_TEST_HOSTS") != "required",
        reason="network namespaces need root and iproute2",
    ),
]
SETTINGS = """
n_latents = 65
k = 3
auxk = 8
dead_after = 400
steps = 60
batch_size = 33
lr = 1e-2
checkpoint_every = 20
calibration_rows = 500
device = "cpu"
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[str]]:
    """Two namespaces with an address each, 10.213.0.1 and .2, and nothing else between them."""
    names = [f"sparc{os.getpid()}-{host}" for host in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for host, name in enumerate(names):
            ip("-n", name, "address", "add", f"10.213.0.{host + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    for name, part in rows(1000).items():
        np.save(folder / f"{name}.npy", part.numpy())
    (folder / "train.toml").write_text(f"{SETTINGS}\n[data]\na = 'a.npy'\nb = 'b.npy'\n")
    return folder


def start(folder: Path, host: int, namespace: str, out: str, *settings: str) -> subprocess.Popen[str]:
    command = ["ip", "netns", "exec", namespace, sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", "2", "--node-rank", str(host), "--nproc-per-node", "2"]
    command += ["--master-addr", "10.213.0.1", "--master-port", "29517", "-m", "sparc_fast", "train"]
    command += [str(folder / "train.toml"), "--out", str(folder / out), *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=folder
    )


def test_two_hosts_with_a_replica_each_train_the_model_of_one_process(folder: Path, hosts: list[str]) -> None:
    runs = [start(folder, host, name, "replicas", "--replicas", "2") for host, name in enumerate(hosts)]
    try:
        ended = [run.communicate(timeout=600) for run in runs]
    finally:
        for run in runs:
            with run:  # which closes its pipes
                run.kill()
    assert [run.returncode for run in runs] == [0, 0], ended
    assert "".join(printed for printed, _ in ended).count("steps done") == 1
    assert cli.main(["train", str(folder / "train.toml"), "--out", str(folder / "alone")]) == 0
    model, expected = (sf.SPARC.load(folder / out / "model.safetensors") for out in ("replicas", "alone"))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


def enter_host(names: list[str], rank: int) -> None:
    """The network of the host that has this rank, two of them each."""
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/run/netns/{names[rank // 2]}") as network:
        assert libc.setns(network.fileno(), 0) == 0, os.strerror(ctypes.get_errno())


def train_on(folder: Path) -> None:
    """Until a host is gone, which ends the process; what the command says is written down."""
    command = ["train", str(folder / "train.toml"), "--out", str(folder / "cut"), "--progress", "none"]
    with (folder / f"said by {torch.distributed.get_rank()}").open("w", buffering=1) as errors, redirect_stderr(errors):
        os._exit(cli.main([*command, "--replicas", "2", "--steps", "1000000"]))


def test_a_host_that_is_gone_ends_the_other_by_name(folder: Path, hosts: list[str]) -> None:
    four, until = Ranks(4, partial(enter_host, hosts)), time.monotonic() + 600

    def cut() -> None:
        while not (folder / "cut" / "checkpoints" / "step-000000020").is_dir() and time.monotonic() < until:
            time.sleep(0.05)
        ip("-n", hosts[1], "link", "set", "cable", "down")
        for rank in (2, 3):
            four.kill(rank)

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        with pytest.raises(EOFError):
            four(train_on, folder)
        cutting.join()
        assert [four.status(rank) for rank in range(2)] == [1, 1]
    finally:
        four.close()
    said = [(folder / f"said by {rank}").read_text() for rank in range(2)]
    assert re.search("ranks? [23].* gone", "".join(said)), said

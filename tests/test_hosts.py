"""Two hosts, which are network namespaces joined by a cable: replicas of the latents, and what a lost host means."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import context
from training_runs import save_run

import sparc_fast as sf
from sparc_fast import cli
from sparc_fast.distributed import watch

MAY = sys.platform == "linux" and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("ip") is not None
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not (MAY and torch.distributed.is_available()) and os.environ.get("SPARC_FAST_TEST_HOSTS") != "required",
        reason="network namespaces need root and iproute2",
    ),
]


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
    save_run(folder, 1000, n_latents=65, batch_size=33)
    return folder


def train(rank: int, names: list[str], folder: Path, out: str, settings: Sequence[str], gone: float) -> None:
    """The command as torchrun starts it, on the host that has this rank, two of them each."""
    watch.GONE = gone
    libc, place = ctypes.CDLL(None, use_errno=True), divmod(rank, 2)
    with open(f"/run/netns/{names[place[0]]}") as network:
        assert libc.setns(network.fileno(), 0) == 0, os.strerror(ctypes.get_errno())
    of_torchrun = {"RANK": rank, "WORLD_SIZE": 4, "LOCAL_RANK": place[1], "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": place[0]}
    os.environ |= {name: str(number) for name, number in of_torchrun.items()}
    os.environ |= {"MASTER_ADDR": "10.213.0.1", "MASTER_PORT": "29517", "TORCHELASTIC_RUN_ID": "none"}
    os.environ["GLOO_SOCKET_IFNAME"] = "cable"
    torch.set_num_threads(1)
    with (folder / f"{out} of {rank}").open("w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
        os._exit(cli.main(["train", str(folder / "train.json"), "--out", str(folder / out), *settings]))


@pytest.fixture
def start(folder: Path, hosts: list[str]) -> Iterator[Callable[..., list[Any]]]:
    """Starts a run of four ranks, which are returned."""
    started = []

    def on_both(out: str, *settings: str, gone: float = watch.GONE) -> list[Any]:
        for rank in range(4):
            arguments = rank, hosts, folder, out, settings, gone
            started.append(context().Process(target=train, args=arguments, daemon=True))
            started[-1].start()
        return started

    yield on_both
    for rank in started:
        rank.kill()


def ended(ranks: list[Any]) -> list[int | None]:
    """With which status each exits."""
    for rank in ranks:
        rank.join(600)
    return [rank.exitcode for rank in ranks]


def test_two_hosts_with_a_replica_each_train_the_model_of_one_process(
    folder: Path, start: Callable[..., list[Any]]
) -> None:
    status = ended(start("replicas", "--replicas", "2"))
    said = [(folder / f"replicas of {rank}").read_text() for rank in range(4)]
    assert status == [0, 0, 0, 0], said
    assert "".join(said).count("steps done") == 1
    assert cli.main(["train", str(folder / "train.json"), "--out", str(folder / "alone")]) == 0
    model, expected = (sf.SPARC.load(folder / out / "model.safetensors") for out in ("replicas", "alone"))
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-2, atol=1e-3)


def test_a_host_that_is_gone_ends_the_other_by_name(
    folder: Path, hosts: list[str], start: Callable[..., list[Any]]
) -> None:
    ranks, until = start("cut", "--replicas", "2", "--steps", "1000000", gone=4.0), time.monotonic() + 600
    while not (folder / "cut" / "checkpoints" / "step-000000010").is_dir():
        assert time.monotonic() < until
        assert all(rank.is_alive() for rank in ranks)
        time.sleep(0.05)
    ip("-n", hosts[1], "link", "set", "cable", "down")
    for rank in ranks[2:]:
        rank.kill()
    # torchrun would end rank 1 upon the end of rank 0; without, it waits for rank 3, and rank 0 may end first
    assert ended(ranks[:2]) == [1, 1]
    for rank, names in ((0, "[23]"), (1, "[023]")):
        said = (folder / f"cut of {rank}").read_text()
        assert re.search(f"ranks? {names}.* gone", said), said

"""Mix-ups of host and device are seen without a GPU, and the tests that run on one hold there are two devices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from two_devices import DEVICE, HOST, two_devices

import sparc_fast as sf
from sparc_fast.benchmarks import checks
from sparc_fast.training.in_memory import train

ROOT = Path(__file__).parents[1]
# not those that take a second and more: runs of many steps, and what Triton's interpreter is slow at; nor processes of
# their own, in which there is one device
SLOW = [
    "hundred", "100_steps", "fifty", "thirty", "memory", "thread", "left_behind", "replaying", "schedule", "figures",
    "bit_for_bit", "bfloat16_moments", "alone", "long_rows", "no_rows_break", "without_a_proof", "misjudges", "bad_row",
    "cancellation", "wider_matrix", "halves", "equals_decoding", "narrow_weights", "takes_parts_too", "whole_step",
    "parts_without", "without_a_say", "moves_nothing", "about_k_latents", "puts_what_matters", "cannot_be_imported",
    "several_versions", "without_triton", "sixty", "steps_on_samples", "do_not_share", "of_their_own",
    "reads_nothing_on_the_host",
]  # fmt: skip
QUICK = " and ".join(f"not {word}" for word in SLOW)


@pytest.fixture
def x() -> Iterator[Tensor]:
    """A tensor of the device, which is the default while the test runs."""
    if os.environ.get("SPARC_FAST_TEST_DEVICE") == "two":
        yield torch.arange(4.0)
    else:
        with two_devices(), DEVICE:
            yield torch.arange(4.0)


class Doubled(torch.autograd.Function):
    """Its gradient comes from the host."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * torch.full((4,), 2.0, device="cpu")


MIX_UPS: dict[str, Callable[[Tensor], object]] = {
    "a sum of both": lambda x: x + x.cpu(),
    "a sum in place": lambda x: x.cpu().add_(x),
    "a number of the device on the host": lambda x: x.cpu() * x[1],
    "a number of the host changed by the device": lambda x: torch.tensor(1.0, device="cpu").add_(x[1]),
    "a view of what was copied": lambda x: x @ x.cpu().view(2, 2).t().flatten(),
    "a product": lambda x: torch.mm(x.view(2, 2), torch.ones(2, 2, device="cpu")),
    "a comparison": lambda x: torch.equal(x, x.cpu()),
    "a comparison of numbers": lambda x: torch.equal(x[0], x[0].cpu()),
    "a comparison with what a file holds": lambda x: torch.testing.assert_close(x, x.cpu()),
    "parts put together": lambda x: torch.cat([x, x.cpu()]),
    "indices of the device on the host": lambda x: x.cpu()[x.long()],
    "values of the host put on the device": lambda x: x.index_put_((x.long(),), x.cpu()),
    "rows chosen by the host": lambda x: x.index_select(0, x.cpu().long()),
    "a generator of the host": lambda x: torch.randn(4, generator=torch.Generator().manual_seed(0)),
    "a generator of the host in place": lambda x: x.normal_(generator=torch.Generator("cpu")),
    "a generator of the device": lambda x: torch.rand(4, generator=torch.Generator(DEVICE), device="cpu"),
    "NumPy": lambda x: x.numpy(),
    "NumPy by itself": lambda x: __import__("numpy").asarray(x),
    "what NumPy shares": lambda x: x + torch.from_numpy(x.cpu().numpy()),
    "a gradient": lambda x: Doubled.apply(x.requires_grad_()).sum().backward(),
    "a module that stayed": lambda x: torch.nn.Linear(4, 4, device="cpu")(x),
    "a module that was moved": lambda x: torch.nn.Linear(4, 4).cpu()(x),
}


@pytest.mark.parametrize("mix_up", MIX_UPS.values(), ids=MIX_UPS.keys())
def test_a_mix_up_raises(mix_up: Callable[[Tensor], object], x: Tensor) -> None:
    with pytest.raises((RuntimeError, TypeError, AssertionError), match=r"same device|generator|numpy|'device' do not"):
        mix_up(x)


def test_a_kernel_takes_no_tensor_of_the_host(x: Tensor) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled here")
    from sparc_fast.kernels.topk_rows import topk_rows

    assert topk_rows(x[None], 2).tolist() == [[2, 3]]
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        topk_rows(x[None].cpu(), 2)


def test_what_a_gpu_takes_is_taken(x: Tensor) -> None:
    host = x.cpu()
    assert (x.device, host.device, x.to(host).device, host.to(x).device) == (DEVICE, HOST, HOST, DEVICE)
    results = [
        x + 1, x * torch.tensor(2.0, device="cpu"), x[host.long()], x.index_put((host.long(),), x), x.copy_(host),
        torch.zeros_like(host, device=x.device), torch.as_tensor([1.0]), torch.tensor(1.0), x.new_tensor([1.0]),
        torch.rand(4, generator=torch.Generator(DEVICE)), torch.nn.Linear(4, 4)(x), x.detach().view(2, 2),
    ]  # fmt: skip
    assert {result.device for result in results} == {DEVICE}
    assert {result.device for result in (host + 1, host.new_zeros(2), torch.zeros(2, device="cpu"))} == {HOST}
    assert (x[1].item(), x.tolist(), x.cpu().numpy().sum(), bool(x[1] > 0)) == (1.0, [0.0, 1.0, 2.0, 3.0], 6.0, True)
    host.copy_(x + 1)
    x.requires_grad_()
    (x[host.long() - 1] ** 2).sum().backward()
    assert x.grad is not None
    assert x.grad.device == DEVICE
    assert torch.equal(x.grad, 2 * x)


def test_what_is_on_the_host_stays_there_when_what_it_was_copied_from_changes(x: Tensor) -> None:
    host, shared = x.cpu(), torch.as_tensor(x.cpu().numpy())
    x.zero_()
    assert host.tolist() == [0, 1, 2, 3]
    assert shared.device == DEVICE


@pytest.mark.parametrize("settings", [{}, {"lazy": "replay"}, {"moments": "bfloat16"}], ids=str)
def test_a_model_of_the_host_learns_the_same_whatever_the_default_device(settings: dict[str, str], x: Tensor) -> None:
    weights = []
    for default in (HOST, x.device):
        with torch.device(default):
            torch.manual_seed(0)
            model = sf.SPARC({"a": 6, "b": 3}, 20, 3, auxk=2, dead_after=1, device="cpu")
            optimizer = sf.SparcAdam(model, lr=1e-2, **settings)
            inputs = {name: torch.randn(40, width, device="cpu") for name, width in (("a", 6), ("b", 3))}
            for _ in range(3):
                optimizer.step(inputs)
            train(model, inputs, steps=2, batch_size=30, support_dropout=0.5)
            weights.append(model.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor), name


def test_what_is_saved_on_the_device_is_loaded_there(x: Tensor, tmp_path: Path) -> None:
    torch.save({"x": x, "host": x.cpu()}, tmp_path / "both.pt")
    found = torch.load(tmp_path / "both.pt")
    assert (found["x"].device, found["host"].device) == (DEVICE, HOST)
    assert torch.load(tmp_path / "both.pt", map_location="cpu")["x"].device == HOST


@pytest.mark.interpreter
@pytest.mark.long
@pytest.mark.skipif("SPARC_FAST_TEST_DEVICE" in os.environ, reason="this is such a run")
def test_one_of_each_test_that_runs_on_a_gpu_passes_on_two_devices() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--one-of-each", "-k", QUICK]
    environment = os.environ | {"SPARC_FAST_TEST_DEVICE": "two"}
    done = subprocess.run(
        [*command, __file__, *checks.test_files()], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]

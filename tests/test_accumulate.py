"""A step on the parts of a batch is the step on the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
import torch_adam
from operands import seeded
from ranks import in_fork
from torch import Tensor
from torch_adam import EVERY_MOMENTS, assert_same, streams_of

import sparc_fast as sf
from sparc_fast.batch import Inputs
from sparc_fast.benchmarks import memory
from sparc_fast.benchmarks.cases import MANY

EVERY_SELECTION = pytest.mark.parametrize("selection", ["global", "local"])
EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def make(
    backend: str, selection: str = "global", dtype: torch.dtype = torch.float32, lr: float = 1e-2, **options: object
) -> sf.SparcAdam:
    return sf.SparcAdam(torch_adam.make(backend, selection, dtype), lr=lr, **options)


def batches(steps: int, dtype: torch.dtype = torch.float32, N: int = 16) -> list[Tensor]:
    generator = seeded(1)
    mixing = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    draws = [torch.randn(N, 6, generator=generator, dtype=torch.float64) @ mixing for _ in range(steps)]
    for draw in draws:
        draw[3] = 0  # a zero row is a sample too
    return [draw.to(dtype) for draw in draws]


def assert_same_loss(loss: sf.SparcLoss, expected: sf.SparcLoss, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(tuple(loss), tuple(expected), rtol=rtol, atol=atol)


@pytest.mark.covering(2)
@EVERY_SELECTION
@pytest.mark.parametrize("sizes", [[16], [8, 8], [7, 0, 4, 5], [1] * 16], ids=str)
def test_thirty_steps_on_parts_equal_steps_on_whole_batches_with_auxk_at_work(
    selection: str, sizes: list[int], backend: str
) -> None:
    parted, whole = (make(backend, selection, torch.float64) for _ in range(2))
    used_auxk = 0
    for x in batches(30, torch.float64):
        loss, expected = parted.step(x.split(sizes)), whole.step(x)
        assert_same_loss(loss, expected)
        assert torch.equal(parted.model.silence, whole.model.silence)
        used_auxk += loss.auxk is not None
    assert 5 < used_auxk < 30
    assert_same(parted, whole, rtol=1e-7, atol=1e-9)


@pytest.mark.covering(2)
@EVERY_SELECTION
@EVERY_DTYPE
def test_one_step_on_parts_is_the_whole_step_in_every_dtype(selection: str, dtype: torch.dtype, backend: str) -> None:
    """From the same weights, moments and counters: what differs is the order of float32 sums."""
    parted, whole = (make(backend, selection, dtype) for _ in range(2))
    used_auxk = 0
    rtol, atol = (1e-9, 1e-12) if dtype == torch.float64 else (1e-4, 1e-5)
    for x in batches(25, dtype):
        parted.model.load_state_dict(whole.model.state_dict())
        parted.load_state_dict(whole.state_dict())
        loss, expected = parted.step(x.split(6)), whole.step(x)
        assert_same_loss(loss, expected, rtol, atol)
        used_auxk += loss.auxk is not None
        assert torch.equal(parted.model.silence, whole.model.silence)
        for name, p in whole.model.named_parameters():
            state = parted.state[parted.model.get_parameter(name)]
            for key, value in whole.state[p].items():
                torch.testing.assert_close(state[key], value, rtol=rtol, atol=atol)
    assert used_auxk > 3


@EVERY_SELECTION
def test_parts_without_some_streams_equal_the_whole_batch(selection: str, backend: str) -> None:
    parted, whole = (make(backend, selection, torch.float64) for _ in range(2))
    for i, x in enumerate(batches(20, torch.float64)):
        without = "abc"[i % 3] if i else ""
        loss = parted.step([streams_of(part, without) for part in x.split(5)])
        expected = whole.step(streams_of(x, without))
        assert_same_loss(loss, expected)
    assert_same(parted, whole, rtol=1e-7, atol=1e-9)


def test_streams_without_a_say_have_none_in_any_part(backend: str) -> None:
    parted, whole = (make(backend, dtype=torch.float64) for _ in range(2))
    for i, x in enumerate(batches(20, torch.float64)):
        settings = {"cross_loss_coef": i / 20, "auxk_coef": 0.1, "support_from": ["abc"[i % 3]]}
        loss, expected = parted.step(x.split(5), **settings), whole.step(x, **settings)
        assert_same_loss(loss, expected)
    assert_same(parted, whole, rtol=1e-7, atol=1e-9)


@EVERY_SELECTION
def test_a_capturable_step_takes_parts_too(selection: str, backend: str) -> None:
    rate = torch.tensor(1e-2, dtype=torch.float64)
    parted = make(backend, selection, torch.float64, lr=rate, capturable=True)
    whole = make(backend, selection, torch.float64)
    for x in batches(30, torch.float64):
        torch.testing.assert_close(parted.step(x.split(6)).total, whole.step(x).total, rtol=1e-9, atol=1e-12)
    for name, p in whole.model.named_parameters():
        torch.testing.assert_close(parted.model.get_parameter(name), p, rtol=1e-7, atol=1e-9)


@pytest.mark.covering(2)
@EVERY_SELECTION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EVERY_MOMENTS
def test_rows_that_no_part_uses_can_be_left_behind_bit_for_bit(
    selection: str, dtype: torch.dtype, moments: str, backend: str
) -> None:
    dense, lazy = (make(backend, selection, dtype, lazy=lazy, moments=moments) for lazy in (None, "replay"))
    left_behind = used_auxk = 0
    for i, x in enumerate(batches(40, dtype, N=6)):
        inputs = x if i % 4 == 3 else x.split(2)
        losses = [optimizer.step(inputs) for optimizer in (dense, lazy)]
        assert torch.equal(losses[0].total, losses[1].total)
        used_auxk += losses[0].auxk is not None
        left_behind += int((lazy._behind.last_step < len(lazy._behind.history)).sum())
    assert left_behind > 40 * 5
    assert used_auxk > 3
    assert_same(lazy, dense)


def test_steps_on_parts_are_the_same_bit_for_bit_whatever_the_number_of_threads(backend: str) -> None:
    generator = seeded(3)
    draws = [torch.randn(20, 600, generator=generator) for _ in range(3)]
    runs = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        try:
            torch.manual_seed(0)
            model = sf.SPARC({"a": 400, "b": 200}, 700, 4, backend=backend, auxk=4, dead_after=30)
            optimizer = sf.SparcAdam(model, lr=1e-2)
            losses = [optimizer.step(x.split(8)) for x in draws]
        finally:
            torch.set_num_threads(1)
        assert losses[-1].auxk is not None
        moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
        runs.append([*(loss.total for loss in losses), *model.state_dict().values(), *moments])
    for run in runs[1:]:
        assert all(torch.equal(got, expected) for got, expected in zip(run, runs[0], strict=True))


def test_bfloat16_moments_are_rounded_by_seed_and_train_as_on_whole_batches(backend: str) -> None:
    parted, again, other, whole = (make(backend, lr=1e-3, moments="bfloat16", seed=seed) for seed in (1, 1, 2, 1))
    for x in batches(20):
        losses = [each.step(x.split(5)).total for each in (parted, again, other)]
        torch.testing.assert_close(losses[0], whole.step(x).total, rtol=1e-3, atol=0)
        assert torch.equal(losses[0], losses[1])
    states = [each.state_dict()["state"][0]["exp_avg_sq"] for each in (parted, again, other)]
    assert states[0].dtype == torch.bfloat16
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_one_part_is_the_batch_itself(backend: str) -> None:
    parted, whole = make(backend), make(backend)
    for x in batches(5):
        assert torch.equal(parted.step([x]).total, whole.step(x).total)
    assert_same(parted, whole)


WRONG: list[tuple[Callable[[Tensor], list[Inputs]], str]] = [
    (lambda x: [], "inputs must be a batch, or parts of one, got no part"),
    (lambda x: [x, {"a": x[:, :12]}], r"inputs must hold the same streams in every part .*'c'\) and \('a',\)"),
    (lambda x: [x, x[:, 1:]], r"inputs must be \[..., D=24\], all streams side by side, got \[16, 23\]"),
    (lambda x: [x, x * torch.inf], "inputs.'a'. must be finite"),
]


@pytest.mark.parametrize(("parts", "message"), WRONG, ids=["no part", "other streams", "another width", "infinity"])
def test_a_step_that_one_part_spoils_changes_nothing(
    parts: Callable[[Tensor], list[Inputs]], message: str, backend: str
) -> None:
    optimizer, untouched = make(backend), make(backend)
    draws = batches(6)
    for x in draws[:5]:
        for each in (optimizer, untouched):
            each.step(x.split(4))
    with pytest.raises(ValueError, match=message):
        optimizer.step(parts(draws[5]))
    assert_same(optimizer, untouched)


def extra_bytes(name: str) -> int:
    torch.set_num_threads(1)
    return memory._measure(name, MANY[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets a process's peak memory")
def test_parts_take_less_memory_where_samples_are_far_more_than_latents() -> None:
    """Of the case's 150 MB of residuals' gradients an eighth is held at a time, and 10 MB of weights' gradients."""
    whole, parted = (in_fork(extra_bytes, name) for name in ("auto", "auto, 8 parts"))
    assert parted < 0.4 * whole

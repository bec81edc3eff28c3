"""SparcAdam(lazy="replay") is SparcAdam, bit for bit, whenever anybody looks."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from accuracy import assert_equal
from operands import CASES, move_rows, operands, operators_of, seeded

import sparc_fast as sf
from sparc_fast.ops import reference
from sparc_fast.ops.row_step import DecoderRows

WIDTHS = {"a": 12, "b": 7, "c": 5}
EVERY_SELECTION = pytest.mark.parametrize("selection", ["global", "local"])
EVERY_DTYPE = pytest.mark.parametrize(
    ("dtype", "moments"),
    [(dtype, "float32") for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
    + [(dtype, "bfloat16") for dtype in (torch.float32, torch.bfloat16, torch.float16)],
    ids=str,
)
EVERY_MOMENTS = pytest.mark.parametrize("moments", ["float32", "bfloat16"])


def pair(
    backend: str,
    selection: str = "global",
    dtype: torch.dtype = torch.float32,
    lr: float = 1e-2,
    moments: str = "float32",
    **kwargs: object,
) -> list[sf.SparcAdam]:
    """(dense, lazy), on models alike."""
    optimizers = []
    for lazy in (None, "replay"):
        torch.manual_seed(0)
        arguments = {"auxk": 4, "dead_after": 60, **kwargs}
        model = sf.SPARC(WIDTHS, 96, 3, selection=selection, backend=backend, dtype=dtype, **arguments)
        optimizers.append(sf.SparcAdam(model, lr=lr, lazy=lazy, moments=moments, seed=3))
    return optimizers


def batches(steps: int, N: int = 6, seed: int = 1) -> list[torch.Tensor]:
    generator = seeded(seed)
    mixing = torch.randn(6, 24, generator=generator)
    return [torch.randn(N, 6, generator=generator) @ mixing for _ in range(steps)]


def assert_same(dense: sf.SparcAdam, lazy: sf.SparcAdam) -> None:
    expected, got = dense.model.state_dict(), lazy.model.state_dict()
    assert all(torch.equal(got[name], expected[name]) for name in expected), "weights"
    states = [optimizer.state_dict()["state"] for optimizer in (dense, lazy)]
    for parameter, state in states[0].items():
        assert all(torch.equal(states[1][parameter][key], state[key]) for key in state), f"moments of {parameter}"


@pytest.mark.covering(2)
@EVERY_SELECTION
@EVERY_DTYPE
def test_training_with_auxk_and_a_schedule_is_that_of_the_dense_run(
    selection: str, dtype: torch.dtype, moments: str, backend: str
) -> None:
    optimizers = pair(backend, selection, dtype, moments=moments)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 60, eta_min=1e-4) for o in optimizers]
    used_auxk = left_behind = 0
    for x in batches(60):
        losses = [optimizer.step(x) for optimizer in optimizers]
        for scheduler in schedulers:
            scheduler.step()
        assert torch.equal(losses[0].total, losses[1].total)
        used_auxk += losses[1].auxk is not None
        left_behind += int((optimizers[1]._behind.last_step < optimizers[1]._behind.history.shape[0]).sum())
    assert used_auxk > 5
    assert left_behind > 60 * 20
    assert_same(*optimizers)


@EVERY_MOMENTS
def test_rows_left_behind_for_hundreds_of_steps_still_equal_the_dense_run(moments: str, backend: str) -> None:
    optimizers = pair(backend, auxk=0, moments=moments)
    used, others = batches(1)[0], batches(200, N=2, seed=2)
    for x in (used, *(sample + 9 for sample in others)):  # far from the first batch: its latents rest
        for optimizer in optimizers:
            optimizer.step(x)
    behind = optimizers[1]._behind
    assert ((behind.last_step > 0) & (behind.last_step < 100)).any()
    assert (behind.last_step == 0).any()
    assert_same(*optimizers)


def test_the_model_reads_rows_that_are_up_to_date_at_any_time(backend: str) -> None:
    dense, lazy = pair(backend)
    codes = dense.model.encode(batches(1)[0])
    for i, x in enumerate(batches(12)):
        dense.step(x)
        lazy.step(x)
        if i % 4 == 0:
            assert torch.equal(*(o.model.decode(codes, "a", "b") for o in (dense, lazy)))
        elif i % 4 == 1:
            assert torch.equal(*(o.model(x).recons["b", "c"] for o in (dense, lazy)))
        elif i % 4 == 2:
            assert torch.equal(*(o.model.loss(x).total for o in (dense, lazy)))
        else:
            lazy.catch_up()
            assert torch.equal(dense.model.W_dec, lazy.model.W_dec)
    assert_same(dense, lazy)


def test_batches_without_some_streams_equal_the_dense_run(backend: str) -> None:
    dense, lazy = pair(backend, "local")
    for i, x in enumerate(batches(15)):
        streams = dict(zip(WIDTHS, x.split(list(WIDTHS.values()), dim=1), strict=True))
        if i:
            del streams["abc"[i % 3]]
        assert torch.equal(dense.step(streams).total, lazy.step(streams).total)
    assert_same(dense, lazy)


@pytest.mark.covering(2)
@EVERY_MOMENTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_run_goes_on_as_the_dense_one(dtype: torch.dtype, moments: str, backend: str) -> None:
    dense, lazy = pair(backend, dtype=dtype, moments=moments)
    draws = batches(20)
    for x in draws[:10]:
        dense.step(x)
        lazy.step(x)
    _, resumed = pair(backend, dtype=dtype, moments=moments)
    state = copy.deepcopy(lazy.state_dict())
    resumed.model.load_state_dict(copy.deepcopy(lazy.model.state_dict()))
    resumed.load_state_dict(state)
    for x in draws[10:]:
        dense.step(x)
        resumed.step(x)
    assert_same(dense, resumed)


def test_weights_loaded_into_a_lazy_run_meet_moments_that_are_up_to_date(backend: str) -> None:
    dense, lazy = pair(backend)
    other = copy.deepcopy(dense.model.state_dict())
    for x in batches(5):
        dense.step(x)
        lazy.step(x)
    for optimizer in (dense, lazy):
        optimizer.model.load_state_dict(other)
    for x in batches(5, seed=3):
        dense.step(x)
        lazy.step(x)
    assert_same(dense, lazy)


@pytest.mark.covering(2)
@EVERY_MOMENTS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copy_of_a_model_or_of_an_optimizer_stands_on_its_own(duplicate: object, moments: str, backend: str) -> None:
    dense, lazy = pair(backend, moments=moments)
    for x in batches(5):
        dense.step(x)
        lazy.step(x)
    twin = duplicate(lazy)
    alone = duplicate(lazy.model)
    for x in batches(5, seed=3):
        twin.step(x)
    assert torch.equal(alone.W_dec, dense.model.W_dec)
    assert_same(dense, lazy)
    for x in batches(5, seed=3):
        dense.step(x)
    assert_same(dense, twin)


def test_a_second_optimizer_starts_from_rows_that_are_up_to_date(backend: str) -> None:
    dense, lazy = pair(backend)
    for x in batches(5):
        dense.step(x)
        lazy.step(x)
    sf.SparcAdam(lazy.model, lr=1e-2, lazy="replay")
    assert torch.equal(dense.model.W_dec, lazy.model.W_dec)


@EVERY_MOMENTS
def test_changed_betas_and_eps_are_replayed_as_they_were(moments: str, backend: str) -> None:
    dense, lazy = pair(backend, moments=moments)
    for i, x in enumerate(batches(15)):
        for optimizer in (dense, lazy):
            optimizer.param_groups[0].update(betas=(0.9 - 0.05 * (i // 5), 0.99), eps=10.0 ** -(6 + i // 5))
            optimizer.step(x)
    assert_same(dense, lazy)


@pytest.mark.covering(2)
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_replaying_equals_steps_without_entries(case: str, eps: float, moments: torch.dtype, backend: str) -> None:
    d_streams, _, L, _ = CASES[case]
    D, steps = sum(d_streams), 300 if moments == torch.float32 else 120
    operators = operators_of(backend)
    generator = seeded(0)
    W_dec = torch.randn(L, D, generator=generator)
    reference.normalize_rows(W_dec, d_streams)
    m = torch.randn(L, D, generator=generator) * 10.0 ** -torch.arange(L)[:, None].remainder(12)
    rows = [W_dec, m.to(moments), (m.square() + 1e-30).to(moments)]
    dense, lazy = ([tensor.clone() for tensor in rows] for _ in range(2))
    unused = [torch.zeros(L, D), torch.zeros(L, D).to(moments), torch.zeros(L, D).to(moments)]
    history = torch.tensor([(0.01 / t, 0.9, 0.999, eps) for t in range(1, steps + 1)], dtype=torch.float64)
    nobody = operands((d_streams, 0, L, 1), torch.float32)
    for t in range(1, steps + 1):
        rows = [unused[0], dense[0], *unused[1:], *dense[1:]]
        move_rows(operators, rows, nobody, lr=0.01 / t, eps=eps, step=t, seed=7)
    last_step = torch.zeros(L, dtype=torch.int64)
    half = history[: steps // 2]
    left_behind = DecoderRows(lazy[0], lazy[1:], d_streams, last_step)
    operators.replay_rows(left_behind, torch.arange(0, L, 2), half, seed=7)
    operators.replay_rows(left_behind, torch.arange(L), history, seed=7)
    assert_equal(lazy, dense)


def test_lazy_must_be_replay_or_nothing() -> None:
    with pytest.raises(ValueError, match='lazy must be None or "replay", got True'):
        sf.SparcAdam(sf.SPARC({"a": 3}, 4, 2), lazy=True)

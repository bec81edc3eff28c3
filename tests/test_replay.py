"""SparcAdam(lazy="replay") is SparcAdam, bit for bit, whenever anybody looks."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accuracy import assert_equal
from operands import CASES, move_rows, operands, operators_of, seeded
from torch import Tensor
from torch_adam import EVERY_MOMENTS, EVERY_RULE, KINDS, assert_same, batches, given, make, train

import sparc_fast as sf
from sparc_fast.ops import reference
from sparc_fast.ops.row_step import DecoderRows


def pair(
    backend: str, *rule: Any, moments: Any = "float32", freeze: Any = (), **options: Any
) -> tuple[sf.SparcAdam, sf.SparcAdam]:
    """(dense, lazy), on models alike, of whose many latents a batch uses few."""
    dense, lazy = (make(backend, *rule, **{"n_latents": 96, "k": 3, "dead_after": 30, **options}) for _ in range(2))
    settings: dict[str, Any] = {"lr": 1e-2, "moments": moments, "seed": 3, "freeze": freeze}
    return sf.SparcAdam(dense, **settings), sf.SparcAdam(lazy, **settings, lazy="replay")


@pytest.mark.covering(2)
@EVERY_RULE
@pytest.mark.parametrize("kind", ["plain", "private", "matryoshka"])
@pytest.mark.parametrize(
    ("dtype", "moments"),
    [(torch.float32, "float32"), (torch.float64, "float32"), (torch.float16, "float32"), (torch.float32, "bfloat16"),
     (torch.bfloat16, "bfloat16")], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("freeze", [(), "encoder", ("b",), ("a", "c")], ids=str)
@pytest.mark.parametrize("way", ["whole", "lacking samples", "lacking streams"])
def test_training_with_auxk_and_a_schedule_is_that_of_the_dense_run(
    selection: str, kind: str, dtype: torch.dtype, moments: str, freeze: Any, way: str, backend: str
) -> None:
    dense, lazy = pair(backend, selection, dtype, moments=moments, freeze=freeze, **KINDS[kind])
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 14, eta_min=1e-4) for o in (dense, lazy)]
    used_auxk = left_behind = 0
    for step, x in enumerate(batches(14, N=6)):
        samples, present = given(way, x, step)
        expected, loss = (optimizer.step(samples, present=present) for optimizer in (dense, lazy))
        for scheduler in schedulers:
            scheduler.step()
        assert torch.equal(loss.total, expected.total)
        used_auxk += loss.auxk is not None
        left_behind += int((lazy._behind.last_step < len(lazy._behind.history)).sum())
    assert used_auxk > 5
    assert left_behind > 14 * 20
    assert_same(lazy, dense)


@pytest.mark.parametrize(
    "read",
    [
        lambda model, x: model.decode(model.encode(x), "a", "b"),
        lambda model, x: model(x).recons["b", "c"],
        lambda model, x: model.loss(x).total,
        lambda model, x: model.W_dec,
        lambda model, x: dict(model.named_parameters())["W_dec"],
        lambda model, x: list(model.parameters())[1],
        lambda model, x: model.state_dict()["W_dec"],
        lambda model, x: copy.deepcopy(model).W_dec,
        lambda model, x: pickle.loads(pickle.dumps(model)).W_dec,
        lambda model, x: model.double().W_dec,
    ],
    ids=["decode", "forward", "loss", "W_dec", "named_parameters", "parameters", "state_dict", "copy", "pickle", "to"],
)
def test_whoever_reads_the_decoder_gets_rows_that_are_up_to_date(read: Callable[..., Tensor], backend: str) -> None:
    dense, lazy = pair(backend)
    for x in batches(3, N=6):
        train([x], dense, lazy)
        assert torch.equal(read(lazy.model, x), read(dense.model, x))
    assert_same(lazy, dense)


@EVERY_MOMENTS
def test_rows_left_behind_for_a_hundred_steps_still_equal_the_dense_run(moments: str, backend: str) -> None:
    optimizers = pair(backend, auxk=0, moments=moments)
    others = [sample + 9 for sample in batches(100, N=2, seed=2)]  # far from the first batch: its latents rest
    train([*batches(1, N=6), *others], *optimizers)
    behind = optimizers[1]._behind
    assert ((behind.last_step > 0) & (behind.last_step < 50)).any()
    assert (behind.last_step == 0).any()
    assert_same(*reversed(optimizers))


def test_weights_loaded_into_a_lazy_run_meet_moments_that_are_up_to_date(backend: str) -> None:
    dense, lazy = pair(backend)
    other = copy.deepcopy(dense.model.state_dict())
    train(batches(5), dense, lazy)
    for optimizer in (dense, lazy):
        optimizer.model.load_state_dict(other)
    train(batches(5, seed=3), dense, lazy)
    assert_same(lazy, dense)


def test_a_second_optimizer_starts_from_rows_that_are_up_to_date(backend: str) -> None:
    dense, lazy = pair(backend)
    train(batches(5), dense, lazy)
    sf.SparcAdam(lazy.model, lr=1e-2, lazy="replay")
    assert torch.equal(dense.model.W_dec, lazy.model.W_dec)


@EVERY_MOMENTS
def test_changed_betas_and_eps_are_replayed_as_they_were(moments: str, backend: str) -> None:
    dense, lazy = pair(backend, moments=moments)
    for i, x in enumerate(batches(15)):
        for optimizer in (dense, lazy):
            optimizer.param_groups[0].update(betas=(0.9 - 0.05 * (i // 5), 0.99), eps=10.0 ** -(6 + i // 5))
            optimizer.step(x)
    assert_same(lazy, dense)


@pytest.mark.covering(2)
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16], ids=str)
def test_replaying_equals_steps_without_entries(case: str, eps: float, moments: torch.dtype, backend: str) -> None:
    d_streams, _, L, _ = CASES[case]
    D, steps = sum(d_streams), 160 if moments == torch.float32 else 80
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

"""The loss by FVU over the batch: what is trained on is its definition, however the batch is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from operands import seeded
from torch_adam import WIDTHS, batches, make, streams_of
from training_runs import trained

import sparc_fast as sf


def model_of(backend: str = "auto", **options: Any) -> sf.SPARC:
    return make(backend, dtype=torch.float64, **{"loss": "fvu", **options})


def samples() -> torch.Tensor:
    """Not centred, and of very different norms."""
    (x,) = batches(1, torch.float64)
    return 3 + x * torch.rand(16, 1, generator=seeded(2), dtype=torch.float64) ** 4


def by_definition(model: sf.SPARC, x: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """[S, S]: FVU of each pair over the samples that have both, against the deviations of those that have the target."""
    present = torch.ones(len(x), 3, dtype=torch.bool) if present is None else present
    found, parts = torch.zeros(3, 3, dtype=torch.float64), list(streams_of(x).values())
    for n in range(len(x)):
        has = [name for s, name in enumerate(WIDTHS) if present[n, s]]
        recons = model({name: streams_of(x[n : n + 1])[name] for name in has}).recons
        for (source, target), recon in recons.items():
            if target in has:
                s, t = list(WIDTHS).index(source), list(WIDTHS).index(target)
                found[s, t] += (recon[0] - parts[t][n]).square().sum() / (present[:, s] & present[:, t]).sum()
    spread = [part[present[:, t]].var(0, correction=0).sum() for t, part in enumerate(parts)]
    return found.detach() / torch.stack(spread)


def test_the_loss_is_fvu_over_the_batch(backend: str) -> None:
    model, x = model_of(backend).eval(), samples()
    expected = by_definition(model, x)
    loss = model.loss(x, 0.5)
    torch.testing.assert_close(loss.nmse, expected)
    cross = expected[~torch.eye(3, dtype=torch.bool)].mean()
    torch.testing.assert_close(loss.total.detach(), expected.diagonal().mean() + 0.5 * cross)
    torch.testing.assert_close(model(x, 0.5).loss.total, loss.total)
    recons = model(x).recons
    torch.testing.assert_close(sf.fvu(recons["b", "a"], streams_of(x)["a"]).detach(), expected[1, 0])


def test_streams_that_samples_lack_are_in_no_error_and_no_deviation(backend: str) -> None:
    model, x = model_of(backend).eval(), samples()
    present = torch.rand(16, 3, generator=seeded(4)) < 0.6
    present[:, 0] |= ~present.any(1)
    torch.testing.assert_close(model.loss(x, present=present).nmse, by_definition(model, x, present))


def test_a_row_of_tiny_norm_rules_the_relative_error_and_not_fvu() -> None:
    x = samples() - 3
    x[0] *= 1e-6
    shares = {}
    for loss in ("nmse", "fvu"):
        model = model_of(loss=loss).eval()
        with torch.no_grad():
            model.pre_bias += 0.1  # what is said of every sample alike
        whole, rest = model.loss(x).self, model.loss(x[1:]).self
        shares[loss] = float((whole - rest * 15 / 16) / whole)
    assert shares["nmse"] > 0.99
    assert abs(shares["fvu"]) < 0.1


def test_a_stream_that_does_not_vary_in_a_batch_has_no_error() -> None:
    x = samples()
    x[:, 12:19] = 0.1
    loss = model_of().loss(x)
    assert float(loss.nmse[:, 1].abs().max()) == 0
    assert float(loss.nmse[:, 0].min()) > 0
    single = model_of().loss(x[:1])
    assert single.total.item() == 0


def test_a_model_keeps_its_loss_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    model = model_of()
    model.save(tmp_path / "model.safetensors")
    loaded, x = sf.SPARC.load(tmp_path / "model.safetensors"), samples()
    torch.testing.assert_close(loaded.loss(x).total, model.loss(x).total, rtol=0, atol=0)
    assert "loss" not in model_of(loss="nmse").config()
    with pytest.raises(ValueError, match='loss must be "nmse" or "fvu", got \'mse\''):
        model_of(loss="mse")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_trains_on_it(accumulate: int, tmp_path: Path) -> None:
    trainer = trained(tmp_path, loss="fvu", accumulate=accumulate)
    assert sf.SPARC.load(tmp_path / "model.safetensors").config()["loss"] == "fvu"
    assert trainer.best is not None

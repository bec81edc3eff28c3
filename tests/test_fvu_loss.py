"""The loss by FVU over the batch: what is trained on is its definition, however the batch is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from operands import seeded
from training_runs import trained

import sparc_fast as sf

WIDTHS = {"a": 12, "b": 7, "c": 5}


def make(backend: str = "auto", dtype: torch.dtype = torch.float64, **options: object) -> sf.SPARC:
    torch.manual_seed(0)
    settings = {"auxk": 4, "dead_after": 40, "loss": "fvu", **options}
    return sf.SPARC(WIDTHS, 48, 5, backend=backend, dtype=dtype, **settings)


def batches(steps: int) -> list[torch.Tensor]:
    generator = seeded(1)
    mixing = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    draws = [torch.randn(16, 6, generator=generator, dtype=torch.float64) @ mixing for _ in range(steps)]
    return [3 + draw * torch.rand(16, 1, generator=generator, dtype=torch.float64) ** 4 for draw in draws]


def split(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(WIDTHS, x.split(list(WIDTHS.values()), dim=1), strict=True))


def by_definition(model: sf.SPARC, x: torch.Tensor, present: torch.Tensor | None = None) -> torch.Tensor:
    """[S, S]: FVU of each pair over the samples that have both, against the deviations of those that have the target."""
    present = torch.ones(len(x), 3, dtype=torch.bool) if present is None else present
    found, parts = torch.zeros(3, 3, dtype=torch.float64), list(split(x).values())
    for n in range(len(x)):
        has = [name for s, name in enumerate(WIDTHS) if present[n, s]]
        recons = model({name: split(x[n : n + 1])[name] for name in has}).recons
        for (source, target), recon in recons.items():
            if target in has:
                s, t = list(WIDTHS).index(source), list(WIDTHS).index(target)
                found[s, t] += (recon[0] - parts[t][n]).square().sum() / (present[:, s] & present[:, t]).sum()
    spread = [part[present[:, t]].var(0, correction=0).sum() for t, part in enumerate(parts)]
    return found.detach() / torch.stack(spread)


def test_the_loss_is_fvu_over_the_batch(backend: str) -> None:
    model, x = make(backend).eval(), batches(1)[0]
    expected = by_definition(model, x)
    loss = model.loss(x, 0.5)
    torch.testing.assert_close(loss.nmse, expected)
    cross = expected[~torch.eye(3, dtype=torch.bool)].mean()
    torch.testing.assert_close(loss.total.detach(), expected.diagonal().mean() + 0.5 * cross)
    torch.testing.assert_close(model(x, 0.5).loss.total, loss.total)
    recons = model(x).recons
    torch.testing.assert_close(sf.fvu(recons["b", "a"], split(x)["a"]).detach(), expected[1, 0])


def test_streams_that_samples_lack_are_in_no_error_and_no_deviation(backend: str) -> None:
    model, x = make(backend).eval(), batches(1)[0]
    present = torch.rand(16, 3, generator=seeded(4)) < 0.6
    present[:, 0] |= ~present.any(1)
    torch.testing.assert_close(model.loss(x, present=present).nmse, by_definition(model, x, present))


@pytest.mark.parametrize("options", [{}, {"selection": "local"}, {"lazy": "replay"}], ids=str)
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_equal_torch_adam_in_one_piece_or_in_parts_with_auxk_at_work(
    parts: int, options: dict[str, str], backend: str
) -> None:
    lazy = options.get("lazy")
    ours, theirs = (make(backend, **{k: v for k, v in options.items() if k != "lazy"}) for _ in range(2))
    fused, adam = sf.SparcAdam(ours, lr=1e-2, lazy=lazy), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    used_auxk = 0
    for step, x in enumerate(batches(20)):
        present = None
        if step % 3 == 2:
            present = torch.rand(16, 3, generator=seeded(step)) < 0.6
            present[:, 0] |= ~present.any(1)
        has = present if parts == 1 or present is None else present.tensor_split(parts)
        loss = fused.step(x if parts == 1 else x.tensor_split(parts), present=has)
        adam.zero_grad()
        expected = theirs.loss(x, present=present)
        expected.total.backward()
        theirs.project_gradients_()
        adam.step()
        theirs.normalize_decoder_()
        torch.testing.assert_close(loss.total, expected.total.detach(), rtol=1e-9, atol=1e-12)
        used_auxk += loss.auxk is not None
    assert used_auxk > 5
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-7, atol=1e-9)


def test_a_row_of_tiny_norm_rules_the_relative_error_and_not_fvu() -> None:
    x = batches(1)[0] - 3
    x[0] *= 1e-6
    shares = {}
    for loss in ("nmse", "fvu"):
        model = make(loss=loss).eval()
        with torch.no_grad():
            model.pre_bias += 0.1  # what is said of every sample alike
        whole, rest = model.loss(x).self, model.loss(x[1:]).self
        shares[loss] = float((whole - rest * 15 / 16) / whole)
    assert shares["nmse"] > 0.99
    assert abs(shares["fvu"]) < 0.1


def test_a_stream_that_does_not_vary_in_a_batch_has_no_error() -> None:
    x = batches(1)[0]
    x[:, 12:19] = 0.1
    loss = make().loss(x)
    assert float(loss.nmse[:, 1].abs().max()) == 0
    assert float(loss.nmse[:, 0].min()) > 0
    single = make().loss(x[:1])
    assert single.total.item() == 0


def test_a_model_keeps_its_loss_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    model = make()
    model.save(tmp_path / "model.safetensors")
    loaded, x = sf.SPARC.load(tmp_path / "model.safetensors"), batches(1)[0]
    torch.testing.assert_close(loaded.loss(x).total, model.loss(x).total, rtol=0, atol=0)
    assert "loss" not in make(loss="nmse").config()
    with pytest.raises(ValueError, match='loss must be "nmse" or "fvu", got \'mse\''):
        make(loss="mse")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_run_trains_on_it(accumulate: int, tmp_path: Path) -> None:
    trainer = trained(tmp_path, loss="fvu", accumulate=accumulate)
    assert sf.SPARC.load(tmp_path / "model.safetensors").config()["loss"] == "fvu"
    assert trainer.best is not None

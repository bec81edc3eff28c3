"""The training loop: what it reaches, and that it is repeatable."""

from __future__ import annotations

import pytest
import torch
from operands import seeded

import sparc_fast as sf
from sparc_fast.training.in_memory import train


def planted(n: int = 400) -> dict[str, torch.Tensor]:
    """Two streams that see the same three of 12 concepts, each through directions of its own."""
    generator = seeded(0)
    concepts = torch.rand(n, 12, generator=generator).topk(3).indices
    on = torch.zeros(n, 12).scatter(1, concepts, 1.0)
    return {name: on @ torch.randn(12, width, generator=generator) for name, width in (("a", 20), ("b", 15))}


def trained(seed: int = 0, **kwargs: object) -> tuple[sf.SPARC, dict[str, list[float]]]:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 20, "b": 15}, 32, 3, dead_after=500)
    curves = train(model, planted(), **{"steps": 150, "batch_size": 64, "lr": 1e-2, "seed": seed, **kwargs})
    return model, curves


def test_training_learns_to_predict_one_stream_from_the_other() -> None:
    model, curves = trained()
    assert curves["self"][-1] < 0.5 * curves["self"][0]
    inputs = planted()
    unexplained = sf.fvu(model.translate({"a": inputs["a"]}, "a", "b"), inputs["b"])
    assert unexplained < 0.5
    assert not model.training


def test_the_same_seed_gives_the_same_model_and_another_seed_another() -> None:
    first, again, other = (trained(seed, steps=20, support_dropout=0.5)[0] for seed in (0, 0, 1))
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_curves_have_one_entry_a_point_and_no_cross_loss_where_none_is_trained() -> None:
    _, curves = trained(steps=40, curve_points=10)
    assert curves["step"] == list(range(4, 41, 4))
    assert {len(curve) for curve in curves.values()} == {10}
    assert "cross" not in trained(steps=5, cross_loss_coef=0.0)[1]


def test_every_sample_is_seen_once_an_epoch() -> None:
    inputs = planted(50)
    seen: list[torch.Tensor] = []

    class Watched(sf.SPARC):
        def _own_samples(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            samples = super()._own_samples(*args, **kwargs)
            seen.append(samples.x)
            return samples

    train(Watched({"a": 20, "b": 15}, 16, 2, auxk=0), inputs, steps=5, batch_size=20)
    rows = torch.cat(seen)
    expected = torch.cat(list(inputs.values()), 1)
    for epoch in (rows[:50], rows[50:]):
        assert torch.equal(epoch.unique(dim=0), expected.unique(dim=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps and batch_size must be >= 1, got 0 and 64"),
        ({"batch_size": 0}, "steps and batch_size must be >= 1, got 150 and 0"),
        ({"support_dropout": 1.0}, r"support_dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained(**arguments)


def test_training_needs_every_stream() -> None:
    with pytest.raises(ValueError, match="inputs must hold samples of every stream"):
        train(sf.SPARC({"a": 20, "b": 15}, 32, 3), {"a": torch.randn(5, 20)}, steps=1)

"""BatchTopK in models: the batch decides in training, a learned threshold elsewhere, as test_jumprelu shows too."""

from __future__ import annotations

import pytest
import torch
from operands import seeded
from torch import Tensor
from torch_adam import WIDTHS

import sparc_fast as sf

K = 4


def make(**arguments: object) -> sf.SPARC:
    torch.manual_seed(0)
    return sf.SPARC(WIDTHS, 64, K, selection="batch", **arguments)


def samples(n: int, seed: int = 1) -> dict[str, Tensor]:
    """Streams that see the same few of 20 concepts, some samples more than others, each in directions of its own."""
    g, of_concepts = (seeded(number) for number in (seed, 0))
    seen = torch.rand(n, 20, generator=g) * (torch.rand(n, 20, generator=g) < 0.2)
    seen[:, 0] += 0.1
    return {name: seen @ torch.randn(20, width, generator=of_concepts) for name, width in WIDTHS.items()}


def fired(model: sf.SPARC, inputs: dict[str, Tensor]) -> Tensor:
    return (model.encode(inputs).indices >= 0).sum(-1)


def test_in_training_a_batch_has_k_latents_a_sample_on_average_and_not_each() -> None:
    counts = fired(make(), samples(300, 2))
    assert counts.sum() == 300 * K
    assert counts.min() < K < counts.max()


def test_a_model_without_a_threshold_says_what_to_do() -> None:
    model = make().eval()
    with pytest.raises(ValueError, match=r"threshold for the streams \('a', 'b', 'c'\) .*learn_thresholds"):
        model.encode(samples(3))
    model.learn_thresholds({name: samples(64)[name] for name in ("a", "b")})
    assert fired(model, {"b": samples(9)["b"]}).shape == (9,)
    with pytest.raises(ValueError, match=r"threshold for the streams \('c',\)"):
        model.encode({"c": samples(3)["c"]})


def test_the_first_step_learns_a_threshold_of_every_set_of_streams() -> None:
    model = make()
    sf.SparcAdam(model).step(samples(64))
    assert (model.threshold[1:] > 0).all()
    assert model.threshold_count[1:].tolist() == [1] * 7


def test_forward_in_training_learns_the_thresholds_that_loss_learns() -> None:
    inputs, (model, other) = samples(64), (make() for _ in range(2))
    for _ in range(5):
        model(inputs)
        other.loss(inputs)
    assert int(model.threshold_count.min()) >= 1
    assert torch.equal(model.threshold, other.threshold)
    assert torch.equal(model.threshold_count, other.threshold_count)
    assert model.eval().encode(inputs).indices.shape[0] == 64


def test_a_stream_of_zeros_does_not_pull_a_threshold_below_zero() -> None:
    model = make()
    model.learn_thresholds({name: torch.zeros_like(x) for name, x in samples(64).items()})
    assert (model.threshold[1:] == 0).all()
    assert int(fired(model.eval(), {name: torch.zeros_like(x) for name, x in samples(5).items()}).sum()) == 0


def test_absent_streams_have_no_say_and_their_samples_are_a_batch_of_their_own() -> None:
    model, inputs = make(), samples(12)
    present = torch.ones(12, 3, dtype=torch.bool)
    present[5:, 1] = False
    codes = model.encode(inputs, present)
    assert (codes.indices[:5] >= 0).sum() == 5 * K
    assert (codes.indices[5:] >= 0).sum() == 7 * K
    model.eval().learn_thresholds(inputs)
    one = model.encode({"a": inputs["a"][5:], "c": inputs["c"][5:]})
    assert torch.equal(model.encode(inputs, present).indices[5:, : one.indices.shape[1]], one.indices)


def test_what_would_change_the_batch_is_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="inputs must be one batch"):
        sf.SparcAdam(model).step([samples(4), samples(4)])
    with pytest.raises(ValueError, match="capturable must be False"):
        sf.SparcAdam(model, capturable=True).step(samples(4))
    with pytest.raises(ValueError, match="more than 8 streams"):
        sf.SPARC({f"s{i}": 2 for i in range(9)}, 8, 2, selection="batch")

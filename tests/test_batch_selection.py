"""BatchTopK in models: the batch decides in training, a learned threshold elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from torch import Tensor

import sparc_fast as sf

WIDTHS = {"a": 12, "b": 7, "c": 5}
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


@pytest.fixture(scope="module")
def trained() -> sf.SPARC:
    model = make(auxk=8, dead_after=2000)
    optimizer = sf.SparcAdam(model, lr=3e-3)
    data = samples(4096)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for step in range(300):
        rows = slice(step % 16 * 256, step % 16 * 256 + 256)
        choosing = (("a",), None, ("b", "c"), ("c",), None)[step % 5]
        optimizer.step({name: x[rows] for name, x in data.items()}, support_from=choosing)
        decay.step()
    return model.eval()


def test_in_training_a_batch_has_k_latents_a_sample_on_average_and_not_each(trained: sf.SPARC) -> None:
    counts = fired(trained.train(), samples(300, 2))
    trained.eval()
    assert counts.sum() == 300 * K
    assert counts.min() < K < counts.max()


@pytest.mark.parametrize("streams", [("a", "b", "c"), ("a",), ("b", "c")])
def test_outside_training_about_k_latents_fire_whichever_streams_there_are(
    trained: sf.SPARC, streams: tuple[str, ...]
) -> None:
    inputs = {name: samples(4096)[name] for name in streams}
    assert float(fired(trained, inputs).float().mean()) == pytest.approx(K, rel=0.2)


def test_outside_training_a_sample_alone_is_what_it_is_in_a_batch(trained: sf.SPARC) -> None:
    inputs = samples(40, 3)
    whole = trained.encode(inputs)
    for n in range(40):
        one = trained.encode({name: x[n : n + 1] for name, x in inputs.items()})
        width = one.indices.shape[1]
        assert torch.equal(one.indices, whole.indices[n : n + 1, :width])
        assert torch.equal(one.values, whole.values[n : n + 1, :, :width])
        assert (whole.indices[n, width:] == -1).all()


def test_every_stream_decodes_better_than_before_training(trained: sf.SPARC) -> None:
    untrained = make()
    untrained.learn_thresholds(samples(256))
    inputs = samples(500, 1)
    before, after = (model.eval().loss(inputs).nmse for model in (untrained, trained))
    assert (after.diagonal() < before.diagonal()).all()


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


def test_a_stream_of_zeros_does_not_pull_a_threshold_below_zero() -> None:
    model = make()
    model.learn_thresholds({name: torch.zeros_like(x) for name, x in samples(64).items()})
    assert (model.threshold[1:] == 0).all()
    assert int(fired(model.eval(), {name: torch.zeros_like(x) for name, x in samples(5).items()}).sum()) == 0


def test_a_saved_model_is_not_read_back_as_another_rule(trained: sf.SPARC, tmp_path: Path) -> None:
    trained.save(tmp_path / "model.safetensors")
    read = sf.SPARC.load(tmp_path / "model.safetensors").eval()
    assert read.selection == "batch"
    for name in ("indices", "values"):
        assert torch.equal(*(getattr(model.encode(samples(50)), name) for model in (trained, read)))


def test_a_stream_more_keeps_the_thresholds_of_the_others(trained: sf.SPARC) -> None:
    wider = trained.with_stream("d", 3)
    assert torch.equal(wider.encode(samples(9)).values[:, :3], trained.encode(samples(9)).values)


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


@settings(max_examples=20, deadline=None)
@given(n=st.integers(0, 30), k=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_a_step_equals_torch_adam(n: int, k: int, seed: int) -> None:
    ours, theirs = (sf.SPARC(WIDTHS, 16, k, selection="batch", dtype=torch.float64, dead_after=9) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    adam, fused = torch.optim.Adam(theirs.parameters(), 1e-3), sf.SparcAdam(ours, 1e-3)
    for step in range(3):
        inputs = {name: x.double() for name, x in samples(n, seed + step).items()}
        adam.zero_grad()
        theirs.loss(inputs).total.backward()
        theirs.project_gradients_()
        adam.step()
        theirs.normalize_decoder_()
        fused.step(inputs)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-9, atol=1e-12, equal_nan=True)


def test_what_would_change_the_batch_is_refused() -> None:
    model = make()
    with pytest.raises(ValueError, match="inputs must be one batch"):
        sf.SparcAdam(model).step([samples(4), samples(4)])
    with pytest.raises(ValueError, match="capturable must be False"):
        sf.SparcAdam(model, capturable=True).step(samples(4))
    with pytest.raises(ValueError, match="more than 8 streams"):
        sf.SPARC({f"s{i}": 2 for i in range(9)}, 8, 2, selection="batch")

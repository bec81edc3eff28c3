"""JumpReLU in models: latents fire above thresholds of their own, in training as elsewhere, and k are aimed at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import fast_backends, seeded
from test_batch_selection import samples
from torch import Tensor
from torch_adam import KINDS, WIDTHS, TorchAdam, some_present

import sparc_fast as sf
from sparc_fast.selection.jumprelu import JumpReLU

K, L = 4, 64
RULES = ("jumprelu", "local_jumprelu")


def make(selection: str = "jumprelu", n_latents: int = L, k: int = K, **arguments: Any) -> sf.SPARC:
    torch.manual_seed(0)
    return sf.SPARC(WIDTHS, n_latents, k, selection=selection, **arguments)


def with_thresholds(model: sf.SPARC, inputs: dict[str, Tensor], seed: int = 0) -> sf.SPARC:
    """As after some training: each latent has its own."""
    model.learn_thresholds(inputs)
    with torch.no_grad():
        noise = torch.randn(model.latent_threshold.shape, generator=seeded(seed))
        model.latent_threshold.copy_(0.3 * float(model.threshold.max()) * noise / len(WIDTHS))
    return model


def fired(model: sf.SPARC, inputs: dict[str, Tensor]) -> Tensor:
    return (model.encode(inputs).indices >= 0).sum(-1).float()


class Step(torch.autograd.Function):
    """Whether a score is above a threshold, with the gradient by the threshold that the paper gives it."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(score - threshold)
        ctx.width = width
        return (score > threshold).to(score.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (above,) = ctx.saved_tensors
        return None, -((above.abs() < ctx.width / 2).to(grad) / ctx.width * grad).sum(0), None


def densely(
    model: sf.SPARC, inputs: dict[str, Tensor], choosing: tuple[str, ...], cross: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all samples, which have all these streams, and its gradients: every latent of every sample formed."""
    p = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    names, S = list(inputs), len(inputs)
    at = [list(WIDTHS).index(name) for name in names]
    columns = [slice(c.start, c.stop) for c in model._columns()]
    x = [inputs[name] for name in names]
    h = [
        (x[i] - p["pre_bias"][columns[s]]) @ p["W_enc"][:, columns[s]].T + p["latent_bias"][s] for i, s in enumerate(at)
    ]

    def fires(streams: tuple[str, ...]) -> Tensor:
        offset = model._all_thresholds().of(streams)
        threshold = sum(p["latent_threshold"][list(WIDTHS).index(name)] for name in streams)
        width = model.jumprelu.bandwidth * abs(float(threshold.detach().mean()) + offset)
        score = sum(h[names.index(name)] for name in streams)
        return Step.apply(score.detach() - offset, threshold, width)

    is_local = model.selection == "local_jumprelu"
    gates = [fires((name,)) for name in names] if is_local else [fires(choosing)] * S
    codes = [torch.relu(a) * gate for a, gate in zip(h, gates, strict=True)]
    total = 0
    for i in range(S):
        for j, t in enumerate(at):
            recon = codes[i] @ p["W_dec"][:, columns[t]] + p["pre_bias"][columns[t]]
            error = ((recon - x[j]).square().sum(1) / x[j].square().sum(1)).mean()
            total = total + error * (1 / S if i == j else cross / (S * (S - 1)))
    counts = gates if is_local else gates[:1]
    penalty = sum((gate.sum(1).mean() / model.k - 1) ** 2 for gate in counts) / len(counts)
    total = total + model.jumprelu.sparsity_coef * penalty
    total.backward()
    return total.detach(), {name: q.grad for name, q in p.items()}


@pytest.mark.parametrize(
    ("selection", "given", "choosing"),
    [
        ("jumprelu", "abc", "abc"), ("jumprelu", "abc", "b"), ("jumprelu", "abc", "ac"), ("jumprelu", "bc", "bc"),
        ("jumprelu", "a", "a"), ("local_jumprelu", "abc", "abc"), ("local_jumprelu", "ac", "ac"),
    ],
)  # fmt: skip
def test_gradients_equal_the_dense_straight_through_equations(
    selection: str, given: str, choosing: str, backend: str
) -> None:
    data = {name: x.double() for name, x in samples(40).items()}
    model = with_thresholds(make(selection, dtype=torch.float64, backend=backend, auxk=0), data).eval()
    inputs = {name: data[name] for name in given}
    support_from = None if selection == "local_jumprelu" else tuple(choosing)
    loss = model.loss(inputs, cross_loss_coef=0.7, support_from=support_from)
    loss.total.backward()
    expected, gradients = densely(model, inputs, tuple(choosing), 0.7)
    torch.testing.assert_close(loss.total.detach(), expected, rtol=1e-10, atol=1e-12)
    assert gradients["latent_threshold"].count_nonzero() > 5
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("selection", RULES)
@pytest.mark.parametrize("kind", ["plain", "private", "nested"])
def test_forward_trains_thresholds_as_loss_does(selection: str, kind: str, backend: str) -> None:
    more: dict[str, Any] = {"matryoshka": (10, 30)} if kind == "nested" else KINDS[kind]
    inputs = {name: 1 + x.double() for name, x in samples(24).items()}
    model, other = (make(selection, dtype=torch.float64, backend=backend, auxk=0, **more) for _ in range(2))
    for one in (model, other):
        one.calibrate(inputs)
    inputs["a"][3] = 0  # to a calibrated model it is absent
    for _ in range(2):  # as new, and once thresholds are apart
        found, expected = model(inputs, 0.7).loss, other.loss(inputs, 0.7)
        for part, of_loss in zip(found, expected, strict=True):
            torch.testing.assert_close(part, of_loss, rtol=1e-10, atol=1e-12)
        for one, loss in ((model, found), (other, expected)):
            one.zero_grad()
            loss.total.backward()
        assert model.latent_threshold.grad.count_nonzero() > 5
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-11)
        for b, c in zip(model.buffers(), other.buffers(), strict=True):
            assert torch.equal(b, c)
        for one in (model, other):
            with_thresholds(one, inputs)


@settings(max_examples=20, deadline=None)
@given(
    n=st.integers(0, 30), k=st.integers(1, 16), seed=st.integers(0, 2**31),
    selection=st.sampled_from(["batch", *RULES]), backend=st.sampled_from(fast_backends()),
)  # fmt: skip
def test_steps_on_any_number_of_samples_equal_torch_adam(
    n: int, k: int, seed: int, selection: str, backend: str
) -> None:
    ours, theirs = (
        make(selection, 16, k, dtype=torch.float64, dead_after=9, backend=backend, auxk=3) for _ in range(2)
    )
    adam, fused = TorchAdam(theirs), sf.SparcAdam(ours, 1e-2)
    for step in range(4):
        inputs = {name: x.double() for name, x in samples(n, seed + step).items()}
        present = some_present(n, seed + step)
        expected, loss = adam.step(inputs, present=present), fused.step(inputs, present=present)
        torch.testing.assert_close(loss.total, expected.total, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss.l0, expected.l0)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], rtol=1e-8, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("kind", ["private", "matryoshka"])
@pytest.mark.parametrize("selection", RULES)
def test_thresholds_are_of_latents_that_streams_share_and_trained_by_every_dictionary(
    selection: str, kind: str
) -> None:
    model = make(selection, auxk=0, dtype=torch.float64, **KINDS[kind])
    loss = model.loss({name: x.double() for name, x in samples(30).items()})
    loss.total.backward()
    assert float(loss.l0) == pytest.approx(K, rel=0.02)
    assert (model.latent_threshold.grad[:, model.n_shared :] == 0).all()
    assert model.latent_threshold.grad[:, : model.n_shared].count_nonzero() > 5
    if kind == "matryoshka":
        if selection == "jumprelu":
            penalty = model.jumprelu.sparsity_coef * (loss.l0 / K - 1) ** 2
            torch.testing.assert_close(loss.total.detach(), loss.prefixes.mean() + penalty)
        assert torch.equal(model.prefix(24).latent_threshold, model.latent_threshold[:, :24])


@pytest.fixture(scope="module", params=["batch", *RULES])
def trained(request: pytest.FixtureRequest) -> sf.SPARC:
    """By a rule under which latents fire above thresholds outside training."""
    model = make(request.param, auxk=8, dead_after=2000)
    data = samples(4096)
    model.calibrate(data)
    optimizer = sf.SparcAdam(model, lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for step in range(300):
        rows = slice(step % 16 * 256, step % 16 * 256 + 256)
        choosing = (("a",), None, ("b", "c"), ("c",), None)[step % 5] if request.param != "local_jumprelu" else None
        optimizer.step({name: x[rows] for name, x in data.items()}, support_from=choosing)
        decay.step()
    return model.eval()


@pytest.mark.parametrize("streams", [("a", "b", "c"), ("a",), ("b", "c")])
def test_about_k_latents_fire_whichever_streams_there_are(trained: sf.SPARC, streams: tuple[str, ...]) -> None:
    inputs = {name: samples(4096)[name] for name in streams}
    counts = fired(trained, inputs)
    assert float(counts.mean()) == pytest.approx(K, rel=0.25)
    assert counts.min() < K < counts.max()


def test_a_sample_alone_is_what_it_is_in_a_batch_bit_for_bit(trained: sf.SPARC) -> None:
    inputs = samples(40, 3)
    for mode in (False, True)[: 2 - (trained.selection == "batch")]:
        trained.train(mode)
        whole = trained.encode(inputs)
        for n in range(40):
            one = trained.encode({name: x[n : n + 1] for name, x in inputs.items()})
            width = one.indices.shape[-1]
            assert torch.equal(one.indices, whole.indices[n : n + 1, ..., :width])
            assert torch.equal(one.values, whole.values[n : n + 1, :, :width])
            assert (whole.indices[n, ..., width:] == -1).all()
    trained.eval()


def test_a_latent_fires_just_where_its_score_is_above_its_threshold(trained: sf.SPARC) -> None:
    model = sf.SPARC(WIDTHS, L, K, selection=trained.selection, dtype=torch.float64).eval()
    model.load_state_dict(trained.state_dict())
    inputs = {
        name: (x.double() - model.input_mean[cols]) / model.input_rms[s]
        for s, ((name, x), cols) in enumerate(zip(samples(50, 4).items(), model._columns(), strict=True))
    }
    h = [
        (x - model.pre_bias[cols]) @ model.W_enc[:, cols].T + bias
        for x, cols, bias in zip(inputs.values(), model._columns(), model.latent_bias, strict=True)
    ]
    if model.latent_threshold is not None:
        assert float(model.latent_threshold.detach().std()) > 0.02 * float(model.threshold.max())
        h = [score - threshold for score, threshold in zip(h, model.latent_threshold, strict=True)]
    offsets = model._all_thresholds()
    is_local = model.selection == "local_jumprelu"
    scores = (
        [a - offsets.of((name,)) for a, name in zip(h, WIDTHS, strict=True)]
        if is_local
        else [sum(h) - offsets.of(tuple(WIDTHS))]
    )
    expected = [[set(row.nonzero()[:, 0].tolist()) for row in score > 0] for score in scores]
    indices = model.encode({name: x.double() for name, x in samples(50, 4).items()}).indices
    indices = indices.transpose(0, 1) if is_local else indices[None]
    assert [[set(row.tolist()) - {-1} for row in rows] for rows in indices] == expected


def test_every_stream_decodes_better_than_before_training(trained: sf.SPARC) -> None:
    untrained = make(trained.selection)
    untrained.calibrate(samples(4096))
    untrained.learn_thresholds(samples(256))
    before, after = (model.eval().loss(samples(500, 1)).nmse for model in (untrained, trained))
    assert (after.diagonal() < before.diagonal()).all()


def test_what_is_in_the_band_below_a_threshold_is_in_no_code_and_fires_no_latent() -> None:
    data = samples(64)
    narrow, wide = (with_thresholds(make(bandwidth=b, auxk=0), data) for b in (1e-6, 3.0))
    losses = [model.loss(data) for model in (narrow, wide)]
    torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-6, atol=1e-6)
    assert torch.equal(losses[0].l0, losses[1].l0)
    assert torch.equal(narrow.silence, wide.silence)
    assert float(losses[1].l0) == float(fired(wide, data).mean())


def test_thresholds_follow_the_penalty_alone_where_nothing_is_reconstructed_better() -> None:
    data = samples(256)
    for k, sign in ((K // 2, 1), (2 * K, -1)):
        model = with_thresholds(make(auxk=0, sparsity_coef=1e6, bandwidth=0.5), data)
        model.k = k
        model.loss(data).total.backward()
        gradient = model.latent_threshold.grad
        assert gradient.count_nonzero() > 5
        assert (sign * gradient <= 0).all()  # Adam goes down: up where too many fire


def test_a_model_without_a_first_batch_says_what_to_do() -> None:
    model = make().eval()
    with pytest.raises(ValueError, match=r"threshold for the streams \('a', 'b', 'c'\) .*learn_thresholds"):
        model.encode(samples(3))
    local = make("local_jumprelu")
    local.learn_thresholds({"a": samples(64)["a"]})
    assert fired(local.eval(), {"a": samples(9)["a"]}).shape == (9, 1)
    with pytest.raises(ValueError, match=r"threshold for the streams \('b',\)"):
        local.encode({"b": samples(3)["b"]})


@pytest.mark.parametrize("selection", RULES)
def test_the_first_step_begins_with_k_latents_a_sample(selection: str) -> None:
    model = make(selection)
    assert float(sf.SparcAdam(model).step(samples(64)).l0) == pytest.approx(K, rel=0.02)


def test_a_saved_model_is_not_read_back_as_another_rule(trained: sf.SPARC, tmp_path: Path) -> None:
    trained.save(tmp_path / "model.safetensors")
    read = sf.SPARC.load(tmp_path / "model.safetensors").eval()
    assert (read.selection, read.jumprelu) == (trained.selection, trained.jumprelu)
    for name in ("indices", "values"):
        assert torch.equal(*(getattr(model.encode(samples(50)), name) for model in (trained, read)))


def test_a_stream_more_keeps_the_thresholds_of_the_others(trained: sf.SPARC) -> None:
    wider = trained.with_stream("d", 3)
    assert torch.equal(wider.encode(samples(9)).values[:, :3], trained.encode(samples(9)).values)
    inputs = {**samples(64), "d": torch.randn(64, 3)}
    loss = sf.SparcAdam(wider.train(), freeze=tuple(WIDTHS)).step(inputs)
    if trained.latent_threshold is not None:
        assert float(loss.l0) == pytest.approx(K, rel=0.5)
        assert torch.equal(wider.latent_threshold[:3], trained.latent_threshold)


def test_dead_latents_are_told_by_what_fires_and_auxk_reaches_those_below_their_threshold() -> None:
    data = samples(64)
    model = with_thresholds(make(auxk=8, dead_after=100), data)
    with torch.no_grad():
        model.latent_threshold[:, :5] = 1e3
    optimizer = sf.SparcAdam(model, 1e-3)
    before = model.W_enc.detach().clone()
    for _ in range(4):
        loss = optimizer.step(data)
    assert model.dead[:5].all()
    assert loss.auxk is not None
    assert (model.W_enc != before).any(1)[:5].any()
    assert (model.latent_threshold[:, :5] > 900).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="capturable must be False"):
        sf.SparcAdam(make(), capturable=True).step(samples(4))
    with pytest.raises(ValueError, match="support_from must be None under local selection"):
        make("local_jumprelu").loss(samples(9), support_from=("a",))
    with pytest.raises(
        ValueError, match=r"sparsity_coef must be >= 0 and bandwidth > 0, both finite, got 1\.0 and 0\.0"
    ):
        make(sparsity_coef=1.0, bandwidth=0.0)
    with pytest.raises(ValueError, match="more than 8 streams, got 9"):
        sf.SPARC({f"s{i}": 2 for i in range(9)}, 8, 2, selection="jumprelu")
    sf.SPARC({f"s{i}": 2 for i in range(9)}, 8, 2, selection="local_jumprelu")


def test_the_penalty_is_zero_at_k_and_grows_on_both_sides() -> None:
    rule = JumpReLU("jumprelu", 0.1, 2.0)
    for l0, expected in ((K, 0.0), (2 * K, 2.0), (K / 2, 0.5)):
        mean, penalty = rule.penalty(torch.tensor([l0 * 10.0]), torch.tensor([10.0]), K)
        assert (float(mean), float(penalty)) == (l0, expected)

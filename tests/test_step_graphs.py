"""Steps that are captured and replayed are the steps that would have been made one call at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from operands import seeded
from torch import Tensor

import sparc_fast as sf
from sparc_fast.optim import step_graphs

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("graphs are real there: test_cuda_device", allow_module_level=True)
from recorded_graphs import recorded_graphs

# NumPy's warnings, where the interpreter meets infinities
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.fixture(autouse=True)
def eager_to_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_graphs, "MET", 1)


def optimizer(settings: dict[str, object] | None = None, **kwargs: object) -> sf.SparcAdam:
    torch.manual_seed(0)
    model = sf.SPARC({"a": 6, "b": 3}, 16, 3, backend="triton", **{"dead_after": 1000, "auxk": 2, **kwargs})
    return sf.SparcAdam(model, lr=1e-2, **(settings or {}))


def batches(*sizes: int) -> list[Tensor]:
    generator = seeded(1)
    return [torch.randn(n, 9, generator=generator, device=generator.device) for n in sizes]


def train(opt: sf.SparcAdam, given: Sequence[Tensor]) -> list[sf.SparcLoss]:
    """With a learning rate that falls."""
    losses = []
    for t, x in enumerate(given):
        opt.param_groups[0]["lr"] = 1e-2 / (1 + t // 2)
        losses.append(opt.step(x))
    return losses


def assert_same(ours: sf.SparcAdam, theirs: sf.SparcAdam) -> None:
    for name, tensor in theirs.model.state_dict().items():
        assert torch.equal(ours.model.state_dict()[name], tensor), name
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(ours.state[p][key], value) for key, value in theirs.state[q].items())


@pytest.mark.parametrize(
    ("settings", "kwargs"),
    [
        ({"moments": "bfloat16", "max_grad_norm": 0.5}, {"dtype": torch.bfloat16, "selection": "local"}),
        ({"freeze": ("b",)}, {"loss": "fvu"}),
    ],
    ids=["narrow and clipped", "a part by FVU"],
)
def test_replayed_steps_have_the_bits_of_steps_made_one_call_at_a_time(
    settings: dict[str, object], kwargs: dict[str, object]
) -> None:
    plain, captured = optimizer(settings, **kwargs), optimizer(settings, **kwargs)
    given = batches(2, 2, 2, 3, 2)
    expected = train(plain, given)
    with recorded_graphs(captured) as graphs:
        found = train(captured, given)
    assert len(graphs) == 1
    assert_same(captured, plain)
    for ours, theirs in zip(found, expected, strict=True):  # those of earlier steps, too, after later ones
        assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_weights_that_others_write_between_replays_are_trained_on() -> None:
    plain, captured = (optimizer(dtype=torch.bfloat16) for _ in range(2))
    given = batches(*[2] * 4)
    with recorded_graphs(captured) as graphs:
        for opt in (plain, captured):
            opt.graph = opt is captured
            train(opt, given[:3])
            with torch.no_grad():
                opt.model.W_enc.mul_(2)
            train(opt, given[3:])
    assert len(graphs) == 1
    assert_same(captured, plain)


def test_dead_latents_are_revived_in_graphs_too() -> None:
    plain, captured, elsewhere = (optimizer({"graph": g}, dead_after=1) for g in (False, True, True))
    given = batches(*[2] * 4)
    with recorded_graphs(captured) as graphs:
        expected, found = train(plain, given), train(captured, given)
    assert len(graphs) == 1
    for ours, theirs, host_reads in zip(found, expected, train(elsewhere, given), strict=True):
        assert all(a is b or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert (ours.auxk is None or ours.auxk == 0) == (host_reads.auxk is None)
        torch.testing.assert_close(ours.total, host_reads.total)
    assert found[0].auxk is None
    assert found[-1].auxk > 0
    assert_same(captured, plain)


def test_rows_of_zeros_are_absent_from_steps_made_one_call_at_a_time() -> None:
    plain, captured = (optimizer({"graph": g}) for g in (False, True))
    given = batches(*[2] * 4)
    for opt in (plain, captured):
        opt.model.calibrate(batches(40)[0])
    given[2][:, :6] = 0
    with recorded_graphs(captured) as graphs:
        train(plain, given)
        assert train(captured, given)[2].zero_rows.tolist() == [2, 0]
    assert len(graphs) == 1
    assert_same(captured, plain)


def test_a_step_that_cannot_be_captured_is_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, captured = optimizer(), optimizer()
    given = batches(*[2] * 3)
    train(plain, given)

    def capture(function: object, device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("sparc_fast.optim.sparc_adam.can_capture", lambda device: True)
    monkeypatch.setattr(step_graphs, "capture", capture)
    with pytest.warns(UserWarning, match="could not be captured in a CUDA graph, and is slower: operation"):
        train(captured, given)
    assert_same(captured, plain)


def test_no_graph_is_made_where_none_is_wanted_or_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparc_fast.optim.sparc_adam.can_capture", lambda device: True)
    monkeypatch.setattr(step_graphs, "capture", lambda *_: pytest.fail("captured"))
    for opt in (optimizer({"graph": False}), optimizer({"lazy": "replay"}), optimizer({"capturable": True})):
        train(opt, batches(*[2] * 2))


def test_a_learning_rate_of_the_device_is_read_at_every_replay() -> None:
    plain, captured = optimizer(), optimizer()
    with recorded_graphs(captured) as graphs:
        for opt in (plain, captured):
            opt.graph = opt is captured
            rate = opt.param_groups[0]["lr"] = torch.tensor(0.01)
            for t, x in enumerate(batches(*[2] * 3)):
                rate.fill_(0.01 / (t + 1))
                opt.step(x)
    assert len(graphs) == 1
    assert_same(captured, plain)


@pytest.mark.parametrize("ahead", [False, True], ids=["given", "sent"])
def test_streams_given_apart_are_put_side_by_side_where_the_graph_reads_them(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, captured = (optimizer({"graph": g}) for g in (False, True))
    given = [{"a": x[:, :6], "b": x[:, 6:]} for x in batches(2, 2, 2, 3, 2, 2)]
    samples_of: list[Tensor] = []  # all kept, so that none has the place of another
    with_weights = captured.model._with_weights

    def noted(samples: object) -> object:
        batch = with_weights(samples)  # type: ignore[arg-type]
        samples_of.append(batch.x)
        return batch

    monkeypatch.setattr(captured.model, "_with_weights", noted)
    with recorded_graphs(captured) as graphs:
        coming = captured.send(given[0])
        for x, after in zip(given, [*given[1:], given[0]], strict=True):
            plain.step(x)
            now, coming = coming, captured.send(after)
            captured.step(now if ahead else x)
    assert len(graphs) == 1
    assert captured._graphs.inputs is not None
    place = captured._graphs.inputs.data_ptr()
    assert [x.data_ptr() == place for x in samples_of] == [False, False, True, False, True, True]
    assert_same(captured, plain)

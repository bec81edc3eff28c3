"""The Triton backend in a whole model: the same training as the reference, and a sound citizen of PyTorch."""

from __future__ import annotations

import pytest
import torch
from operands import seeded

import sparc_fast as sf

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where the interpreter meets infinities

WIDTHS = {"a": 6, "b": 3}


def make(backend: str, dtype: torch.dtype = torch.float32, **kwargs: object) -> sf.SPARC:
    torch.manual_seed(0)
    arguments = {"auxk": 2, "dead_after": 4, **kwargs}
    return sf.SPARC(WIDTHS, 16, 3, backend=backend, dtype=dtype, **arguments)


def batches(steps: int) -> list[torch.Tensor]:
    generator = seeded(1)
    return [torch.randn(4, 9, generator=generator, device=generator.device) for _ in range(steps)]


@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("settings", [{}, {"capturable": True}, {"lazy": "replay"}], ids=str)
def test_training_equals_the_reference(selection: str, settings: dict[str, object]) -> None:
    ours, reference = (make(backend, torch.float64, selection=selection) for backend in ("triton", "reference"))
    optimizers = sf.SparcAdam(ours, lr=1e-2, **settings), sf.SparcAdam(reference, lr=1e-2)
    used_auxk = 0
    for x in batches(4):
        losses = [optimizer.step(x.double()) for optimizer in optimizers]
        torch.testing.assert_close(losses[0].total, losses[1].total, rtol=1e-9, atol=1e-12)
        used_auxk += losses[1].auxk is not None
    assert used_auxk > 1
    expected = reference.state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-9)


def test_bfloat16_moments_are_those_of_the_reference_lazy_or_not_and_captured() -> None:
    states = []
    for backend, settings in (
        ("reference", {}), ("triton", {}), ("triton", {"lazy": "replay"}), ("triton", {"capturable": True}),
    ):  # fmt: skip
        model = make(backend, auxk=0)
        optimizer = sf.SparcAdam(model, lr=1e-2, moments="bfloat16", seed=5, **settings)
        for x in batches(4):
            optimizer.step(x)
        state = optimizer.state_dict()["state"]
        states.append([state[i][key] for i in range(2) for key in ("exp_avg", "exp_avg_sq")])
        assert states[-1][0].dtype == torch.bfloat16
    expected, dense, lazy, captured = states
    for i in range(4):
        assert torch.equal(dense[i], lazy[i])
        assert torch.equal(dense[i], captured[i])
        assert (dense[i] != expected[i]).float().mean() < 0.02  # where float32 rounds otherwise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_weights_learn_through_float32_masters(dtype: torch.dtype) -> None:
    model = make("triton", dtype)
    optimizer = sf.SparcAdam(model, lr=1e-3)
    for x in batches(2):
        optimizer.step(x)
    for weights in (model.W_enc, model.W_dec):
        master = optimizer.state[weights]["master"]
        assert torch.equal(weights, master.to(dtype))


@pytest.mark.parametrize("auxk_coef", [0.0, 0.5])
def test_gradients_equal_the_reference(auxk_coef: float) -> None:
    x = batches(1)[0].double()
    grads = []
    for backend in ("triton", "reference"):
        model = make(backend, torch.float64)
        model.silence[::2] = 100
        model.loss(x, auxk_coef=auxk_coef).total.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # raised by torch's own tracing
def test_a_compiled_loss_is_one_graph_and_has_the_same_gradients() -> None:
    x = batches(1)[0]
    eager, compiled = (make("triton", auxk=0) for _ in range(2))
    eager.loss(x).total.backward()
    torch.compile(compiled.loss, fullgraph=True, backend="aot_eager")(x).total.backward()
    for name, p in eager.named_parameters():
        assert torch.equal(compiled.get_parameter(name).grad, p.grad), name


def test_two_runs_are_the_same_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        model = make("triton", torch.bfloat16)
        optimizer = sf.SparcAdam(model, lr=1e-2)
        for x in batches(3):
            optimizer.step(x)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

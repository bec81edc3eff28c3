"""The Triton backend in a whole model: the same training as the reference, and a sound citizen of PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from operands import seeded
from torch.utils._python_dispatch import TorchDispatchMode

import sparc_fast as sf
from sparc_fast.ops import backends

pytest.importorskip("triton")
# NumPy's warnings, where the interpreter meets infinities
pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

WIDTHS = {"a": 6, "b": 3}


def make(backend: str, dtype: torch.dtype = torch.float32, **kwargs: object) -> sf.SPARC:
    torch.manual_seed(0)
    arguments = {"auxk": 2, "dead_after": 4, **kwargs}
    return sf.SPARC(WIDTHS, 16, 3, backend=backend, dtype=dtype, **arguments)


def batches(steps: int) -> list[torch.Tensor]:
    generator = seeded(1)
    return [torch.randn(4, 9, generator=generator, device=generator.device) for _ in range(steps)]


def check_training(ours: sf.SparcAdam, reference: sf.SparcAdam, steps: int) -> list[sf.SparcLoss]:
    """Both train float64 weights to the same numbers, but for rounding. Gives the reference's losses."""
    losses = [(ours.step(x.double()), reference.step(x.double())) for x in batches(steps)]
    for found, expected in losses:
        torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-12)
    for name, tensor in reference.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)
    return [expected for _, expected in losses]


@pytest.mark.parametrize(
    ("selection", "settings"), [("global", {}), ("local", {"capturable": True}), ("local", {"lazy": "replay"})], ids=str
)
def test_training_equals_the_reference(selection: str, settings: dict[str, object]) -> None:
    ours, reference = (make(backend, torch.float64, selection=selection) for backend in ("triton", "reference"))
    losses = check_training(sf.SparcAdam(ours, lr=1e-2, **settings), sf.SparcAdam(reference, lr=1e-2), 4)
    assert sum(loss.auxk is not None for loss in losses) > 1


@pytest.mark.covering(1)  # who is chosen is settled before a row is moved
@pytest.mark.parametrize("selection", ["global", "local"])
@pytest.mark.parametrize("settings", [{}, {"capturable": True}, {"lazy": "replay"}, {"max_grad_norm": 0.1}], ids=str)
def test_private_latents_train_as_in_the_reference(selection: str, settings: dict[str, object]) -> None:
    private = {"private": {"a": 4, "b": 3}, "private_k": {"a": 2, "b": 1}}
    ours, reference = (make(b, torch.float64, selection=selection, **private) for b in ("triton", "reference"))
    clipped = {name: most for name, most in settings.items() if name == "max_grad_norm"}
    check_training(sf.SparcAdam(ours, lr=1e-2, **settings), sf.SparcAdam(reference, lr=1e-2, **clipped), 3)
    for stream, columns in (("a", slice(6, 9)), ("b", slice(0, 6))):
        some = ours.private_latents[stream]
        assert (ours.W_dec[some, columns] == 0).all()
        assert (ours.W_enc[some, columns] == 0).all()


@pytest.mark.parametrize(
    ("freeze", "selection"), [((), "local"), (("decoder",), "global"), (("a",), "local"), (("b", "encoder"), "global")]
)
def test_training_a_part_with_gradients_clipped_equals_the_reference(freeze: tuple[str, ...], selection: str) -> None:
    models = [make(backend, torch.float64, selection=selection) for backend in ("triton", "reference")]
    check_training(*(sf.SparcAdam(model, lr=1e-2, freeze=freeze, max_grad_norm=0.3) for model in models), 2)


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


@pytest.mark.parametrize(("dtype", "capturable"), [(torch.bfloat16, True), (torch.float16, False)], ids=str)
def test_narrow_weights_learn_through_float32_masters(dtype: torch.dtype, capturable: bool) -> None:
    model = make("triton", dtype)
    optimizer = sf.SparcAdam(model, lr=1e-3, capturable=capturable)
    for x in batches(3):
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


class Seen(TorchDispatchMode):
    """The names of every PyTorch operator called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.add(operator.name())
        return operator(*args, **(kwargs or {}))


def write_zeros(kernel: object, grid: object, *arguments: object, **_: object) -> None:
    """In a kernel's place: whatever it was to write is a number that may be used as an index."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            argument.zero_()


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Call it: from then on the Triton backend launches nothing, and what hides its host side is gone."""
    pytest.importorskip("sparc_fast.kernels")
    modules = {name: module for name, module in sys.modules.items() if name.startswith("sparc_fast.kernels")}

    def without() -> None:
        monkeypatch.setitem(backends._BACKENDS, "triton", modules["sparc_fast.kernels"])
        for module in modules.values():
            if hasattr(module, "launch"):
                monkeypatch.setattr(module, "launch", write_zeros)

    yield without
    for module in modules.values():  # small tensors that are kept for good were zeroed too
        for kept in vars(module).values():
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


@pytest.mark.parametrize(
    ("capturable", "reads"), [(True, set()), (False, {"aten::nonzero", "aten::_local_scalar_dense"})]
)
def test_a_capturable_step_moves_nothing_between_host_and_device(
    without_kernels: Callable[[], None], capturable: bool, reads: set[str]
) -> None:
    optimizer = sf.SparcAdam(make("triton", torch.bfloat16, check_finite=False), capturable=capturable)
    for x in batches(3):  # what is made once is made
        optimizer.step(x)
    without_kernels()
    optimizer.model.silence[:] = 100
    batch = batches(1)[0]
    with Seen() as seen:
        optimizer.step(batch)
    assert "aten::sort.stable" in seen.names
    found = seen.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::new_tensor"}
    assert found == reads, found


def test_two_runs_are_the_same_bit_for_bit() -> None:
    runs = []
    for _ in range(2):
        model = make("triton", torch.bfloat16)
        optimizer = sf.SparcAdam(model, lr=1e-2)
        for x in batches(3):
            optimizer.step(x)
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])

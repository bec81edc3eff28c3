"""What is frozen stays bit for bit and has no moments; what is trained moves as torch.optim.Adam moves it."""

from __future__ import annotations

import copy

import pytest
import torch
from operands import seeded

import sparc_fast as sf

WIDTHS = {"a": 12, "b": 7, "c": 5}
COLUMNS = {"a": slice(0, 12), "b": slice(12, 19), "c": slice(19, 24)}
CHOICES = ["encoder", "decoder", ["a"], ["b"], ["a", "c"], ["encoder", "b"], ["decoder", "c", "a"], []]


def make(backend: str = "auto", selection: str = "global", dtype: torch.dtype = torch.float64, **options: object):
    torch.manual_seed(0)
    settings = {"auxk": 4, "dead_after": 20, **options}
    return sf.SPARC(WIDTHS, 48, 5, selection=selection, backend=backend, dtype=dtype, **settings)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = seeded(1)
    mixing = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    return [(torch.randn(16, 6, generator=generator, dtype=torch.float64) @ mixing).to(dtype) for _ in range(steps)]


def parts_of(model: sf.SPARC, freeze: object) -> dict[str, tuple[torch.Tensor, bool]]:
    """name of a part and stream -> (it, whether it is trained)."""
    names = [freeze] if isinstance(freeze, str) else freeze
    parts = {}
    for s, (stream, cols) in enumerate(COLUMNS.items()):
        encoder, decoder = ("encoder" not in names, "decoder" not in names)
        here = stream not in names
        parts |= {
            f"W_enc {stream}": (model.W_enc[:, cols], here and encoder),
            f"W_dec {stream}": (model.W_dec[:, cols], here and decoder),
            f"latent_bias {stream}": (model.latent_bias[s], here and encoder),
            f"pre_bias {stream}": (model.pre_bias[cols], here and encoder and decoder),
        }
    return {name: (part.detach().clone(), trained) for name, (part, trained) in parts.items()}


@pytest.mark.covering(2)
@pytest.mark.parametrize("way", ["whole", "lazy", "in parts", "local", "lacking streams"])
@pytest.mark.parametrize("freeze", CHOICES, ids=str)
def test_what_is_trained_moves_as_by_torch_adam_and_the_rest_not_at_all(freeze: object, way: str, backend: str) -> None:
    ours, theirs = (make(backend, "local" if way == "local" else "global") for _ in range(2))
    before = parts_of(ours, freeze)
    fused = sf.SparcAdam(ours, lr=1e-2, freeze=freeze, lazy="replay" if way == "lazy" else None)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    used_auxk = 0
    for step, x in enumerate(batches(20)):
        present = None
        if way == "lacking streams":
            present = torch.rand(16, 3, generator=seeded(step)) < 0.6
            present[:, 0] |= ~present.any(1)
        loss = fused.step(x.split((5, 0, 11)) if way == "in parts" else x, present=present)
        used_auxk += loss.auxk is not None
        adam.zero_grad()
        theirs.loss(x, present=present).total.backward()
        theirs.project_gradients_()
        adam.step()
        theirs.normalize_decoder_()
        with torch.no_grad():
            for name, (part, trained) in before.items():
                if not trained:
                    put(theirs, name, part)
    assert used_auxk > 1
    expected = parts_of(theirs, freeze)
    for name, (part, trained) in parts_of(ours, freeze).items():
        if trained:
            torch.testing.assert_close(part, expected[name][0], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
            assert not torch.equal(part, before[name][0])
        else:
            assert torch.equal(part, before[name][0]), name


def put(model: sf.SPARC, name: str, part: torch.Tensor) -> None:
    which, stream = name.split()
    tensor = getattr(model, which)
    place = (list(COLUMNS).index(stream),) if which == "latent_bias" else (..., COLUMNS[stream])
    tensor[place] = part


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("freeze", ["encoder", "decoder", ["b"], ["a"]], ids=str)
def test_lazy_is_dense_bit_for_bit_and_narrow_weights_stay_too(
    freeze: object, moments: str, dtype: torch.dtype, backend: str
) -> None:
    dense, lazy = (make(backend, dtype=dtype) for _ in range(2))
    before = parts_of(dense, freeze)
    optimizers = [
        sf.SparcAdam(model, lr=1e-2, freeze=freeze, moments=moments, seed=3, lazy=how)
        for model, how in ((dense, None), (lazy, "replay"))
    ]
    for x in batches(12, dtype):
        for optimizer in optimizers:
            optimizer.step(x[:2])
    for name, (part, trained) in parts_of(dense, freeze).items():
        assert torch.equal(part, parts_of(lazy, freeze)[name][0]), name
        assert torch.equal(part, before[name][0]) == (not trained), name


def test_what_is_frozen_has_no_moments() -> None:
    sizes = {}
    for freeze in ((), "encoder", "decoder", ("a", "b"), ("a", "b", "encoder")):
        optimizer = sf.SparcAdam(make(dtype=torch.bfloat16), freeze=freeze)
        optimizer.step(batches(1, torch.bfloat16)[0])
        state = optimizer.state_dict()["state"].values()
        sizes[freeze] = sum(tensor.numel() for of in state for key, tensor in of.items() if key != "step") // 3
    L, D = 48, 24
    assert sizes == {
        (): 2 * L * D + D + 3 * L,
        "encoder": L * D,
        "decoder": L * D + 3 * L,
        ("a", "b"): 2 * L * 5 + 5 + L,
        ("a", "b", "encoder"): L * 5,
    }


@pytest.mark.parametrize("freeze", ["encoder", ["b"]], ids=str)
def test_a_state_comes_back_and_that_of_another_choice_is_refused(freeze: object) -> None:
    x = batches(6)
    whole, first = make(), make()
    optimizers = [sf.SparcAdam(model, lr=1e-2, freeze=freeze) for model in (whole, first)]
    for batch in x[:3]:
        for optimizer in optimizers:
            optimizer.step(batch)
    second = make()
    second.load_state_dict(first.state_dict())
    resumed = sf.SparcAdam(second, lr=1e-2, freeze=freeze)
    resumed.load_state_dict(optimizers[1].state_dict())
    copied = copy.deepcopy(optimizers[1])
    for batch in x[3:]:
        for optimizer in (optimizers[0], resumed, copied):
            optimizer.step(batch)
    for model in (second, copied.model):
        assert torch.equal(model.W_dec, whole.W_dec)
        assert torch.equal(model.W_enc, whole.W_enc)
    if freeze != "encoder":
        with pytest.raises(ValueError, match=r"state_dict must hold a float exp_avg \[48, 24\] of W_enc"):
            sf.SparcAdam(make()).load_state_dict(resumed.state_dict())


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("encodr", r"freeze must be of \('encoder', 'decoder', 'a', 'b', 'c'\), got 'encodr'"),
        (["encoder", "decoder"], "freeze must leave something to train"),
        (["c", "b", "a"], "freeze must leave something to train"),
    ],
    ids=str,
)
def test_a_choice_that_makes_no_sense_is_named(freeze: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.SparcAdam(make(), freeze=freeze)

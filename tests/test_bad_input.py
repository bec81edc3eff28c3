"""Bad input gets one error that names the argument, what was expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sparc_fast as sf
from sparc_fast.ops import functional as F
from sparc_fast.training import Config, Trainer, load_model, read_config

WIDTHS = {"dino": 4, "text": 3}
SAMPLES = {name: torch.ones(4, width) for name, width in WIDTHS.items()}
CONFIG = Config(n_latents=9, k=2, steps=1, batch_size=2)


def operands(N: int = 5, L: int = 9) -> dict[str, torch.Tensor]:
    return {
        "x": torch.randn(N, 7),
        "W_enc": torch.randn(L, 7),
        "pre_bias": torch.randn(7),
        "latent_bias": torch.randn(2, L),
    }


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_outside_the_latents(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must be between 1 and n_latents=9, got {k}"):
        sf.SPARC(WIDTHS, 9, k)
    with pytest.raises(ValueError, match=f"k must be between 1 and n_latents=9, got {k}"):
        F.global_topk(**operands(), k=k)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_streams": {}}, "d_streams must name at least one stream"),
        ({"d_streams": {"a": 0}}, "each an integer width >= 1, got {'a': 0}"),
        ({"selection": "both"}, r"selection must be one of \('global', 'local', 'batch', .*\), got 'both'"),
        ({"auxk": -1}, "auxk and dead_after must be >= 0, got -1"),
        ({"d_streams": [4, 3]}, r"d_streams must name at least one stream.*got \[4, 3\]"),
        ({"d_streams": {0: 4}}, "d_streams must name at least one stream.*got {0: 4}"),
        ({"d_streams": {"a": 4.0}}, "each an integer width >= 1, got {'a': 4.0}"),
        ({"k": 2.5}, "n_latents, k, auxk and dead_after must be integers, got 9, 2.5"),
        ({"dtype": torch.complex64}, "dtype must be torch.float32, bfloat16, float16 or float64, got torch.complex64"),
        ({"dtype": "float32"}, "dtype must be torch.float32, bfloat16, float16 or float64, got 'float32'"),
        ({"backend": "abacus"}, "backend must be one of 'auto', .*'reference'.* for cpu tensors, got 'abacus'"),
    ],
)
def test_a_model_that_cannot_be(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sf.SPARC(**{"d_streams": WIDTHS, "n_latents": 9, "k": 2, **arguments})


@pytest.mark.parametrize("method", ["encode", "loss", "__call__"])
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "inputs must hold at least one of the streams .'dino', 'text'., got none"),
        ({"audio": torch.zeros(2, 3)}, "inputs must be one of the streams .'dino', 'text'., got 'audio'"),
        ({"dino": torch.zeros(2, 5)}, r"inputs\['dino'\] must be \[..., 4\], got \[2, 5\]"),
        ({"dino": torch.zeros(4)}, r"inputs\['dino'\] must be \[..., 4\], got \[4\]"),
        (
            {"dino": torch.zeros(2, 4), "text": torch.zeros(3, 3)},
            r"same samples in every stream: 'dino' has \[2\], 'text' has \[3\]",
        ),
        ({"dino": [[0.0] * 4] * 2}, r"inputs\['dino'\] must be a dense tensor of real numbers, got list"),
        (
            {"dino": torch.zeros(2, 4) * 1j},
            r"inputs\['dino'\] must be a dense tensor of real numbers, got torch.complex64",
        ),
        ([1.0, 2.0], "inputs must map streams to tensors, or be one tensor of all of them, got list"),
        (torch.zeros(2, 8), r"inputs must be \[..., D=7\], all streams side by side, got \[2, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_the_streams(inputs: object, message: str, method: str) -> None:
    model = sf.SPARC(WIDTHS, 9, 2)
    with pytest.raises(ValueError, match=message):
        getattr(model, method)(inputs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(bad: float) -> None:
    model = sf.SPARC(WIDTHS, 9, 2)
    inputs = {"dino": torch.zeros(5, 4), "text": torch.zeros(5, 3)}
    inputs["text"][3, 1] = bad
    with pytest.raises(
        ValueError, match=r"inputs\['text'\] must be finite in torch.float32, got NaN or infinity in 1 of 5 rows.*row 3"
    ):
        model.loss(inputs)


def test_unchecked_nan_stays_in_its_row(backend: str) -> None:
    torch.manual_seed(0)
    model = sf.SPARC(WIDTHS, 9, 2, check_finite=False, backend=backend)
    x = torch.randn(5, 7)
    expected = model.encode(x)
    x[3, 1] = torch.nan
    codes = model.encode(x)
    others = [0, 1, 2, 4]
    assert torch.equal(codes.indices[others], expected.indices[others])
    assert torch.equal(codes.values[others], expected.values[others])
    assert codes.indices[3].unique().numel() == 2
    assert codes.values[3].isnan().any()


def test_finite_inputs_whose_sum_overflows_are_accepted() -> None:
    model = sf.SPARC(WIDTHS, 9, 2)
    model.encode({"dino": torch.full((5, 4), 1e38), "text": torch.zeros(5, 3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(5)}, r"x must be \[N, D\], got \[5\]"),
        ({"x": torch.zeros(5, 7, dtype=torch.int32)}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"W_enc": torch.randn(9, 6)}, r"W_enc must be \[L, 7\], got \[9, 6\]"),
        ({"pre_bias": torch.randn(7).double()}, r"pre_bias must have the dtype and device of x, torch.float32 on \S+, got torch.float64"),
        ({"latent_bias": torch.randn(2, 9, device="meta")}, "latent_bias must have the dtype and device of x, .* got torch.float32 on meta"),
        ({"indices": torch.zeros(5, 2, dtype=torch.int32, device="meta")}, r"indices must be on \S+, got meta"),
        ({"x": [[1.0] * 7] * 5}, "x must be a tensor, got list"),
        ({"W_enc": torch.randn(9, 7).double()}, r"W_enc must have the dtype and device of x, torch.float32 on \S+, got torch.float64"),
        ({"pre_bias": torch.randn(6)}, r"pre_bias must be \[7\], got \[6\]"),
        ({"latent_bias": torch.randn(2, 8)}, r"latent_bias must be \[2, 9\], got \[2, 8\]"),
        ({"d_streams": (4, 4)}, r"d_streams must be widths of at least 1 that add up to D=7, got \(4, 4\)"),
        ({"d_streams": (7, 0)}, r"d_streams must be widths of at least 1"),
        ({"indices": torch.zeros(4, 2, dtype=torch.int32)}, r"indices must be \[N=5, k\] or \[N=5, S=2, k\], got \[4, 2\]"),
        ({"indices": torch.zeros(5, 2)}, "indices must be int32 or int64, got torch.float32"),
    ],
)  # fmt: skip
def test_operands_that_do_not_fit_each_other(change: dict[str, object], message: str) -> None:
    arguments = {**operands(), "indices": torch.zeros(5, 2, dtype=torch.int32), "d_streams": (4, 3), **change}
    with pytest.raises(ValueError, match=message):
        F.support_values(**arguments)


def test_indices_outside_the_latents() -> None:
    with torch.device("cpu"):  # elsewhere to look would be to wait
        arguments, far = operands(), torch.full((5, 2), 2**32 + 1)
        with pytest.raises(ValueError, match=r"indices must lie in -1 … n_latents - 1 = 8, got 3 … 9"):
            F.invert_indices(torch.tensor([[3, 9]]), 9)
        for indices, found in ((torch.full((5, 2), -2), "-2 … -2"), (far, "4294967297")):
            with pytest.raises(ValueError, match=f"indices must lie in -1 … n_latents - 1 = 8, got {found}"):
                F.support_values(**arguments, indices=indices, d_streams=(4, 3))


def decode(**change: torch.Tensor) -> torch.Tensor:
    given = {"values": torch.ones(4, 1, 2), "indices": torch.zeros(4, 2, dtype=torch.int32)}
    return F.sparse_decode(**{**given, "W_dec": torch.ones(3, 2), "pre_bias": torch.zeros(2), **change})


def reconstruction_loss(**change: object) -> object:
    given = {**operands(), "W_dec": torch.randn(9, 7), "indices": torch.zeros(5, 2, dtype=torch.int32)}
    given |= {"d_streams": (4, 3), "weights": (1.0,) * 4, "scale": torch.ones(5, 2)}
    return F.reconstruction_loss(**{**given, **change})


DINO = {"dino": torch.zeros(2, 4)}
A_STREAM = r"must be one of the streams \('dino'.*got 'audio'"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.translate(DINO, "audio", "text"), A_STREAM),
        (lambda model: model.translate(DINO, "dino", "audio"), A_STREAM),
        (lambda model: model.decode(model.encode(DINO), "audio", "text"), A_STREAM),
        (lambda model: model.decode(model.encode(DINO), "dino", "audio"), A_STREAM),
        (lambda model: model.translate({**DINO, "audio": torch.zeros(2, 4)}, "dino", "text"), "got 'audio'"),
        (lambda model: model.translate({**DINO, "text": torch.zeros(3, 3)}, "dino", "text"), "same samples in every"),
        (lambda model: model.translate(DINO, "text", "dino"),
         r"inputs must hold the source stream 'text', got \('dino',\)"),
        (lambda model: model.decode(sf.SPARC(WIDTHS, 16, 2).encode(torch.zeros(2, 7)), "dino", "text"),
         "codes must be of a model with n_latents=9, got 16"),
        (lambda model: model.calibrate(DINO), r"inputs must hold samples of every stream \('dino', 'text'\)"),
        (lambda model: model.half().loss(torch.full((5, 7), 1e5)), r"inputs\['dino'\] must be finite in torch.float16"),
        (lambda model: model.loss(torch.randn(5, 7, requires_grad=True)), "x must not require a gradient"),
        (lambda _: sf.nmse(torch.zeros(3), torch.zeros(5, 3)), r"recons must have the shape of x, \[5, 3\], got \[3\]"),
        (lambda _: sf.fvu(torch.zeros(3), torch.zeros(5, 3)), r"recons must have the shape of x, \[5, 3\], got \[3\]"),
        (lambda _: F.global_topk(**operands(), k=2, screening="int8"),
         'screening must be "auto", "bf16" or "off", got \'int8\''),
        (lambda _: decode(indices=torch.zeros(4, 3, dtype=torch.int32)),
         r"indices must be \[N=4, k=2\] or \[N=4, S=1, k=2\], got \[4, 3\]"),
        (lambda _: decode(pre_bias=torch.zeros(2).double()), "pre_bias must have the dtype and device of values"),
        (lambda _: decode(indices=torch.full((4, 2), 3)), "indices must lie in -1 … n_latents - 1 = 2, got 3 … 3"),
        (lambda _: reconstruction_loss(scale=torch.ones(5, 2).double()),
         r"scale must be torch.float32 on \S+, got torch.float64 on \S+"),
        (lambda _: reconstruction_loss(residual=torch.ones(5, 7).double()),
         "residual must have the dtype and device of x"),
        (lambda _: reconstruction_loss(weights=(1.0, 1.0)), "weights must hold 4 factors, source by target, got 2"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_the_model_or_each_other(call: Callable[[sf.SPARC], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(sf.SPARC(WIDTHS, 9, 2))


OF_ADAM = r"lr and eps must be numbers >= 0 and betas two in \[0, 1\), got lr="


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({name: value}, OF_ADAM) for name, values in {
            "lr": (-1.0, "a", None, torch.ones(2)), "eps": (-1e-8, [1e-8]),
            "betas": ((1.0, 0.9), 0.9, ("a", 0), (0.9,)),
        }.items() for value in values),
        ({"moments": "float16"}, 'moments must be "float32" or "bfloat16", got \'float16\''),
        ({"moments": torch.bfloat16}, "moments must be .* got torch.bfloat16"),
        ({"moments": "bfloat16", "seed": 0.5}, "seed must be an integer, got 0.5"),
        ({"moments": "bfloat16", "dtype": torch.float64}, 'moments must be "float32" for a float64 model'),
        ({"lazy": True}, 'lazy must be None or "replay", got True'),
    ],
)  # fmt: skip
def test_settings_of_an_optimizer_out_of_range(arguments: dict[str, object], message: str) -> None:
    dtype, arguments = arguments.get("dtype", torch.float32), {**arguments}
    arguments.pop("dtype", None)
    with pytest.raises(ValueError, match=message):
        sf.SparcAdam(sf.SPARC(WIDTHS, 9, 2, dtype=dtype), **arguments)


NONSENSE = ["a", -1, 1.5, None, [1], (), {}, float("nan")]


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda **given: sf.SPARC(**{"d_streams": WIDTHS, "n_latents": 9, "k": 2, **given}),
         ["d_streams", "n_latents", "k", "selection", "auxk", "dead_after", "private", "private_k", "normalize", "loss",
          "matryoshka", "sparsity_coef", "bandwidth", "backend", "dtype"]),
        (lambda **given: sf.SparcAdam(sf.SPARC(WIDTHS, 9, 2), **given),
         ["lr", "betas", "eps", "lazy", "moments", "seed", "freeze", "max_grad_norm"]),
        (lambda **given: sf.SparcAdam(sf.SPARC(WIDTHS, 9, 2)).step(**{"inputs": torch.ones(2, 7), **given}),
         ["inputs", "cross_loss_coef", "auxk_coef", "support_from", "present"]),
        (lambda **given: sf.evaluate.evaluate(**{"model": sf.SPARC(WIDTHS, 9, 2), "inputs": SAMPLES, **given}),
         ["model", "inputs", "labels", "groups", "metrics", "batch_size", "resamples", "zero_rows", "memory"]),
        (lambda **given: sf.data.Loader(**{"files": sf.data.open(SAMPLES), "batch_size": 2, **given}),
         ["files", "batch_size", "memory", "seed", "last", "dtype", "n_threads", "part"]),
        (lambda **given: sf.data.open(**{"sources": SAMPLES, **given}),
         ["sources", "split", "ids", "join", "repeated"]),
        (lambda **given: Trainer(**{"config": CONFIG, "folder": "never made", "files": sf.data.open(SAMPLES), **given}),
         ["config", "model", "files", "validation_files", "sinks"]),
        (lambda **given: sf.SPARC(WIDTHS, 9, 2).calibrate(**{"inputs": SAMPLES, **given}),
         ["inputs", "whiten", "streams"]),
        (lambda **given: sf.SPARC(WIDTHS, 9, 2).with_stream(**{"name": "new", "width": 4, **given}),
         ["name", "width"]),
    ],
    ids=["SPARC", "SparcAdam", "step", "evaluate", "Loader", "open", "Trainer", "calibrate", "with_stream"],
)  # fmt: skip
def test_whatever_an_argument_is_the_error_is_one_that_says_what_it_must_be(
    call: Callable[..., object], names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in names:
        said = []
        for value in NONSENSE:
            try:
                call(**{name: value})
            except (ValueError, FileNotFoundError) as error:  # any other is raised
                said.append(str(error))
        assert said, f"{name} may be anything"
        assert all(" must " in words for words in said), said


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (sf.SPARC.load, "path"),
        (sf.SPARC(WIDTHS, 9, 2).save, "path"),
        (sf.SparseLatents.load, "path"),
        (load_model, "path"),
        (read_config, "path"),
        (lambda folder: Trainer(CONFIG, folder, files=sf.data.open(SAMPLES)), "folder"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [None, 3, ["a"]])
def test_what_is_no_path_is_said_to_be_none(call: Callable[..., object], name: str, path: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a path, got {path!r}")):
        call(path)


def test_steps_that_would_not_be_what_they_say() -> None:
    model = sf.SPARC(WIDTHS, 9, 2)
    optimizer = sf.SparcAdam(model)
    with pytest.raises(ValueError, match="model must be in training mode"):
        sf.SparcAdam(sf.SPARC(WIDTHS, 9, 2).eval()).step(torch.zeros(2, 7))
    model.W_dec.requires_grad_(False)
    with pytest.raises(ValueError, match="trains every weight of the model, but W_dec is frozen"):
        optimizer.step(torch.randn(2, 7))
    with pytest.raises(ValueError, match="one parameter group"):
        optimizer.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})
    decayed = torch.optim.Adam(model.parameters(), weight_decay=0.1).state_dict()
    with pytest.raises(ValueError, match="without weight decay"):
        optimizer.load_state_dict(decayed)

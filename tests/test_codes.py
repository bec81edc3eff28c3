"""Codes are indexed, joined, moved, saved and made sparse matrices; many samples are encoded and measured piece by piece."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from ranks import in_fork
from torch import Tensor

import sparc_fast as sf
from sparc_fast import batch
from sparc_fast.planning.process_memory import forget_peak, resident

WIDTHS = {"a": 12, "b": 7}


def make(selection: str = "global") -> sf.SPARC:
    torch.manual_seed(0)
    return sf.SPARC(WIDTHS, 48, 5, selection=selection)


def samples(*shape: int) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: 3 + torch.randn(*shape, width) for name, width in WIDTHS.items()}


def assert_same(a: sf.SparseLatents, b: sf.SparseLatents) -> None:
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.indices, b.indices)
    assert (a.streams, a.n_latents) == (b.streams, b.n_latents)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_samples_of_a_code_are_taken_as_those_of_a_tensor(selection: str) -> None:
    codes = make(selection).encode(samples(4, 6))
    assert codes.shape == (4, 6)
    assert len(codes) == 4
    mask = torch.rand(4, 6) < 0.5
    for at in (0, -1, slice(1, 3), (2, 5), (slice(None), 3), mask, torch.tensor([3, 0, 0]), None, ...):
        taken = codes[at]
        assert torch.equal(taken.values, codes.values[at])
        assert torch.equal(taken.indices, codes.indices[at])
        for name in WIDTHS:
            assert torch.equal(taken.dense(name), codes.dense(name)[at])
    with pytest.raises(IndexError, match="too many indices"):
        codes[0, 0, 0]
    assert_same(codes.reshape(24)[6:12], codes[1])


@pytest.mark.parametrize("selection", ["global", "local"])
def test_codes_joined_are_the_codes_of_all_samples(selection: str) -> None:
    model, x = make(selection), samples(10)
    parts = [model.encode({name: part[i:j] for name, part in x.items()}) for i, j in ((0, 3), (3, 10))]
    assert_same(sf.SparseLatents.cat(parts), model.encode(x))
    for others in ([], [parts[0], model.encode({"a": x["a"]})]):
        with pytest.raises(ValueError, match="codes must be at least one, all of the same streams and latents"):
            sf.SparseLatents.cat(others)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_sparse_matrix_holds_what_a_dense_one_does_and_nothing_that_is_zero(selection: str) -> None:
    model, x = make(selection), samples(3, 4)
    present = torch.rand(3, 4, 2) < 0.7
    present[..., 0] |= ~present.any(-1)
    codes = model.encode(x, present)
    for name in WIDTHS:
        dense, sparse = codes.dense(name).detach().reshape(12, 48), codes.to_csr(name).detach()
        assert torch.equal(sparse.to_dense(), dense)
        assert (sparse.values() != 0).all()
        parts = sparse.values().numpy(), sparse.col_indices().numpy(), sparse.crow_indices().numpy()
        assert np.array_equal(scipy.sparse.csr_array(parts, sparse.shape).toarray(), dense.numpy())


def test_a_dense_code_adds_up_a_latent_that_is_named_twice_as_decoding_does() -> None:
    codes = sf.SparseLatents(torch.tensor([[[1.0, 2.0, 4.0]]]), torch.tensor([[5, 5, -1]]), ("a",), 48)
    assert codes.dense("a")[0, 5] == 3
    assert codes.dense("a").sum() == 3


def test_codes_are_saved_and_loaded_and_a_model_is_no_codes(tmp_path: Path) -> None:
    model = make()
    codes = model.encode(samples(10))
    codes.save(tmp_path / "codes.safetensors")
    assert_same(sf.SparseLatents.load(tmp_path / "codes.safetensors"), codes)
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="path must be codes saved by sparc_fast"):
        sf.SparseLatents.load(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="path must be a model saved by sparc_fast"):
        sf.SPARC.load(tmp_path / "codes.safetensors")


def test_another_dtype_is_that_of_the_values_alone() -> None:
    codes = make().encode(samples(10)).to(torch.float16)
    assert codes.values.dtype == torch.float16
    assert codes.indices.dtype == torch.int32


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local"])
def test_pieces_are_encoded_as_the_whole(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = make(selection), samples(10, 7)
    whole = model.encode(x)
    monkeypatch.setattr(batch, "PIECE", 16)
    assert_same(model.encode(x), whole)
    assert_same(model.encode(torch.cat(list(x.values()), -1)), whole)
    assert_same(model.encode({"b": x["b"]}), model.encode({"b": x["b"][:, :]}))


@torch.no_grad()
@pytest.mark.parametrize("selection", ["global", "local"])
def test_pieces_of_samples_that_lack_streams_are_encoded_as_the_whole(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make(selection), samples(10, 7)
    present = torch.ones(10, 7, 2, dtype=torch.bool)
    present[0, 3, 0] = present[8, 2:5, 1] = False  # of one piece all have both
    whole = model.encode(x, present)
    monkeypatch.setattr(batch, "PIECE", 16)
    assert_same(model.encode(x, present), whole)
    assert_same(model.encode(x, torch.ones_like(present)), model.encode(x))
    present[9, 1] = False
    with pytest.raises(ValueError, match="present must leave each sample at least one stream, got none for row 64"):
        model.encode(x, present)
    x["b"][7, 2, 1] = torch.inf
    with pytest.raises(ValueError, match=r"inputs\['b'\] must be finite .* first in row 51"):
        model.encode(x)


@pytest.mark.parametrize("selection", ["global", "local"])
def test_gradients_through_pieces_are_those_of_the_whole(selection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grads = []
    for piece in (10**6, 16):
        monkeypatch.setattr(batch, "PIECE", piece)
        model, x = (
            make(selection).double(),
            {name: part.double().requires_grad_() for name, part in samples(70).items()},
        )
        model.calibrate(samples(70))
        weights = torch.linspace(0.5, 2, 70 * 2 * 5, dtype=torch.float64).reshape(70, 2, 5)
        (model.encode(x).values * weights).sum().backward()
        grads.append(
            [model.W_enc.grad, model.pre_bias.grad, model.latent_bias.grad, *(part.grad for part in x.values())]
        )
    for one, other in zip(*grads, strict=True):
        assert one is not None
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def taken() -> float:
    """Bytes beyond the samples' that encoding them takes, for each of theirs."""
    torch.set_num_threads(1)
    widths = {"a": 512, "b": 256}
    model, x = sf.SPARC(widths, n_latents=64, k=4), {name: torch.randn(30_000, width) for name, width in widths.items()}
    model.calibrate({name: part[:2000] for name, part in x.items()})
    model.encode({name: part[:5000] for name, part in x.items()})
    forget_peak()
    base = resident("VmRSS")
    codes = model.encode(x)
    assert codes.values.requires_grad
    return (resident("VmHWM") - base) / sum(part.nbytes for part in x.values())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak anew")
def test_under_autograd_many_samples_take_no_more_than_a_piece_does() -> None:
    """Not their copies, which autograd would keep: pieces are encoded again on the way back."""
    assert 0 < in_fork(taken) < 1


def test_pieces_are_measured_as_the_whole_and_a_row_that_is_not_finite_is_counted_from_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, pieces, x = make(), make(), samples(100)
    whole.calibrate(x)
    monkeypatch.setattr(batch, "MEASURED", 7)
    pieces.calibrate(x)
    torch.testing.assert_close(pieces.input_mean, whole.input_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pieces.input_rms, whole.input_rms, rtol=1e-6, atol=1e-7)
    x["b"][52, 3] = torch.nan
    before = pieces.input_mean.clone()
    with pytest.raises(ValueError, match=r"inputs\['b'\] must be finite .* first in row 52"):
        pieces.calibrate(x)
    assert torch.equal(pieces.input_mean, before)


def test_a_model_is_calibrated_when_its_buffers_say_so() -> None:
    model, x = make(), samples(100)
    assert not model.is_calibrated
    model.input_rms.copy_(torch.tensor([2.0, 3.0]))
    assert model.is_calibrated
    loss = model.loss(x).total
    other = make()
    other.load_state_dict(model.state_dict(), strict=False)
    assert other.is_calibrated
    assert torch.equal(other.loss(x).total, loss)
    with torch.device("meta"):
        empty = sf.SPARC(WIDTHS, 48, 5)
    assert not empty.is_calibrated
    empty = empty.to_empty(device="cpu")
    empty.reset_parameters()
    assert not empty.is_calibrated
    assert not empty.dead.any()
    for _ in range(50):  # a buffer may come to lie where one was that said something else
        model.input_rms = torch.full((2,), 3.0)
        assert model.is_calibrated
        model.input_rms = torch.ones(2)
        assert not model.is_calibrated
    model.input_rms.fill_(2)
    model.reset_parameters()
    assert not model.is_calibrated


def test_sizes_may_be_integers_of_numpy() -> None:
    model = sf.SPARC({"a": np.int64(12)}, np.int64(48), np.array([5])[0])
    assert (type(model.d_streams["a"]), type(model.n_latents), type(model.k)) == (int, int, int)


@pytest.mark.parametrize(
    "x", [torch.ones(3, 12, dtype=torch.bool), torch.ones(3, 12).to(torch.float8_e4m3fn), torch.ones(3, 12).to_sparse()],
    ids=["bool", "float8", "sparse"],
)  # fmt: skip
def test_inputs_that_are_no_dense_numbers_are_refused_in_words(x: Tensor) -> None:
    for use in (make().encode, make().loss, make().calibrate):
        with pytest.raises(ValueError, match=r"inputs\['a'\] must be a dense tensor of real numbers, got"):
            use({"a": x})


@pytest.mark.parametrize("selection", ["global", "local"])
def test_a_latent_that_is_set_or_scaled_in_a_stream_changes_there_alone(selection: str) -> None:
    model = make(selection)
    codes = model.encode(samples(3, 4))
    latent = int(codes.indices.flatten()[0])
    for steered, expected in (
        (codes.set(latent, 2.5, "b"), lambda old: torch.full_like(old, 2.5)),
        (codes.set(latent, 0, "b"), torch.zeros_like),
        (codes.scale(np.int64(latent), 3, "b"), lambda old: old * 3),
    ):
        assert steered.shape == codes.shape
        changed = codes.dense("b")
        changed[..., latent] = expected(changed[..., latent])
        assert torch.equal(steered.dense("b"), changed)
        assert torch.equal(steered.dense("a"), codes.dense("a"))
    both = codes.set(latent, 1.0)
    assert all((both.dense(name)[..., latent] == 1).all() for name in WIDTHS)
    moved = model.decode(both, "b", "a") - model.decode(codes, "b", "a")
    direction = (1 - codes.dense("b")[..., latent, None]) * model.W_dec[latent, :12]
    assert torch.allclose(moved, direction, atol=1e-5)
    with pytest.raises(ValueError, match=r"latent must be in 0 \.\.\. 47, got 48"):
        codes.set(48, 1.0)
    for steer, name in ((codes.set, "value"), (codes.scale, "factor")):
        assert torch.equal(steer(latent, torch.tensor(2.5)).values, steer(latent, 2.5).values)
        with pytest.raises(ValueError, match=f"{name} must be a number, got 'a'"):
            steer(latent, "a")


@pytest.mark.parametrize("selection", ["global", "local"])
def test_codes_of_single_samples_below_each_other_are_those_of_all(selection: str) -> None:
    codes = make(selection).encode(samples(3))
    together = sf.SparseLatents.cat([codes[n] for n in range(3)])
    assert torch.equal(together.values, codes.values)
    assert torch.equal(together.indices, codes.indices)


def test_codes_print_in_one_line_and_show_their_strongest_latents_in_a_notebook() -> None:
    codes = make().encode(samples(1000))
    assert repr(codes) == (
        "SparseLatents([1000] samples, streams a, b: supports shared by all streams, 5 of 48 latents, "
        "torch.float32, cpu)"
    )
    values, indices = codes[0].stream("b")
    strongest = f"{int(indices[values.argmax()])}: {values.max().item():.3g}"
    shown = codes._repr_html_()
    assert f"<td>{strongest}" in shown
    assert shown.count("<tr>") == 6
    hostile = sf.SparseLatents(codes.values, codes.indices, ("<b>", "&"), 48)
    assert "<th>&lt;b&gt;</th><th>&amp;</th>" in hostile._repr_html_()


@pytest.mark.parametrize("dtype", ["f4", "f2", ">f8", "i2"])
def test_numpy_arrays_are_encoded_as_the_tensors_they_are(dtype: str) -> None:
    model = make()
    arrays = {name: x.mul(10).numpy().astype(dtype) for name, x in samples(2, 3).items()}
    arrays["a"].flags.writeable = False
    tensors = {name: torch.from_numpy(x.astype(x.dtype.newbyteorder("="))) for name, x in arrays.items()}
    assert_same(model.encode(arrays), model.encode(tensors))
    assert torch.equal(model.translate(arrays, "a", "b"), model.translate(tensors, "a", "b"))
    other = make()
    model.calibrate(arrays)
    other.calibrate(tensors)
    assert torch.equal(model.input_mean, other.input_mean)
    with pytest.raises(ValueError, match="inputs must be arrays of real numbers, got <U1"):
        model.encode({"a": np.array([["x"]])})


@pytest.mark.filterwarnings("error")
def test_an_array_that_may_not_be_written_is_read_where_it_lies(tmp_path: Path) -> None:
    """So is a mapped file, which may be larger than memory."""
    np.save(tmp_path / "a.npy", np.ones((5, 3), np.float32))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    tensors = batch.as_tensors({"a": mapped}, torch.device("cpu"))
    assert tensors["a"].data_ptr() == mapped.ctypes.data

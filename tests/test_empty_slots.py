"""An index of -1 is an empty slot: in every operator as if it were not there, and its value is 0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from accuracy import check_accuracy, compare
from operands import DTYPES, OPERATORS, SUPPORTS, Operands, fitting, operands, operators_of, run
from torch import Tensor
from torch.profiler import profile

from sparc_fast.batch import stack
from sparc_fast.ops import functional

# which slots of a support of 6 are empty
EMPTY = {
    "none": [],
    "the first": [0],
    "the last": [5],
    "both ends": [0, 5],
    "several together": [2, 3, 4],
    "all but one": [0, 1, 2, 4, 5],
    "all": [0, 1, 2, 3, 4, 5],
}
SHAPE = (7, 1, 100), 5, 33, 6
# operators that read no support; those in which a sample's is read, and what they give for each slot of it
WITHOUT_SUPPORT = {"loss_summary", "sample_scale", "step_biases"}
PER_SLOT = {"support_values": 0, "sparse_decode_grad_values": 0, "decode_loss": 2, "nested_decode_loss": 2}


def emptied(o: Operands, slots: list[int], every: int = 1) -> Operands:
    """With these slots empty in every `every`-th sample, their values 0 and their gradients poisoned."""
    indices, values, grad_values = o.indices.clone(), o.values.clone(), o.grad_values.clone()
    indices[::every, ..., slots], values[::every, :, slots], grad_values[::every, :, slots] = -1, 0, torch.nan
    return replace(o, indices=indices, values=values, grad_values=grad_values)


def without(o: Operands, slots: list[int]) -> Operands:
    """With these slots cut out of every support; none left is one of value 0 and gradient 0."""
    kept = [j for j in range(o.indices.shape[-1]) if j not in slots]
    if kept:
        return replace(
            o, indices=o.indices[..., kept], values=o.values[..., kept], grad_values=o.grad_values[..., kept]
        )
    one = replace(o, indices=o.indices[..., :1], values=o.values[..., :1], grad_values=o.grad_values[..., :1])
    return replace(one, values=one.values * 0, grad_values=one.grad_values * 0)


@pytest.mark.covering(3)
@pytest.mark.parametrize(
    "name", sorted(set(OPERATORS) - WITHOUT_SUPPORT - {"invert_indices"} - {n for n in OPERATORS if "replay" in n})
)
@pytest.mark.parametrize("slots", EMPTY.values(), ids=EMPTY)
@SUPPORTS
def test_results_are_those_of_the_support_without_its_empty_slots(
    name: str, slots: list[int], per_stream: bool, backend: str
) -> None:
    if name.endswith("lazily") and len(slots) == 6:
        pytest.skip("the support it is compared with has entries")
    if name in ("count_silence", "finish_step"):
        slots = slots[:5]
    o = fitting(operands(SHAPE, torch.float32, per_stream), backend)
    got, cut = run(name, emptied(o, slots), backend), without(o, slots)
    plain, truth = run(name, cut, "reference"), run(name, cut.to(torch.float64), "reference")
    for i, (result, same_dtype, exact) in enumerate(zip(got, plain, truth, strict=True)):
        if PER_SLOT.get(name) == i:
            filled = [j for j in range(6) if j not in slots]
            assert torch.equal(result[..., slots], torch.zeros_like(result[..., slots]))
            result, same_dtype, exact = result[..., filled], same_dtype[..., : len(filled)], exact[..., : len(filled)]
        compare([result], [same_dtype], [exact])


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted(n for n in set(OPERATORS) - WITHOUT_SUPPORT if "replay" not in n))
def test_some_samples_may_have_empty_slots_and_others_none(name: str, dtype: torch.dtype, backend: str) -> None:
    o = emptied(fitting(operands(SHAPE, dtype), backend), [1, 4], every=2)
    check_accuracy(name, replace(o, grad_values=o.grad_values.nan_to_num()), operators_of(backend))


@SUPPORTS
@pytest.mark.parametrize("slots", EMPTY.values(), ids=EMPTY)
def test_the_inverse_index_leaves_empty_slots_out_of_every_segment(
    slots: list[int], per_stream: bool, backend: str
) -> None:
    o = emptied(operands(SHAPE, torch.float32, per_stream), slots)
    offsets, entries = functional.invert_indices(o.indices, 33, backend=backend)
    flat = o.indices.reshape(-1)
    assert offsets[0] == 0
    assert offsets[-1] == (flat >= 0).sum()
    for l in range(33):
        assert entries[offsets[l] : offsets[l + 1]].tolist() == (flat == l).nonzero()[:, 0].tolist()
    assert entries[offsets[-1] :].tolist() == (flat < 0).nonzero()[:, 0].tolist()


def test_no_latent_of_an_empty_slot_is_moved_replayed_or_counted_as_fired(backend: str) -> None:
    o = emptied(operands(SHAPE, torch.float32), EMPTY["all"])
    *_, last_step = run("update_rows lazily", o, backend)
    assert (last_step == last_step[0]).all()
    silence = torch.arange(33)
    operators_of(backend).count_silence(silence, torch.ones_like(o.values), o.indices)
    assert torch.equal(silence, torch.arange(33) + 5)


@SUPPORTS
def test_gradients_are_those_of_the_dense_computation(per_stream: bool, backend: str) -> None:
    o = emptied(operands(((7, 4), 4, 9, 5), torch.float64, per_stream), [0, 3], every=2)

    def parameters() -> list[Tensor]:
        return [t.clone().requires_grad_() for t in (o.x, o.W_enc, o.W_dec, o.pre_bias, o.latent_bias)]

    def dense(x: Tensor, W_enc: Tensor, W_dec: Tensor, pre_bias: Tensor, latent_bias: Tensor) -> Tensor:
        recons = []
        for s, cols in enumerate((slice(0, 7), slice(7, 11))):
            support = o.indices if o.indices.ndim == 2 else o.indices[:, s]
            used = torch.zeros(4, 10, dtype=torch.float64).index_put_(
                (torch.arange(4)[:, None], support.long()), torch.ones((), dtype=torch.float64)
            )[:, :9]
            z = torch.relu((x - pre_bias)[:, cols] @ W_enc[:, cols].T + latent_bias[s]) * used
            recons.append(z @ W_dec + pre_bias)
        return torch.stack(recons, dim=1)

    def sparse(x: Tensor, W_enc: Tensor, W_dec: Tensor, pre_bias: Tensor, latent_bias: Tensor) -> Tensor:
        values = functional.support_values(
            x, W_enc, pre_bias, latent_bias, o.indices, d_streams=(7, 4), backend=backend
        )
        return functional.sparse_decode(values, o.indices, W_dec, pre_bias, backend=backend)

    ours, truth = parameters(), parameters()
    got, expected = sparse(*ours), dense(*truth)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    (got * o.grad_recons).sum().backward()
    (expected * o.grad_recons).sum().backward()
    for mine, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.grad, true.grad, rtol=1e-11, atol=1e-11)


def test_a_sample_of_empty_slots_alone_is_reconstructed_as_the_pre_bias(backend: str) -> None:
    W_dec = torch.full((2, 2), torch.nan)
    indices = torch.full((1, 2), -1)
    recons = functional.sparse_decode(torch.zeros(1, 1, 2), indices, W_dec, torch.tensor([4.0, 6.0]), backend=backend)
    assert recons.tolist() == [[[4.0, 6.0]]]


def test_supports_of_one_width_are_copied_once_to_be_stacked_and_narrower_ones_filled_up() -> None:
    two, one = torch.tensor([[3, 5]]), torch.tensor([[4], [6]])
    assert stack([two, one]).tolist() == [[3, 5], [4, -1], [6, -1]]
    assert stack([two.float(), one.float()]).tolist() == [[3, 5], [4, 0], [6, 0]]
    large = torch.ones(1000, 250)  # a megabyte
    with profile(profile_memory=True) as taken:
        stacked = stack([large, large])
    assert sum(max(0, event.self_cpu_memory_usage) for event in taken.events()) == stacked.nbytes

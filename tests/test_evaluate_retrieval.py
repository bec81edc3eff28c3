from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operands import seeded
from test_evaluate_codes import Case, cases, code_of, dense_of
from torch import Tensor

from sparc_fast.evaluate import (
    Retrieval,
    StreamCode,
    retrieval,
    retrieval_ranks,
    retrieval_scores,
    retrieval_seconds,
    retrieve,
)

INF = math.inf


def ranks_by_definition(queries: Tensor, candidates: Tensor) -> list[float]:
    """In exact integers: cosines q.c / (|q| |c|) are ordered by sign(q.c) (q.c)^2 / |c|^2."""
    q, c = queries.long().tolist(), candidates.long().tolist()

    def orders(n: int, m: int) -> tuple[int, int]:
        dot = sum(a * b for a, b in zip(q[n], c[m], strict=True))
        return dot * abs(dot), sum(b * b for b in c[m])

    ranks = []
    for n in range(len(q)):
        if not any(q[n]) or not any(c[n]):
            ranks.append(INF)
            continue
        own, own_norm = orders(n, n)
        others = [orders(n, m) for m in range(len(c)) if m != n and any(c[m])]
        higher = sum(dot * own_norm > own * norm for dot, norm in others)
        equal = sum(dot * own_norm == own * norm for dot, norm in others)
        ranks.append(1 + higher + equal / 2)
    return ranks


@pytest.fixture(params=["compiled", "plain"], scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Sparse codes are compared in compiled code, and by plain PyTorch where it is missing."""
    if request.param == "compiled" and retrieval._cpu is None:
        pytest.skip("nothing is compiled here")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(retrieval, "_cpu", None)
        yield


@pytest.mark.usefixtures("way")
@settings(max_examples=200, deadline=None)
@given(case=cases(), chunk=st.integers(1, 10))
def test_ranks_of_sparse_codes_equal_the_definition_in_exact_arithmetic(case: Case, chunk: int) -> None:
    streams, _, L = case
    a, b = next(iter(streams.values())), list(streams.values())[-1]
    expected = ranks_by_definition(dense_of(a, L), dense_of(b, L))
    assert retrieval_ranks(a, b, L, chunk=chunk).tolist() == expected
    assert retrieval_ranks(dense_of(a, L), dense_of(b, L), chunk=chunk).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(N=st.integers(0, 9), D=st.integers(1, 5), seed=st.integers(0, 2**31), chunk=st.integers(1, 10))
def test_ranks_of_signed_dense_rows_equal_the_definition(N: int, D: int, seed: int, chunk: int) -> None:
    generator = seeded(seed)
    a, b = (torch.randint(-3, 4, (N, D), generator=generator).float() for _ in range(2))
    assert retrieval_ranks(a, b, chunk=chunk).tolist() == ranks_by_definition(a, b)


def ranks_in_groups(queries: Tensor, candidates: Tensor, groups: list[int]) -> list[float]:
    """The definition, one query after another: the best right candidate among it and all wrong ones, copies but once."""
    ranks = []
    rows = [(group, *row) for group, row in zip(groups, candidates.tolist(), strict=True)]
    for n, group in enumerate(groups):
        wrong = [m for m, row in enumerate(rows) if row[0] != group and row not in rows[:m]]
        right = [m for m, other in enumerate(groups) if other == group]
        chosen = [[m, *wrong] for m in right]
        ranks.append(min(ranks_by_definition(queries[[n] * len(c)], candidates[c])[0] for c in chosen))
    return ranks


@pytest.mark.usefixtures("way")
@settings(max_examples=100, deadline=None)
@given(N=st.integers(1, 9), D=st.integers(1, 5), seed=st.integers(0, 2**31), chunk=st.integers(1, 10))
def test_in_groups_the_best_candidate_of_the_query_s_group_counts(N: int, D: int, seed: int, chunk: int) -> None:
    generator = seeded(seed)
    a, b = (torch.randint(-2, 3, (N, D), generator=generator).float() for _ in range(2))
    groups = torch.randint(0, 4, (N,), generator=generator)
    assert retrieval_ranks(a, b, groups=groups, chunk=chunk).tolist() == ranks_in_groups(a, b, groups.tolist())
    expected = ranks_in_groups(a.relu(), b.relu(), groups.tolist())
    codes = code_of(a.relu().tolist()), shuffled_slots(code_of(b.relu().tolist()), generator)
    assert retrieval_ranks(*codes, D, groups, chunk=chunk).tolist() == expected
    alone = torch.randperm(N, generator=generator)
    assert torch.equal(retrieval_ranks(a, b, groups=alone, chunk=chunk), retrieval_ranks(a, b, chunk=chunk))


def shuffled_slots(code: StreamCode, generator: torch.Generator) -> StreamCode:
    """The same code, each row's latents in an order of its own."""
    order = torch.rand(code[0].shape, generator=generator).argsort(dim=1)
    return code[0].gather(1, order), code[1].gather(1, order)


@pytest.mark.usefixtures("way")
def test_images_repeated_beside_their_captions_are_scored_as_in_the_protocol_of_coco() -> None:
    """R@K both ways as published code for COCO counts them, on images once and all their captions."""
    generator = seeded(3)
    n, L = 60, 12
    images = torch.randint(0, 4, (n, L), generator=generator).float()
    of_caption = torch.arange(n).repeat_interleave(5)
    captions = images[of_caption] * torch.randint(0, 3, (5 * n, L), generator=generator)
    images[:, 0], captions[:, 0] = 1, 1  # none is 0, and there are no ties but by rounding
    images, captions = (
        images + torch.rand(n, L, generator=generator),
        captions + torch.rand(5 * n, L, generator=generator),
    )
    cosines = torch.nn.functional.normalize(images) @ torch.nn.functional.normalize(captions).T
    to_text, to_image = [], []
    for i in range(n):
        order = cosines[i].argsort(descending=True).tolist()
        to_text.append(min(order.index(c) for c in range(5 * i, 5 * i + 5)))
    for c in range(5 * n):
        to_image.append(cosines[:, c].argsort(descending=True).tolist().index(c // 5))
    repeated, text = code_of(images[of_caption].tolist()), code_of(captions.tolist())
    for found, ranks, n_candidates in (
        (retrieval_scores(repeated, text, L, of_caption), to_text, 5 * n),
        (retrieval_scores(text, repeated, L, of_caption), to_image, n),
    ):
        assert (found.n, found.n_candidates) == (len(ranks), n_candidates)
        for top, score in ((1, found.r1), (5, found.r5), (10, found.r10)):
            assert score == pytest.approx(sum(rank < top for rank in ranks) / len(ranks))
    assert retrieval_scores(text, repeated, L).r1 < retrieval_scores(text, repeated, L, of_caption).r1


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("many", [0.05, 0.6])
def test_ranks_over_several_blocks_equal_those_by_dense_products(many: float) -> None:
    """More rows than a block, latents that few fire and that most do, groups across blocks, and zero rows."""
    generator = seeded(4)
    N, L = 8500 if retrieval._cpu is not None else 1500, 24  # a compiled block is of 8192
    a, b = ((torch.rand(N, L, generator=generator) < many) * torch.rand(N, L, generator=generator) for _ in range(2))
    a, b = (torch.where(torch.rand(N, L, generator=generator) < 0.2, x.round(decimals=1), 0) for x in (a, b))
    codes = [(x.topk(20).values, x.topk(20).indices) for x in (a, b)]
    kept = [torch.zeros_like(x).scatter(1, i, v) for x, (v, i) in zip((a, b), codes, strict=True)]
    for groups in (None, torch.randint(0, N // 3, (N,), generator=generator)):
        expected = retrieval_ranks(*kept, groups=groups, chunk=500)
        found = retrieval_ranks(*codes, L, groups, chunk=500)
        assert (found == expected).float().mean() > 0.999  # a cosine at the very edge of a tie is a matter of rounding
        assert (found - expected).abs().nan_to_num(0).max() <= 1


def by_threads(counts: Iterable[int], call: Callable[[], Any]) -> Iterator[Any]:
    """What is found by so many threads."""
    before = torch.get_num_threads()
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            yield call()
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_rank() -> None:
    generator = seeded(5)
    code = torch.rand(1000, 8, generator=generator), torch.rand(1000, 64, generator=generator).topk(8).indices
    first, *others = by_threads((1, 2, 3), lambda: retrieval_ranks(code, code, 64))
    assert all(torch.equal(one, first) for one in others)


@pytest.mark.usefixtures("way")
def test_the_time_of_retrieval_grows_with_pairs_and_with_latents_that_all_fire() -> None:
    def seconds(N: int, n_latents: int) -> float:
        indices = torch.arange(N * 4).reshape(N, 4) % n_latents
        return retrieval_seconds((torch.ones(N, 4), indices), (torch.ones(N, 4), indices), n_latents)

    assert seconds(2000, 400) == pytest.approx(4 * seconds(1000, 400))
    assert seconds(1000, 40) >= seconds(1000, 400) > 0


# --- retrieve ---


@pytest.mark.usefixtures("way")
@settings(max_examples=60, deadline=None)
@given(case=cases(), top=st.integers(1, 12), chunk=st.integers(1, 10))
def test_the_nearest_candidates_come_first_and_what_shares_nothing_is_not_found(
    case: Case, top: int, chunk: int
) -> None:
    streams, _, L = case
    a, b = next(iter(streams.values())), list(streams.values())[-1]
    cosines = torch.nn.functional.cosine_similarity(dense_of(a, L)[:, None].double(), dense_of(b, L).double(), dim=2)
    found = retrieve(a, b, L, top=top, chunk=chunk)
    assert found.candidates.shape == found.cosines.shape == (len(a[0]), top)
    for of_query, chosen, near in zip(cosines, found.candidates.tolist(), found.cosines, strict=True):
        some = [c for c in chosen if c >= 0]
        assert len(some) == min(top, int((of_query > 0).sum()))
        assert len(set(some)) == len(some)
        best = of_query.sort(descending=True).values[: len(some)]
        torch.testing.assert_close(of_query[some], best, rtol=0, atol=1e-6)
        torch.testing.assert_close(near[: len(some)].double(), best, rtol=0, atol=1e-6)
        assert not near[len(some) :].any()
        assert chosen[len(some) :] == [-1] * (top - len(some))


def test_one_query_is_looked_for_among_many_dense_rows_of_equal_ones_the_lower_first() -> None:
    rows = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    found = retrieve(torch.tensor([[3.0, 0.0]]), rows, top=3)
    assert found.candidates.tolist() == [[1, 2, 3]]
    assert found.cosines.tolist() == [[1, 1, pytest.approx(0.5**0.5)]]
    with pytest.raises(ValueError, match="top must be at least 1, got 0"):
        retrieve(rows, rows, top=0)


@pytest.mark.usefixtures("way")
def test_of_equal_codes_in_all_blocks_the_lower_are_found_whatever_the_threads() -> None:
    generator = seeded(6)
    N, L, top = 20_000, 50, 7
    kinds = code_of(torch.randint(0, 3, (40, L), generator=generator).float().tolist())
    kind = torch.randint(0, 40, (N,), generator=generator)
    kind[:100] = 39  # of this one as many as fill the first places
    code = kinds[0][kind], kinds[1][kind]
    one, other = by_threads((1, 3), lambda: retrieve(kinds, code, L, top=top, chunk=16))
    assert all(map(torch.equal, one, other))
    for k, chosen in enumerate(one.candidates.tolist()):
        same = (kind == k).nonzero()[:top, 0].tolist()
        assert chosen[: len(same)] == same


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("many", [0.05, 0.6])
def test_the_nearest_over_several_blocks_are_those_by_dense_products(many: float) -> None:
    generator = seeded(7)
    N, L = 9000, 24
    a, b = ((torch.rand(N, L, generator=generator) < many) * torch.rand(N, L, generator=generator) for _ in range(2))
    codes = [code_of(x.tolist()) for x in (a[:300], b)]
    found, expected = retrieve(*codes, L, top=20), retrieve(a[:300].double(), b.double(), top=20)
    torch.testing.assert_close(found.cosines, expected.cosines, rtol=0, atol=5e-7)
    assert (found.candidates == expected.candidates).float().mean() > 0.99  # cosines that lie nearer than rounding


@pytest.mark.usefixtures("way")
def test_there_may_be_no_candidates_or_no_queries() -> None:
    none, some = (torch.zeros(0, 2), torch.zeros(0, 2).long()), (torch.ones(3, 2), torch.tensor([[0, 1]] * 3))
    assert retrieve(some, none, 4, top=2).candidates.tolist() == [[-1, -1]] * 3
    assert retrieve(none, some, 4, top=2).candidates.shape == (0, 2)


@pytest.mark.parametrize("width", [1, 64, 768])
def test_constant_codes_tie_with_everything_and_rank_in_the_middle(width: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, width).expand(101, width)
    ranks = retrieval_ranks(x, x)
    assert ranks.tolist() == [51.0] * 101
    assert Retrieval.from_ranks(ranks).r10 == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e30])
def test_the_scale_of_the_codes_does_not_matter(scale: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(30, 6), torch.randn(30, 6)
    assert torch.equal(retrieval_ranks(scale * a, scale * b), retrieval_ranks(a, b))


def test_summary_of_hand_made_ranks() -> None:
    found = Retrieval.from_ranks(torch.tensor([1.0, 2.0, 8.0, INF]))
    assert found == Retrieval(
        4, r1=0.25, r5=0.5, r10=0.75, median_rank=5.0, mrr=(1 + 1 / 2 + 1 / 8) / 4, n_candidates=4
    )
    assert Retrieval.from_ranks(torch.tensor([3.0, 1.0, 9.0])).median_rank == 3
    none = Retrieval.from_ranks(torch.tensor([INF]))
    assert (none.r1, none.r10, none.median_rank, none.mrr) == (0, 0, INF, 0)


def test_no_queries_have_no_scores() -> None:
    ranks = retrieval_ranks(torch.zeros(0, 3), torch.zeros(0, 3))
    found = Retrieval.from_ranks(ranks)
    assert found.n == 0
    assert all(map(math.isnan, (found.r1, found.r5, found.r10, found.median_rank, found.mrr)))


X, CODE = torch.ones(2, 3), code_of([[1.0], [1.0]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, X[0]), r"candidates must be \[N, D\], got \(3,\)"),
        ((X, X[:1]), r"must have the same N, got queries dense \[2, 3\], candidates dense \[1, 3\]"),
        ((X, X[:, :2]), r"must have the same D, got queries dense \[2, 3\], candidates dense \[2, 2\]"),
        ((X, CODE, 1), "both dense or both sparse"),
        ((CODE, CODE), "n_latents must be given where queries are sparse codes, got None"),
        ((CODE, CODE, 0), r"queries must have indices in \[0, n_latents=0\)"),
        ((X, X * math.nan), "candidates must have finite values"),
        ((X, X, None, torch.ones(2)), r"groups must be integers \[N=2\], got torch.float32 \[2\]"),
        ((X, X, None, torch.arange(3)), r"groups must be integers \[N=2\], got torch.int64 \[3\]"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_ranks(*arguments)  # type: ignore[arg-type]


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        retrieval_ranks(X, X, chunk=0)

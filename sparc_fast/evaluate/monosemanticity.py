"""MonoScore: are the samples that fire a latent alike?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparc_fast.arrays import tensor_of

from .codes import CHUNK_BYTES, ByLatent, Codes, by_latent, check_codes, parts
from .jaccard import above_chance
from .passing import InputsOnCPU, bytes_of_inputs
from .registry import Given, Metric, Score, Sizes
from .resampling import Resampling

__all__ = ["MONOSEMANTICITY", "Monosemanticity", "mono_score"]


@dataclass(frozen=True, eq=False)
class Monosemanticity:
    """score: float64 [S, L], in [-1, 1]; nan for a latent that weighs fewer than two samples.

    chance: the mean cosine of two samples, whatever fires for them: a latent that fires at random scores it. It may be
    far above 0, as embeddings of most models lie in a narrow cone.
    """

    streams: tuple[str, ...]
    score: Tensor
    chance: float


def mono_score(codes: Codes, embeddings: Tensor, n_latents: int) -> Monosemanticity:
    """The mean cosine of the samples' embeddings [N, D] over pairs of samples, weighted by how both fire a latent.

    With a_n the latent's activation scaled so that its least over all samples is 0 and its greatest 1, and p_n the
    embedding at norm 1 (or 0, where it is 0):

        MS = sum_{n<m} a_n a_m p_n . p_m / sum_{n<m} a_n a_m
           = (|sum_n a_n p_n|^2 - sum_n a_n^2 |p_n|^2) / ((sum_n a_n)^2 - sum_n a_n^2)

    The first line is the monosemanticity score of Pach et al. (arXiv 2504.02821), the second its sum in time linear in
    N (arXiv 2602.12403). Embeddings should be of a model that is none of the streams, or a latent is judged by what it
    was made from. Memory is that of the codes once more, and a chunk.
    """
    n, embeddings = check_codes(codes, n_latents), tensor_of(embeddings)
    if embeddings.dim() != 2 or len(embeddings) != n or not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be [N={n}, D], got {embeddings.dtype} {list(embeddings.shape)}")
    D, device, norms = embeddings.shape[1], embeddings.device, _norms(embeddings)
    if not norms.isfinite().all():
        raise ValueError("embeddings must be finite, got NaN or inf")
    streams = [_scaled(by_latent(code, n_latents), n) for code in codes.values()]
    together = torch.zeros(len(codes), n_latents, dtype=torch.float64, device=device)
    of_all = torch.zeros((), dtype=torch.float64, device=device)
    for columns in parts(D, 16 * n):
        units = embeddings[:, columns].double() / norms.where(norms > 0, 1)[:, None]
        of_all += units.sum(dim=0).square().sum()
        for s, (entries, _) in enumerate(streams):
            for latents, some in entries.blocks(8 * units.shape[1] + 32):
                sums = embedding_bag(
                    entries.samples[some].long(),
                    units,
                    entries.offsets[latents.start : latents.stop + 1] - some.start,
                    per_sample_weights=_weights(streams[s], latents, some),
                    mode="sum",
                    include_last_offset=True,
                )
                together[s, latents] += sums.square().sum(dim=1)
    counted = (norms > 0).double()
    weight, own, squares = sums_of = torch.zeros(3, len(codes), n_latents, dtype=torch.float64, device=device)
    for s, (entries, _) in enumerate(streams):
        for latents, some in entries.blocks(64):
            a = _weights(streams[s], latents, some)
            lengths = entries.offsets[latents.start : latents.stop + 1].diff()
            each = torch.repeat_interleave(torch.arange(latents.start, latents.stop, device=device), lengths)
            of_entries = torch.stack([a, a * a * counted[entries.samples[some].long()], a * a])
            sums_of[:, s].scatter_add_(1, each.expand(of_entries.shape), of_entries)
    return Monosemanticity(
        tuple(codes),
        _ratio(together - own, weight.square() - squares, weight.square()),
        float(_ratio(of_all - counted.sum(), of_all.new_tensor(n * (n - 1)), of_all.new_tensor(n * n))),
    )


def _norms(embeddings: Tensor) -> Tensor:
    norms = torch.zeros(len(embeddings), dtype=torch.float64, device=embeddings.device)
    for rows in parts(len(embeddings), 16 * embeddings.shape[1]):
        norms[rows] = embeddings[rows].double().norm(dim=1)
    return norms


_Scaled = tuple[ByLatent, tuple[Tensor, Tensor]]


def _scaled(entries: ByLatent, n: int) -> _Scaled:
    """With the least and the greatest activation of each latent over all n samples, 0 where one does not fire it."""
    lengths = entries.offsets.diff()
    least, greatest = (
        torch.segment_reduce(entries.values.float(), reduce, lengths=lengths, initial=initial)
        for reduce, initial in (("min", float("inf")), ("max", 0.0))
    )
    return entries, (torch.where(lengths == n, least, 0).double(), greatest.double())


def _weights(scaled: _Scaled, latents: slice, some: slice) -> Tensor:
    """Of some entries, those of these latents: activations scaled to [0, 1]."""
    entries, bounds = scaled
    lengths = entries.offsets[latents.start : latents.stop + 1].diff()
    least, greatest = (torch.repeat_interleave(bound[latents], lengths) for bound in bounds)
    span = greatest - least
    return (entries.values[some].float().double() - least) / span.where(span > 0, 1)


def _ratio(over: Tensor, under: Tensor, scale: Tensor) -> Tensor:
    """nan where nothing is below but rounding."""
    least = 1e-12 * scale
    return torch.where(under > least, over / under.where(under > least, 1), torch.nan)


def _compute(given: Given) -> dict[tuple[str, str], Monosemanticity]:
    """By (stream whose latents are judged, stream whose inputs judge them)."""
    inputs: InputsOnCPU = given.watched["monosemanticity"]
    found = {}
    for judge in given.streams:
        judged = {name: code for name, code in given.single.items() if name != judge}
        if judged:
            of_all = mono_score(judged, inputs.stream(judge), given.n_latents)
            for s, name in enumerate(judged):
                found[name, judge] = Monosemanticity((name,), of_all.score[s : s + 1], of_all.chance)
    return found


def drawn_mono_score(
    samples: Tensor, values: Tensor, embeddings: Tensor, norms: Tensor, resampling: Resampling, n_drawn: Tensor | None
) -> Tensor:
    """MonoScore of a latent with these activations of these samples, [n] each, in each resampling, float64 [B].

    Over pairs of different samples, each pair as often as both are drawn: a sample that is drawn twice is not two that
    are alike. embeddings [N, D] and their norms, float64 [N], are of all samples. n_drawn [B], if given: how many are
    drawn; where all of them fire the latent, their least activation becomes 0.
    """
    B, D = resampling.n_resamples, embeddings.shape[1]
    blocks = list(parts(len(samples), 32 * B + 24 * D, resampling.chunk_bytes))
    firing, weight, squares, own, least = (resampling.zeros() for _ in range(5))
    if n_drawn is not None:
        lowest = torch.full_like(least, torch.inf)
        for rows in blocks:
            weights = resampling.weights(samples[rows].long())
            firing += weights.sum(dim=0)
            some = values[rows].double()[:, None].where(weights > 0, torch.inf)
            lowest = torch.minimum(lowest, some.amin(dim=0))
        least = lowest.where((firing == n_drawn) & (firing > 0), 0)
    sums = torch.zeros(B, D, dtype=torch.float64, device="cpu")
    for rows in blocks:
        n = samples[rows].long()
        a = resampling.weights(n) * (values[rows].double()[:, None] - least)
        weight += a.sum(dim=0)
        squares += a.square().sum(dim=0)
        units = embeddings[n].double() / norms[n].where(norms[n] > 0, 1)[:, None]
        if len(n) == len(samples) and len(n) * (B + D) < B * D:  # all pairs cost less than all sums
            pairs = (units @ units.T).fill_diagonal_(0)
            return _ratio((a * (pairs @ a)).sum(dim=0), weight.square() - squares, weight.square())
        own += (norms[n] > 0).double() @ a.square()
        sums += a.T @ units
    return _ratio(sums.square().sum(dim=1) - own, weight.square() - squares, weight.square())


def _resample(given: Given, found: dict[tuple[str, str], Monosemanticity]) -> Mapping[str, Tensor]:
    """See `drawn_mono_score`."""
    resampling, inputs = given.draws, given.watched["monosemanticity"]
    if not found:
        return {}
    every = torch.arange(resampling.n, device="cpu")
    n_drawn = torch.cat([weights.sum(dim=0, dtype=torch.float64) for _, weights in resampling.pieces()])
    judges = {}
    for judge in given.streams:
        embeddings = inputs.stream(judge)
        norms = _norms(embeddings)
        chance = drawn_mono_score(every, torch.ones_like(norms), embeddings, norms, resampling, None)
        judges[judge] = embeddings, norms, chance
    scores, above, by_chance = (resampling.zeros() for _ in range(3))
    for name, code in given.single.items():
        entries = by_latent(code, given.n_latents)
        bounds = entries.offsets.tolist()
        of_latents = [slice(*pair) for pair in pairwise(bounds) if pair[1] - pair[0] > 1]
        for judge, (embeddings, norms, chance) in judges.items():
            if judge == name:
                continue
            total, n = resampling.zeros(), resampling.zeros()
            for some in of_latents:
                latent = entries.samples[some], entries.values[some].float()
                score = drawn_mono_score(*latent, embeddings, norms, resampling, n_drawn)
                total += score.nan_to_num()
                n += score.isfinite()
            scores += total / n
            above += above_chance(total / n, chance)
            by_chance += chance
    drawn = {"mono_above_chance": above, "mono": scores, "mono_chance": by_chance}
    return {key: values / len(found) for key, values in drawn.items()}


def _mean(found: dict[tuple[str, str], Monosemanticity], value: Callable[[Monosemanticity], Tensor]) -> float:
    return float(torch.stack([value(one).nanmean() for one in found.values()]).mean()) if found else float("nan")


def _chance(one: Monosemanticity) -> Tensor:
    return torch.full_like(one.score[:1], one.chance)


def _work(sizes: Sizes) -> int:
    """The codes once more, latent after latent, and sums over samples."""
    return 8 * sizes.N * sizes.k * max(1, sizes.S - 1) + 40 * sizes.N + 64 * sizes.S * sizes.L + 3 * CHUNK_BYTES


MONOSEMANTICITY = Metric(
    "monosemanticity",
    "MonoScore: are the samples that fire a latent, in each stream encoded alone, alike to each other stream's model?",
    _compute,
    (
        Score(
            "mono_above_chance",
            "MonoScore above chance",
            "Mean cosine of the inputs, in another stream, of two samples that fire a latent, weighted by how both do, "
            "above that of any two: (score - chance) / (1 - chance), over latents and pairs of streams.",
            value=lambda found: _mean(
                found, lambda one: above_chance(one.score, torch.full_like(one.score, one.chance))
            ),
        ),
        Score("mono", "MonoScore", "The same as it is.", value=lambda found: _mean(found, lambda o: o.score)),
        Score(
            "mono_chance",
            "MonoScore by chance",
            "Mean cosine of the inputs of any two samples.",
            better="neither",
            value=lambda found: _mean(found, _chance),
        ),
    ),
    needs=frozenset({"single"}),
    watch=InputsOnCPU,
    resample=_resample,
    kept=bytes_of_inputs,
    work=_work,
)

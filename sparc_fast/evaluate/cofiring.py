"""In which streams does a latent fire, together or apart, and with how much of their energy? Needs no labels."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .codes import Codes, StreamCode, check_codes, firing_counts, parts
from .registry import Given, Metric, Score
from .resampling import Bags, Resampling, firing_entries, latent_blocks

__all__ = ["COFIRING", "Cofiring", "cofiring_iou", "energy_share", "firing_entropy"]


def firing_entropy(codes: Codes, n_latents: int) -> Tensor:
    """How evenly a latent's firings are spread over the streams, float64 [L], in [0, 1]; nan for a dead latent.

    With p_s the part of its firings that are in stream s: -sum_s p_s log p_s / log S. 1: it fires as often in every
    stream, for whatever samples; 0: in one alone. The normalised firing entropy of Universal SAEs (arXiv 2502.03714).
    nan too where there is one stream.
    """
    check_codes(codes, n_latents)
    counts = torch.stack([firing_counts(code, n_latents) for code in codes.values()]).double()
    share = counts / counts.sum(dim=0)
    entropy: Tensor = torch.special.entr(share).sum(dim=0)
    return entropy / (math.log(len(codes)) if len(codes) > 1 else math.nan)


def cofiring_iou(codes: Codes, n_latents: int) -> Tensor:
    """Of the samples that fire a latent in any stream, the part that fire it in all, float64 [L]; 0 for a dead one.

    The co-firing proportion of Universal SAEs (arXiv 2502.03714), whose mean over pairs of streams is
    `firing_agreement`. To be read on single codes: joint ones share their support.
    """
    check_codes(codes, n_latents)
    S, device = len(codes), next(iter(codes.values()))[0].device
    some, every = (torch.zeros(n_latents, dtype=torch.int64, device=device) for _ in range(2))
    n_samples, width = len(next(iter(codes.values()))[0]), sum(values.shape[1] for values, _ in codes.values())
    for rows in parts(n_samples, 64 * width):
        fired = [indices[rows].long().masked_fill(values[rows] <= 0, n_latents) for values, indices in codes.values()]
        latents = torch.cat(fired, dim=1).sort(dim=1).values  # a latent of all streams is there S times in a row
        first = torch.ones_like(latents, dtype=torch.bool)
        first[:, 1:] = latents[:, 1:] != latents[:, :-1]
        some += torch.bincount(latents[first & (latents < n_latents)], minlength=n_latents)
        start, end = latents[:, : width - S + 1], latents[:, S - 1 :]
        every += torch.bincount(start[(start == end) & (start < n_latents)], minlength=n_latents)
    return every.double() / some.clamp_min(1)


@torch.no_grad()
def energy_share(codes: Codes, n_latents: int, *, relative: bool = True) -> Tensor:
    """The part of a latent's energy that is in each stream, float64 [S, L], each column adding up to 1; nan if dead.

    Energy is the sum of squared activations: as dictionary rows have norm 1, that of what the latent adds to the
    reconstruction. By default it is relative to the energy of all latents of its stream, for a stream of larger values
    would have most of every latent; else it is as it is. After the modality score of arXiv 2504.11695, of
    mean activations in one space.
    """
    check_codes(codes, n_latents)
    energy = torch.stack([_energy(values, indices, n_latents) for values, indices in codes.values()])
    if relative:
        of_stream = energy.sum(dim=1, keepdim=True)
        energy = energy / of_stream.where(of_stream > 0, 1)
    return energy / energy.sum(dim=0)


def _energy(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    energy = torch.zeros(n_latents, dtype=torch.float64, device=values.device)
    for rows in parts(len(values), 32 * values.shape[1]):
        squares = values[rows].double().relu().square()
        energy.scatter_add_(0, indices[rows].long().clamp_min(0).flatten(), squares.flatten())
    return energy


@dataclass(frozen=True, eq=False)
class Cofiring:
    """`firing_entropy` and `cofiring_iou` of each latent, [L], and `energy_share`, [S, L]; alive: bool [L]."""

    entropy: Tensor
    iou: Tensor
    energy: Tensor
    alive: Tensor

    def mean(self, values: Tensor) -> float:
        """Over alive latents."""
        return float(values[self.alive].mean())


def _compute(given: Given) -> Cofiring:
    codes, L = given.single, given.n_latents
    return Cofiring(firing_entropy(codes, L), cofiring_iou(codes, L), energy_share(codes, L), given.alive)


def _resample(given: Given, found: Cofiring) -> Mapping[str, Tensor]:
    """Firings summed anew in each resampling; which latents are alive too."""
    resampling, codes = given.draws, list(given.single.values())
    S, L = len(codes), given.n_latents
    iou, entropy, energy, alive = (resampling.zeros() for _ in range(4))
    of_streams = torch.stack([_drawn_energy(code, resampling) for code in codes])
    for latents in latent_blocks(codes, L, resampling):
        entries = [firing_entries(code, latents, resampling.chunk_bytes, code[0]) for code in codes]
        keys, squares = [keys for keys, _ in entries], [each.square() for _, (each,) in entries]
        some_stream, times = torch.unique(torch.cat(keys), return_counts=True)
        keys += [some_stream, some_stream[times == S]]
        bags = [Bags.of(some_keys, latents, resampling.n) for some_keys in keys]
        for drawn, weights in resampling.pieces(4 * (len(keys) + 2 * S) * (latents.stop - latents.start)):
            *firings, union, common = (of_keys.drawn(weights) for of_keys in bags)
            counts = torch.stack(firings)
            share = counts / counts.sum(dim=0).clamp_min(1)
            iou[drawn] += (common / union.clamp_min(1)).sum(dim=0, dtype=torch.float64)
            entropy[drawn] += torch.special.entr(share).sum(dim=(0, 1), dtype=torch.float64)
            alive[drawn] += (union > 0).sum(dim=0)
            own = torch.stack([bags[s].drawn(weights, each) for s, each in enumerate(squares)])
            own /= of_streams[:, None, drawn]
            energy[drawn] += (own.amax(dim=0) / own.sum(dim=0).where(union > 0, 1)).sum(dim=0, dtype=torch.float64)
    scores = {"cofiring_iou": iou / alive, "largest_energy_share": energy / alive}
    return scores if S == 1 else {**scores, "firing_entropy": entropy / alive / math.log(S)}


def _drawn_energy(code: StreamCode, resampling: Resampling) -> Tensor:
    """Of a stream, in each resampling, float32 [B]; 1 where nothing fires."""
    each = torch.zeros(len(code[0]), dtype=torch.float32, device="cpu")
    for rows in parts(len(each), 8 * code[0].shape[1]):
        each[rows] = code[0][rows].float().relu().square().sum(dim=1)
    total = torch.cat([each @ weights for _, weights in resampling.pieces()])
    return total.where(total > 0, 1)


COFIRING = Metric(
    "cofiring",
    "In which streams, each encoded alone, latents fire, together or apart, and with how much of their energy.",
    _compute,
    (
        Score(
            "cofiring_iou",
            "Co-firing over all streams",
            "Of the samples that fire a latent in any stream, the fraction that fire it in all, over alive latents.",
            value=lambda found: found.mean(found.iou),
        ),
        Score(
            "firing_entropy",
            "Firing entropy over streams",
            "How evenly a latent's firings are spread over the streams, for whatever samples: 1 is evenly, 0 is in one "
            "stream alone, over alive latents.",
            value=lambda found: found.mean(found.entropy),
        ),
        Score(
            "largest_energy_share",
            "Energy in a latent's strongest stream",
            "The part of a latent's energy that is in one stream, each stream's energy counting alike, over alive "
            "latents: 1 / streams is best.",
            better="lower",
            value=lambda found: found.mean(found.energy.amax(dim=0)),
        ),
    ),
    needs=frozenset({"single", "pairs"}),
    of_shared=True,
    resample=_resample,
)

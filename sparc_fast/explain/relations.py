"""What fires together, which samples lie near in other streams, and which latents a word speaks of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.evaluate import Carried, Codes, StreamCode, top_samples

__all__ = ["energy", "fire_together", "latents_of_words", "nearest"]

CELLS = 2**21  # numbers of a block of counts
STRONGEST = 64  # samples of a latent that say what else fires
LATENTS, CANDIDATES, QUERIES = 4, 32, 256  # near are those among CANDIDATES of each of a sample's LATENTS

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def energy(code: StreamCode) -> Tensor:
    """Each latent's share of the squared values of its sample's code, [N, k]; 0 where none fires."""
    squares = code[0].float().clamp_min(0).square()
    return squares / squares.sum(dim=1, keepdim=True).clamp_min(1e-30)


def fire_together(codes: Codes, frequency: npt.NDArray[np.floating], n: int = 8) -> Found:
    """The latents that fire most beyond their frequency on the samples that fire a latent most, and how often, [L, n].

    -1 and 0 where there are fewer.
    """
    L = len(frequency)
    usual = torch.as_tensor(frequency, dtype=torch.float32, device="cpu")
    strongest = top_samples(codes, L, STRONGEST).samples
    n = min(n, L)
    others = torch.full((L, n), -1, dtype=torch.int64, device="cpu")
    shares = torch.zeros(L, n, dtype=torch.float32, device="cpu")
    step = max(1, CELLS // L)
    for start in range(0, L, step):
        here = torch.arange(start, min(start + step, L), device="cpu")
        counts = torch.zeros(len(here) * L, dtype=torch.int64, device="cpu")
        for (values, indices), samples in zip(codes.values(), strongest[:, here], strict=True):
            place, _ = (samples >= 0).nonzero(as_tuple=True)
            rows = samples[samples >= 0]
            cells = place[:, None] * L + indices[rows].long()
            counts += torch.bincount(cells[values[rows] > 0], minlength=len(counts))
        total = (strongest[:, here] >= 0).sum(dim=(0, 2))
        share = counts.view(len(here), L) / total.clamp_min(1)[:, None]
        excess = (share - usual).masked_fill(share == 0, -1)
        excess[torch.arange(len(here), device="cpu"), here] = -1
        best, found = excess.topk(n, dim=1)
        others[here] = found.where(best > 0, -1)
        shares[here] = share.gather(1, found).where(best > 0, 0)
    return others.numpy(), shares.numpy()


def nearest(query: StreamCode, candidates: StreamCode, n_latents: int, n: int = 6) -> Found:
    """Samples nearest by cosine of codes, among those that a sample's strongest latents fire most for, [N, n].

    -1 and 0 where there are fewer.
    """
    (q_values, q_indices), (c_values, c_indices) = (_unit(code) for code in (query, candidates))
    strongest = top_samples({"": candidates}, n_latents, CANDIDATES).samples[0]
    found = torch.full((len(q_values), n), -1, dtype=torch.int64, device="cpu")
    cosines = torch.zeros(found.shape, dtype=torch.float32, device="cpu")
    for start in range(0, len(q_values), QUERIES):
        values, indices = q_values[start : start + QUERIES], q_indices[start : start + QUERIES]
        dense = torch.zeros(len(values), n_latents, dtype=torch.float32, device="cpu").scatter_add_(1, indices, values)
        top = values.topk(min(LATENTS, values.shape[1]), dim=1).indices
        rows = strongest[indices.gather(1, top)].flatten(1).sort(dim=1).values
        rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = -1
        products = dense.gather(1, c_indices[rows].flatten(1)).view(*rows.shape, -1) * c_values[rows]
        near = products.sum(dim=2).masked_fill(rows < 0, 0)
        best, place = near.sort(dim=1, descending=True, stable=True)
        some = slice(start, start + len(values)), slice(0, min(n, rows.shape[1]))
        found[some] = rows.gather(1, place)[:, :n].where(best[:, :n] > 0, -1)
        cosines[some] = best[:, :n].clamp_min(0)
    return found.numpy(), cosines.numpy()


def _unit(code: StreamCode) -> StreamCode:
    values, indices = code[0].float().clamp_min(0), code[1].long().clamp_min(0)
    return values / values.norm(dim=1, keepdim=True).clamp_min(1e-30), indices


def latents_of_words(codes: Sequence[StreamCode], words: Carried, n_latents: int, n: int = 8) -> Found:
    """The latents whose share of energy rises most in samples that have a word, and by how much, [W, n].

    The mean over the streams given; -1 and 0 where fewer rise.
    """
    n = min(n, n_latents)
    shares = [energy(code) for code in codes]
    usual = torch.zeros(n_latents, dtype=torch.float32, device="cpu")
    for (_, indices), share in zip(codes, shares, strict=True):
        usual += torch.bincount(indices.clamp_min(0).flatten(), share.flatten(), n_latents) / max(len(share), 1)
    sample = torch.repeat_interleave(words.offsets.diff())
    sample = sample[words.concepts.argsort(stable=True)]
    offsets = torch.zeros(words.n_concepts + 1, dtype=torch.int64, device="cpu")
    offsets[1:] = words.counts().cumsum(0)
    found = torch.full((words.n_concepts, n), -1, dtype=torch.int64, device="cpu")
    rises = torch.zeros(words.n_concepts, n, dtype=torch.float32, device="cpu")
    step = max(1, CELLS // n_latents)
    for start in range(0, words.n_concepts, step):
        stop = min(start + step, words.n_concepts)
        rows, n_rows = sample[offsets[start] : offsets[stop]], offsets[start : stop + 1].diff()
        word = torch.repeat_interleave(n_rows)
        rise = torch.zeros((stop - start) * n_latents, dtype=torch.float32, device="cpu")
        for (_, indices), share in zip(codes, shares, strict=True):
            cells = word[:, None] * n_latents + indices[rows].long().clamp_min(0)
            rise += torch.bincount(cells.flatten(), share[rows].flatten(), len(rise))
        mean = rise.view(-1, n_latents) / n_rows[:, None] - usual
        best, place = (mean / max(len(codes), 1)).topk(n, dim=1)
        found[start:stop] = place.where(best > 0, -1)
        rises[start:stop] = best.clamp_min(0)
    return found.numpy(), rises.numpy()

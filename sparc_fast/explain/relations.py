"""What fires together, and which latents a word speaks of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.evaluate import Carried, Codes, StreamCode, top_samples

__all__ = ["energy", "fire_together", "latents_of_words", "strongest"]

CELLS = 2**21  # numbers of a block of counts
STRONGEST = 64  # samples of a latent that say what else fires

Found = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


def energy(code: StreamCode) -> Tensor:
    """Each latent's share of the squared values of its sample's code, [N, k]; 0 where none fires."""
    squares = code[0].float().clamp_min(0).square()
    return squares / squares.sum(dim=1, keepdim=True).clamp_min(1e-30)


def strongest(code: StreamCode, n: int) -> tuple[Tensor, Tensor]:
    """The latents of each sample with most energy, and their shares of it, [N, min(n, k)] both."""
    share, place = energy(code).topk(min(n, code[0].shape[1]), dim=1)
    return code[1].long().gather(1, place), share


def fire_together(codes: Codes, frequency: npt.NDArray[np.floating], n: int = 8) -> Found:
    """The latents that fire most beyond their frequency on the samples that fire a latent most, and how often, [L, n].

    -1 and 0 where there are fewer.
    """
    L = len(frequency)
    usual = torch.as_tensor(frequency, dtype=torch.float32, device="cpu")
    samples = top_samples(codes, L, STRONGEST).samples
    fired = [indices.long().where(values > 0, L) for values, indices in codes.values()]  # L is of nothing
    n = min(n, L)
    others = torch.full((L, n), -1, dtype=torch.int64, device="cpu")
    shares = torch.zeros(L, n, dtype=torch.float32, device="cpu")
    step = max(1, CELLS // (L + 1))
    for start in range(0, L, step):
        here = torch.arange(start, min(start + step, L), device="cpu")
        there = samples[:, here] >= 0
        cells = [
            (of_stream.nonzero()[:, :1] * (L + 1) + latents[rows[of_stream]]).flatten()
            for latents, rows, of_stream in zip(fired, samples[:, here], there, strict=True)
        ]
        counts = torch.bincount(torch.cat(cells), minlength=len(here) * (L + 1)).view(-1, L + 1)
        counts[here - start, here] = counts[:, L] = 0
        place, other = counts.nonzero(as_tuple=True)
        share = counts[place, other] / there.sum(dim=(0, 2))[place]
        excess = share - usual[other]
        place, other, share, excess = (x[excess > 0] for x in (place, other, share, excess))
        column = torch.arange(len(place), device="cpu") - torch.searchsorted(place, place)
        widest = int(torch.bincount(place, minlength=1).amax())
        row = torch.zeros(len(here), max(n, widest), dtype=torch.float32, device="cpu")
        entry = torch.full(row.shape, -1, dtype=torch.int64, device="cpu")
        row[place, column], entry[place, column] = excess, torch.arange(len(place), device="cpu")
        best = entry.gather(1, row.topk(n, dim=1).indices)
        which, column = (best >= 0).nonzero(as_tuple=True)
        others[start + which, column], shares[start + which, column] = other[best[best >= 0]], share[best[best >= 0]]
    return others.numpy(), shares.numpy()


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

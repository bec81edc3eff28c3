"""The strongest baseline: independent SAEs whose latents are matched afterwards, one to one, by when they fire."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sparc_fast.selection import LOCAL

from .codes import Codes, check_codes, firings, parts, runs
from .evaluation import evaluate
from .passing import Samples
from .registry import Metric

if TYPE_CHECKING:
    from ..model import SPARC

__all__ = ["match_latents", "matched", "rename_latents"]

PRODUCTS = 2**21  # co-firings that are counted at a time
PARTNERS = 64  # of each latent, those of largest correlation, that may become its match
NOBODY = 1e-9  # correlation with a partner of one's own, so that all latents can be matched
CODES = Metric("codes", "The codes of each stream alone.", lambda given: given.single, needs=frozenset({"single"}))


def match_latents(codes: Codes, n_latents: int) -> Tensor:
    """For each latent of the first stream its match in every stream, int64 [S, L]; a permutation of latents a stream.

    Of all one-to-one matchings, the one of largest total correlation between firing in the first stream and firing in
    the other (phi coefficient, over the samples of `codes`: training ones, each stream encoded alone), among the 64
    partners of largest positive correlation of each latent. Latents without such a partner left are paired by how often
    they fire. Nothing is of size L x L: co-firings are counted for some latents at a time, and the assignment is solved
    on a sparse matrix (Jonker and Volgenant 1987; SciPy's min_weight_full_bipartite_matching).

    Raises:
        ImportError: SciPy is not installed.
    """
    if find_spec("scipy") is None:
        raise ImportError("matching latents needs SciPy: pip install 'sparc_fast[evaluate]'")
    n_samples = check_codes(codes, n_latents)
    first, *others = (_firings(code, n_latents) for code in codes.values())
    matches = [_matching(first, other, n_samples) for other in others]
    return torch.from_numpy(np.stack([np.arange(n_latents), *matches]))


def rename_latents(codes: Codes, matches: Tensor) -> Codes:
    """Codes in which latent l of every stream is the one matched with latent l of the first: see `match_latents`."""
    renamed = {}
    for match, (name, (values, indices)) in zip(matches, codes.items(), strict=True):
        new = torch.empty_like(match)
        new[match] = torch.arange(len(match), device=match.device)
        renamed[name] = values, new.to(indices.device, indices.dtype)[indices.long()]
    return renamed


@torch.no_grad()
def matched(model: SPARC, inputs: Samples, *, batch_size: int = 1024, memory: int | str = "4GiB") -> SPARC:
    """The same independent SAEs with each stream's latents in another order: those of `match_latents` on these inputs.

    Its reconstructions of a stream from itself are the same, and all that compares streams finds latents matched.

    Args:
        model: of selection "local" or "local_jumprelu", in which streams share nothing but the numbers of latents.
        inputs: training samples {stream: [N, D_s]}, tensors or NumPy arrays, or files that `sparc_fast.data.open` gave.

    Raises:
        ValueError: the model's streams share a support, so their latents cannot be in orders of their own; or some are
            private.
        ImportError: SciPy is not installed.
    """
    if not model._shards.is_whole:
        raise ValueError("model must be whole to have its latents in another order, but ranks share them")
    if model.selection not in LOCAL:
        raise ValueError(f"model must have selection {' or '.join(map(repr, LOCAL))}, got {model.selection!r}")
    if model.private_latents:
        raise ValueError(f"model must have no private latents to be put in another order, got {model.private_latents}")
    found = evaluate(model, inputs, metrics=(CODES,), batch_size=batch_size, resamples=0, memory=memory)
    matches = match_latents(found.single_codes, model.n_latents)
    reordered = copy.deepcopy(model)
    columns = torch.split(torch.arange(model.W_enc.shape[1], device="cpu"), list(model.d_streams.values()))
    for s, (match, cols) in enumerate(zip(matches.to(model.W_enc.device), columns, strict=True)):
        mine = slice(int(cols[0]), int(cols[-1]) + 1)
        for new, old in ((reordered.W_enc, model.W_enc), (reordered.W_dec, model.W_dec)):
            new[:, mine] = old[match, mine]
        reordered.latent_bias[s] = model.latent_bias[s, match]
        if reordered.latent_threshold is not None and model.latent_threshold is not None:
            reordered.latent_threshold[s] = model.latent_threshold[s, match]
    return reordered


def _firings(code: tuple[Tensor, Tensor], n_latents: int) -> Any:
    """Which samples fire which latents, scipy.sparse.csr_array float32 [N, L]."""
    from scipy.sparse import csr_array

    counts, latents = [torch.zeros(1, dtype=torch.int64, device="cpu")], []
    for rows in parts(len(code[0]), 48 * code[0].shape[1]):
        some = code[0][rows].cpu(), code[1][rows].cpu()
        latents.append(firings(some)[1].int())
        counts.append((some[0] > 0).sum(dim=1))
    indices = torch.cat(latents) if latents else torch.zeros(0, dtype=torch.int32, device="cpu")
    ones = np.ones(len(indices), np.float32)
    offsets = torch.cat(counts).cumsum(0)
    return csr_array((ones, indices.numpy(), offsets.numpy()), shape=(len(code[0]), n_latents))


def _matching(first: Any, other: Any, n_samples: int) -> npt.NDArray[np.int64]:
    """For each latent of the first stream one of the other, [L]."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    L = first.shape[1]
    n, m = (np.bincount(code.indices, minlength=L).astype(np.float64) for code in (first, other))
    rows, columns, weights = _partners(first.T.tocsr(), other, n, m, n_samples)
    every = np.arange(L)
    edges = coo_array(
        (np.append(weights, np.full(L, NOBODY)), (np.append(rows, every), np.append(columns, L + every))),
        shape=(L, 2 * L),
    ).tocsr()
    match = np.full(L, L, np.int64)
    if L:
        at, found = min_weight_full_bipartite_matching(edges, maximize=True)
        match[at] = found
    alone = np.flatnonzero(match >= L)
    left = np.setdiff1d(every, match)
    match[alone[np.argsort(-n[alone], kind="stable")]] = left[np.argsort(-m[left], kind="stable")]
    return match


def _partners(
    first: Any, other: Any, n: npt.NDArray[np.float64], m: npt.NDArray[np.float64], n_samples: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Pairs of latents and their correlations: of each latent of the first, [L, N], those of largest correlation."""
    k = max(1, other.nnz // max(1, other.shape[0]))
    spread, other_spread = np.sqrt(n * (n_samples - n)), np.sqrt(m * (n_samples - m))
    found: list[tuple[npt.NDArray[Any], ...]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for some in runs(np.cumsum(n * k).tolist(), PRODUCTS):
        both = first[some] @ other
        row = np.repeat(np.arange(some.start, some.stop), np.diff(both.indptr))
        column, together = both.indices, both.data.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            phi = (n_samples * together - n[row] * m[column]) / (spread[row] * other_spread[column])
        good = np.flatnonzero(phi > 0)
        good = good[np.argsort(row[good] - phi[good] / 2, kind="stable")]  # by row, the largest first
        per_row = np.bincount(row[good] - some.start, minlength=some.stop - some.start)
        place = np.arange(len(good)) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        good = good[place < PARTNERS]
        found.append((row[good], column[good].astype(np.int64), phi[good]))
    rows, columns, weights = (np.concatenate(part) for part in zip(*found, strict=True))
    return rows, columns, weights

"""Sparse codes as the metrics take them, and the counting they share.

One stream's code is `(values [N, k], indices [N, k])`; the latents of one row are distinct. A latent is
*active* (it *fires*) for a sample when its value is > 0: one that was selected but whose ReLU is 0 is not.
`Codes` maps stream names to codes of the same N samples. Which protocol is measured depends only on how
the codes were made: *joint* (all streams encoded together, so that they share one support) or *single*
(each stream encoded alone). Nothing here is of size N x L.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["Codes", "StreamCode", "firing_counts", "firings", "label_counts"]

StreamCode = tuple[Tensor, Tensor]
Codes = Mapping[str, StreamCode]

CHUNK_ELEMENTS = 2**25  # floats a chunk of work may hold at once: 128 MiB


def check_code(code: StreamCode, n_latents: int, name: str = "code") -> None:
    values, indices = code
    if values.dim() != 2 or indices.shape != values.shape:
        raise ValueError(
            f"{name} must have values and indices of one shape [N, k], "
            f"got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must have int32 or int64 indices, got {indices.dtype}")
    if indices.numel() and (indices.min() < 0 or indices.max() >= n_latents):
        raise ValueError(
            f"{name} must have indices in [0, n_latents={n_latents}), got {int(indices.min())} to {int(indices.max())}"
        )


def check_codes(codes: Codes, n_latents: int) -> int:
    """Check every stream's code; return the number of samples they share."""
    if not codes:
        raise ValueError("codes must hold at least one stream, got none")
    for name, code in codes.items():
        check_code(code, n_latents, f"codes[{name!r}]")
    sizes = {name: len(values) for name, (values, _) in codes.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"codes must have the same number of samples in every stream, got {sizes}")
    return next(iter(sizes.values()))


def check_labels(labels: Tensor, n_samples: int) -> None:
    if labels.dtype != torch.bool or labels.dim() != 2 or len(labels) != n_samples:
        raise ValueError(f"labels must be bool [N={n_samples}, C], got {labels.dtype} {tuple(labels.shape)}")


def firings(code: StreamCode) -> tuple[Tensor, Tensor, Tensor]:
    """Samples, latents and values of all active entries, in ascending order of sample."""
    values, indices = code
    samples, slots = (values > 0).nonzero(as_tuple=True)
    return samples, indices[samples, slots].long(), values[samples, slots]


def firing_counts(code: StreamCode, n_latents: int) -> Tensor:
    """Number of samples that fire each latent, [L]."""
    values, indices = code
    return torch.bincount(indices[values > 0], minlength=n_latents)


def label_counts(codes: Codes, labels: Tensor, n_latents: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first label y, c [S, L, chunk of labels]), c[s, l, y] = samples of label y that fire l in s.

    Exact up to 2^24 samples. Label by label, so that [S, L, C] never exists at once.
    """
    postings = []
    for code in codes.values():
        samples, latents, _ = firings(code)
        offsets = torch.bincount(latents, minlength=n_latents).cumsum(0)
        offsets = torch.cat([offsets.new_zeros(1), offsets])
        postings.append((samples[latents.argsort(stable=True)], offsets))
    chunk = max(1, CHUNK_ELEMENTS // (len(codes) * n_latents + len(labels)))
    for start in range(0, labels.shape[1], chunk):
        part = labels[:, start : start + chunk].float()
        counts = part.new_zeros(len(codes), n_latents, part.shape[1])
        for s, (samples, offsets) in enumerate(postings):
            if len(samples):
                counts[s] = embedding_bag(samples, part, offsets, mode="sum", include_last_offset=True)
        yield start, counts

"""The supports of the CPU backend: a GEMM by chunk of latents, screened while it is in cache, and never [N, L].

The GEMM may be bfloat16: csrc/cpu/global_topk.h bounds its error and proves the support sample by sample. Samples
without a proof go on to float32, and from there to float64, the specification itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparc_fast import _cpu
from sparc_fast.ops import pooled_topk
from sparc_fast.ops.huge_pages import lent
from sparc_fast.ops.layout import wide, wide_type
from sparc_fast.ops.reference import summed_bias

ROWS, LATENTS = 2048, 2048  # samples and latents of one GEMM
ROOM, SPARE = 8, 256  # a sample may hold ROOM k + SPARE candidates
ROOM_AT_ONCE = 2**25 // 12  # candidates of all samples that are screened together
UNLIKE = 8  # times k that a sample may well have where it is not k for each
# Samples up to which float64 at once is fastest, and from which bfloat16 pays. L = 8192, D = 2560, one Zen 4 core,
# float64 / float32 / bfloat16 in bare float32 GEMMs: 0.83 / 1.55 / 2.2 for 1 sample, 1.14 / 0.90 / 0.95 for 8,
# 2.0 / 0.80 / 0.63 for 32, - / 0.71 / 0.51 for 64, - / 1.06 / 0.51 for 1024
FEW, MANY = 2, 16


def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    screening: str = "auto",
    among: Tensor | None = None,
) -> Tensor:
    if among is not None:
        latents = among.nonzero()[:, 0]
        here = min(k, len(latents))
        found = torch.full((len(x), k), -1, dtype=torch.int32, device="cpu")
        if here:
            positions = global_topk(x, W_enc[latents], pre_bias, latent_bias[:, latents], here, screening)
            found[:, :here] = latents.int()[positions.long()]
        return found
    W, bias = _stored(W_enc.detach(), x.dtype), summed_bias(latent_bias.detach())
    indices = torch.empty(len(x), k, dtype=torch.int32, device="cpu")
    rows = _samples(k, len(W))
    with torch.autocast("cpu", enabled=False):
        for n in range(0, len(x), rows):
            centred = _centred(x[n : n + rows], pre_bias)
            indices[n : n + rows] = _support(centred, W, bias, k, _precisions(centred, screening))
    return indices


def best_rows(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    among: Callable[[Tensor], Tensor],
    screening: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The rows here that may be in the support among those of all processes: (rows int32, scores), both [N, k].

    Ascending, k at most, those that are as good as any other here; -1 and -inf for the rest of a sample. Few more are
    scored than where one process holds all rows.

    Args:
        k: of all processes' rows.
        among: float32 [n, k], that many scores here are no less than these -> [n, m], the same of all processes. Each
            calls it as often, with as many samples.
    """
    W, bias, own = _stored(W_enc.detach(), x.dtype), summed_bias(latent_bias.detach()), min(k, len(W_enc))
    rows = torch.full((len(x), k), -1, dtype=torch.int32, device="cpu")
    scores = torch.full((len(x), k), -math.inf, dtype=wide_type(x.dtype), device="cpu")
    at_once = _samples(k, 2**31)  # whatever the rows here, which other processes may have more of
    with torch.autocast("cpu", enabled=False):
        for n in range(0, len(x), at_once):
            centred = _centred(x[n : n + at_once], pre_bias)
            found = _best(centred, W, bias, own, k, among, _precisions(centred, screening) if own else [])
            rows[n : n + at_once, :own], scores[n : n + at_once, :own] = found
    return rows, scores


def _best(
    x: Tensor, W: Tensor, bias: Tensor, own: int, k: int, among: Callable[[Tensor], Tensor],
    precisions: list[torch.dtype],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`best_rows` of few enough samples, of as many rows as there can be here."""
    N, threads = len(x), torch.get_num_threads()
    indices = torch.full((N, own), -1, dtype=torch.int32, device="cpu")
    scores = torch.full((N, own), -math.inf, dtype=x.dtype, device="cpu")
    ends = torch.full((N, own), -math.inf, dtype=torch.float32, device="cpu")
    unproven = torch.ones(N, dtype=torch.bool, device="cpu")
    screen = _filtered(x, W, bias, own, precisions[0], _cpu.Among.row) if precisions else None
    if screen is not None:
        screen.best_ends(ends, threads)
    of_all = among(torch.nn.functional.pad(ends, (0, k - own), value=-math.inf))
    if screen is not None:
        screen.settle_among(indices, scores, unproven, of_all, k, x, W, threads)
    rest = unproven.nonzero()[:, 0]
    if own and len(rest):
        best = _support(x[rest], W, bias, own, precisions[1:])
        of_best = torch.empty(best.shape, dtype=x.dtype, device="cpu")
        _cpu.support_scores(of_best, x[rest], W, bias, best, threads)
        indices[rest], scores[rest] = best, of_best
    return indices, scores


def batch_topk(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto"
) -> Tensor:
    found = _ragged(x, W_enc, pre_bias, latent_bias, k, screening, _cpu.Among.batch)
    if found is not None:
        return found[0]
    return pooled_topk.batch_topk(global_topk, support_scores, x, W_enc, pre_bias, latent_bias, k, screening)


def latents_above(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, threshold: float, k: int, screening: str = "auto",
    sure: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    sure = threshold if sure is None else max(threshold, sure)
    found = _ragged(x, W_enc, pre_bias, latent_bias, k, screening, _cpu.Among.above, threshold, sure)
    if found is None:
        encoder = W_enc, pre_bias, latent_bias
        return pooled_topk.latents_above(global_topk, support_scores, x, *encoder, threshold, k, screening, sure)
    support, screen = found
    scores = lent(*support.shape, dtype=torch.float32)
    screen.write_scores(scores)
    return support, scores


def _centred(x: Tensor, pre_bias: Tensor) -> Tensor:
    x, pre_bias = wide(x.detach()), wide(pre_bias.detach())
    return torch.sub(x, pre_bias, out=lent(*x.shape, dtype=torch.result_type(x, pre_bias), for_long=False))


def _ragged(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str, among: Any, *bounds: float
) -> tuple[Tensor, Any] | None:
    """(the support, [N, W] with -1 where a sample has fewer latents than others; its screen), if a GEMM proves it."""
    centred, W, bias = _centred(x, pre_bias), _stored(W_enc.detach(), x.dtype), summed_bias(latent_bias.detach())
    with torch.autocast("cpu", enabled=False):
        for dtype in _precisions(centred, screening):
            screen = _filtered(centred, W, bias, k, dtype, among, *bounds)
            width = screen.settle_ragged(centred, W, torch.get_num_threads())
            if width >= 0:
                indices = lent(len(x), max(1, width), dtype=torch.int32)
                screen.write(indices)
                return indices, screen
    return None


def support_scores(x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor) -> Tensor:
    centred = _centred(x, pre_bias)
    scores = lent(*indices.shape, dtype=centred.dtype)
    W, latents = _stored(W_enc.detach(), x.dtype), indices.to(torch.int32).contiguous()
    _cpu.support_scores(scores, centred, W, summed_bias(latent_bias.detach()), latents, torch.get_num_threads())
    return scores


def topk_rows(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, int32 [N, k], ascending; ties to the lower column, NaN ranks with +inf."""
    indices = torch.empty(len(scores), k, dtype=torch.int32, device="cpu")
    _cpu.topk_rows(indices, wide(scores).contiguous(), k, torch.get_num_threads())
    return indices


def _precisions(x: Tensor, screening: str) -> list[torch.dtype]:
    """The GEMMs to try in turn before float64."""
    if x.dtype == torch.float64 or (screening == "auto" and len(x) <= FEW):
        return []
    backends: Any = torch.backends
    mkldnn = backends.mkldnn
    settings = {mkldnn.matmul.fp32_precision, mkldnn.fp32_precision, backends.fp32_precision}
    # a float32 GEMM that torch may run in fewer bits has no bound
    plain = [] if settings & {"tf32", "bf16"} else [torch.float32]
    fast = len(x) >= MANY and mkldnn.is_available() and _cpu.has_bf16_products()
    narrow = screening == "bf16" or (screening == "auto" and fast)
    return [torch.bfloat16, *plain] if narrow else plain


def _support(x: Tensor, W: Tensor, bias: Tensor, k: int, precisions: list[torch.dtype]) -> Tensor:
    if not precisions:
        return _exact(x, W, bias, k)
    indices, given_up = _screened(x, W, bias, k, precisions[0])
    rest = given_up.nonzero()[:, 0]
    if len(rest):
        indices[rest] = _support(x[rest], W, bias, k, precisions[1:])
    return indices


def _screened(x: Tensor, W: Tensor, bias: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The support [N, k] from a GEMM in this dtype, and bool [N]: where it could not be proven."""
    N = len(x)
    screen = _filtered(x, W, bias, k, dtype, _cpu.Among.row)
    indices, given_up = (
        torch.empty(N, k, dtype=torch.int32, device="cpu"),
        torch.empty(N, dtype=torch.bool, device="cpu"),
    )
    screen.settle(indices, given_up, x, W, torch.get_num_threads())
    return indices, given_up


def _filtered(
    x: Tensor, W: Tensor, bias: Tensor, k: int, dtype: torch.dtype, among: Any, least: float = -math.inf,
    sure: float = -math.inf,
) -> Any:  # fmt: skip
    """The candidates of every sample."""
    (N, D), L, threads = x.shape, len(W), torch.get_num_threads()
    chunk = _chunk(D, L)
    operand, norm, residual = _measured(x, dtype, None)
    capacity = _capacity(k if among == _cpu.Among.row else UNLIKE * k, L)
    screen = _cpu.Screen(norm, residual, bias, D, k, capacity, dtype == torch.bfloat16, among, least, sure)
    scores = lent(N * chunk, dtype=dtype, for_long=False)
    copies = lent(chunk, D, dtype=dtype, for_long=False)
    for first in range(0, L, chunk):
        rows, norm, residual = _measured(W[first : first + chunk], dtype, copies)
        product = torch.mm(operand, rows.T, out=scores[: N * len(rows)].view(N, len(rows)))
        screen.filter(product, first, norm, residual, threads)
    return screen


def _measured(w: Tensor, dtype: torch.dtype, room: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """w in this dtype, and upper bounds of its rows' norms and of what the conversion took from them."""
    norm, residual = torch.empty(2, len(w), dtype=torch.float32, device="cpu").unbind()
    copy = None
    if dtype != w.dtype:
        copy = lent(*w.shape, dtype=dtype, for_long=False) if room is None else room[: len(w)]
        if dtype == torch.float32:
            copy.copy_(w)
    rounded = copy if dtype == torch.bfloat16 else None
    _cpu.measure_rows(norm, residual, rounded, w, torch.get_num_threads())
    return w if copy is None else copy, norm, residual


def _exact(x: Tensor, W: Tensor, bias: Tensor, k: int) -> Tensor:
    """The specification, chunk by chunk: the best so far stand left of the next chunk, so that ties stay with them."""
    best, latents = x.new_empty(len(x), 0), torch.empty(len(x), 0, dtype=torch.int32, device="cpu")
    for first in range(0, len(W), LATENTS):
        rows = W[first : first + LATENTS]
        h = lent(len(x), len(rows), dtype=x.dtype, for_long=False)
        _cpu.exact_scores(h, x, rows, bias[first : first + LATENTS], torch.get_num_threads())
        numbers = torch.arange(first, first + len(rows), dtype=torch.int32, device="cpu").expand_as(h)
        best, latents = torch.cat([best, h], dim=1), torch.cat([latents, numbers], dim=1)
        kept = topk_rows(best, min(k, best.shape[1])).long()
        best, latents = best.gather(1, kept), latents.gather(1, kept)
    return latents


def _capacity(k: int, n_latents: int) -> int:
    return min(ROOM * k + SPARE, n_latents) + 64


def _samples(k: int, n_latents: int) -> int:
    return max(1, min(ROWS, ROOM_AT_ONCE // _capacity(k, n_latents)))


def _chunk(D: int, n_latents: int) -> int:
    return min(LATENTS, max(64, 2**23 // D), n_latents)


def scratch_bytes(N: int, D: int, n_latents: int, k: int, widened: bool) -> int:
    """Bytes that `global_topk` takes beside its operands, about; `widened` where x is of less than 32 bits."""
    rows, chunk = min(N, _samples(k, n_latents)), _chunk(D, n_latents)
    centred = rows * D * (4 + 2 + 4 * widened)
    return 12 * rows * _capacity(k, n_latents) + 2 * (rows + D) * chunk + centred + 6 * 8 * n_latents


def _stored(W: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights as the operators read them: float32, bfloat16 or float64, the numbers of a row side by side."""
    W = wide(W) if W.dtype == torch.float16 or dtype == torch.float64 else W
    return dense_rows(W)


def dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() or tensor[:1].is_contiguous() else tensor.contiguous()

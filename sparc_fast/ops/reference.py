"""The specification: every operator in plain PyTorch, each docstring in index notation.

Letters: S streams of widths D_s, D their sum, N samples, L latents, k active latents a sample.
Stream s owns columns ``[:, offset_s : offset_s + D_s]`` of x, pre_bias, W_enc and W_dec; below, d runs over
all D columns and s(d) is the stream that owns column d. ``indices`` is [N, k] where the streams of a sample
share one support, [N, S, k] where each has its own; I[n, s, j] reads either. An index of -1 is an empty slot: its
value is 0, its rows of weights read as zeros, and it is in no sum over entries and fires no latent.

Inputs narrower than float32 are widened first and sums are float32; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sparc_fast.ops import pooled_topk
from sparc_fast.ops.layout import by_group, gradient_dtype, stream_slices, wide, wide_type
from sparc_fast.ops.row_step import AdamStep, Bias, DecoderRows, Gradients, Rows, Samples


def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    screening: str = "auto",
    among: Tensor | None = None,
) -> Tensor:
    """indices[n] = the k latents l of largest h[n, l], of those that ``among`` says, bool [L], where it is given.

    h[n, l] = sum_d (x - pre_bias)[n, d] W_enc[l, d] + sum_s latent_bias[s, l]

    h is summed in float64 and rounded once to the type of the sums. The order of the sum depends on D alone: not on the
    batch, the thread count, the matrix library or the backend. x is centred in the type of the sums; products are
    rounded to float64, which those of float32 already are; with p_d = 0 for d >= D,

    t[0, i]     = 0 + p_i + p_{i + 256} + p_{i + 512} + ...,  from the left, i = 0 ... 255
    t[r + 1, i] = t[r, 2 i] + t[r, 2 i + 1],  and so on to  t[8, 0]
    h           = t[8, 0] + ((0 + latent_bias[0, l]) + latent_bias[1, l] + ...)

    Equal h goes to the lower latent; NaN ranks with +inf. Ascending in each row, int32, and -1 behind where there are
    fewer than k. ``screening`` is how a fast backend may look for candidates first; it changes no result, and means
    nothing here.
    """
    scores = _scores(wide(x) - wide(pre_bias), W_enc, summed_bias(latent_bias))
    return topk_rows(scores, k) if among is None else _topk_among(scores, k, among)


def _topk_among(scores: Tensor, k: int, among: Tensor) -> Tensor:
    """`topk_rows` of some columns; how many these are is not asked."""
    order = _ranked(scores).sort(dim=1, descending=True, stable=True).indices
    chosen = among[order].sort(dim=1, descending=True, stable=True)
    best = torch.gather(order, 1, chosen.indices[:, :k])
    found = torch.where(chosen.values[:, :k], best, scores.shape[1]).sort(dim=1).values
    return torch.where(found < scores.shape[1], found, -1).int()


def batch_topk(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str = "auto"
) -> Tensor:
    """indices[n] = the latents l of sample n among the k N pairs (n, l) of largest h[n, l] of `global_topk`.

    Equal h goes to the earlier sample, then to the lower latent; NaN ranks with +inf. Ascending in each row, int32
    [N, W], as wide as the sample of most latents, one slot at least: -1 behind the latents of the others.
    """
    h = _ranked(_scores(wide(x) - wide(pre_bias), W_enc, summed_bias(latent_bias)))
    return pooled_topk.ragged(_every_latent(h), pooled_topk.largest(h, k * len(h)))


def latents_above(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, threshold: float, k: int, screening: str = "auto",
    sure: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """indices[n] = the latents l with h[n, l] of `global_topk` > threshold; laid out as `batch_topk`.

    scores[n, j] = h[n, indices[n, j]] where that is at most ``sure``, by default the threshold, and +inf elsewhere: how
    far above it is, nobody asks; -inf in an empty slot. ``k``, how many latents a sample may have, and ``screening``
    change no result, and mean nothing here.
    """
    h = _ranked(_scores(wide(x) - wide(pre_bias), W_enc, summed_bias(latent_bias)))
    indices = pooled_topk.ragged(_every_latent(h), h > threshold)
    scores = h.gather(1, indices.clamp(min=0).long()) if h.shape[1] else h.new_empty(indices.shape)
    return indices, pooled_topk.told(indices, scores, threshold, sure)


def _every_latent(h: Tensor) -> Tensor:
    return torch.arange(h.shape[1], dtype=torch.int32, device=h.device).expand_as(h)


def support_scores(x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, indices: Tensor) -> Tensor:
    """scores[n, j] = h[n, indices[n, j]] of `global_topk`, as it is ranked: NaN is +inf, and a zero is +0.

    In the type of the sums, bitwise the same on every backend. ``indices`` are [N, k], none of them -1.
    """
    centred, latents = wide(x) - wide(pre_bias), indices.long()
    of_x, of_w = (_in_lanes(rows.double()) for rows in (centred, W_enc[latents]))
    sums = _sum_of_products(of_x[..., None], of_w) + summed_bias(latent_bias)[latents]
    return _ranked(sums.to(centred.dtype))


def summed_bias(latent_bias: Tensor) -> Tensor:
    """sum_s latent_bias[s] in float64, from the left."""
    total = latent_bias.new_zeros(latent_bias.shape[1], dtype=torch.float64)
    for of_stream in latent_bias:
        total = total + of_stream
    return total


LANES, PAIRS = 256, 4096  # partial sums of a score; scores that are summed at a time


def _scores(centred: Tensor, W: Tensor, bias: Tensor) -> Tensor:
    """h of `global_topk`, [N, L].

    A matrix product tells most float32 scores: those on which its sum and any other, at most ``error`` apart, agree.
    """
    x, weights = centred.double(), W.double()
    if torch.compiler.is_compiling():  # no shape may depend on data
        return (_sum_of_products(_in_lanes(x)[..., None], _in_lanes(weights)[:, :, None]) + bias).to(centred.dtype)
    h = x @ weights.T + bias
    norms = torch.linalg.vector_norm(x, dim=1)[:, None] * torch.linalg.vector_norm(weights, dim=1)
    error = (x.shape[1] + 8) * 2.0**-51 * (norms + bias.abs())
    told = (h - error).to(centred.dtype) == (h + error).to(centred.dtype)
    h = h.to(centred.dtype)
    for n, l in zip(*(places.split(PAIRS) for places in (~told).nonzero(as_tuple=True)), strict=True):
        h[n, l] = (_sum_of_products(_in_lanes(x[n]), _in_lanes(weights[l])) + bias[l]).to(h.dtype)
    return h


def _in_lanes(rows: Tensor) -> Tensor:
    """[..., D] as [ceil(D / 256), 256, ...], filled up with zeros; fewer lanes where the others would be zero."""
    lanes = min(LANES, 1 << (rows.shape[-1] - 1).bit_length())
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % lanes))
    return filled.view(*filled.shape[:-1], filled.shape[-1] // lanes, lanes).movedim((-2, -1), (0, 1)).contiguous()


def _sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """The sum of a b over their first two dimensions, in the order of `global_topk`."""
    sums: Any = 0.0
    for left, right in zip(a, b, strict=True):
        sums = sums + left * right
    while len(sums) > 1:
        sums = sums[::2] + sums[1::2]
    return cast(Tensor, sums[0])


def _ranked(h: Tensor) -> Tensor:
    """Scores as they rank: NaN is +inf, and both zeros are +0."""
    return torch.nan_to_num(h, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) + 0.0


def topk_rows(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, int32 [N, k], ascending; ties to the lower column, NaN ranks with +inf."""
    h = _ranked(scores)
    threshold = h.topk(k, dim=1, sorted=True).values[:, -1:]
    above, equal = h > threshold, h == threshold
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= room))
    # the j-th chosen column of a row goes to slot j, all others to a slot that is dropped: no data-dependent shape
    slot = torch.where(chosen, chosen.cumsum(1) - 1, k)
    columns = torch.arange(h.shape[1], dtype=torch.int32, device=h.device).expand_as(slot)
    return columns.new_zeros(len(h), k + 1).scatter_(1, slot, columns)[:, :k].contiguous()


def support_values(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    indices: Tensor,
    d_streams: Sequence[int],
) -> Tensor:
    """values[n, s, j] = relu(sum_{d in s} (x - pre_bias)[n, d] W_enc[l, d] + latent_bias[s, l]),  l = I[n, s, j].

    0 in an empty slot.
    """
    centred = wide(x) - wide(pre_bias)
    values = []
    for s, cols in enumerate(stream_slices(d_streams)):
        support = _support(indices, s)
        dots = (_rows(W_enc[:, cols], support) * centred[:, None, cols]).sum(-1)
        biased = dots + wide(latent_bias[s])[support.clamp_min(0)]
        values.append(torch.relu(torch.where(support < 0, 0, biased)))
    return torch.stack(values, dim=1).to(x.dtype)


def support_values_grad_x(
    grad_values: Tensor, values: Tensor, indices: Tensor, W_enc: Tensor, d_streams: Sequence[int]
) -> Tensor:
    """grad_x[n, d] = sum_j grad_z[n, s(d), j] W_enc[I[n, s(d), j], d],  grad_z = grad_values where values > 0."""
    grad_z = relu_grad(grad_values, values)
    grads = [
        (grad_z[:, s, :, None] * _rows(W_enc[:, cols], _support(indices, s))).sum(1)
        for s, cols in enumerate(stream_slices(d_streams))
    ]
    return torch.cat(grads, dim=1).to(W_enc.dtype)


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor) -> Tensor:
    """recons[n, s, d] = sum_j values[n, s, j] W_dec[I[n, s, j], d] + pre_bias[d]:  all S * S reconstructions."""
    return (_decode(wide(values), indices, W_dec) + wide(pre_bias)).to(values.dtype)


def sparse_decode_grad_values(grad_recons: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """grad_values[n, s, j] = sum_d grad_recons[n, s, d] W_dec[I[n, s, j], d]"""
    grad, S = wide(grad_recons), grad_recons.shape[1]
    dots = [(grad[:, s, None] * _rows(W_dec, _support(indices, s))).sum(-1) for s in range(S)]
    return torch.stack(dots, dim=1).to(grad_recons.dtype)


def decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decode, squared errors and their gradient, from one gather of each sample's rows.

    E[n, s, d]           = recons[n, s, d] - target[n, d]
    nmse[s, t]           = sum_n scale[n, t] sum_{d in t} E[n, s, d]^2
    loss                 = sum_{s, t} weights[s, t] nmse[s, t]           (weights row-major, source by target)
    grad_recons[n, s, d] = dloss/drecons = 2 weights[s, t] scale[n, t] E[n, s, d],  t = s(d)
    grad_values[n, s, j] = dloss/dvalues = sum_d grad_recons[n, s, d] W_dec[I[n, s, j], d]
    grad_pre_bias[d]     = dloss/dpre_bias = sum_{n, s} grad_recons[n, s, d]

    A pair (s, t) of weight 0 is not computed: its nmse and grad_recons are 0. Returns nmse [S, S], grad_recons
    [N, S, D], grad_values [N, S, k] and grad_pre_bias [D]; nmse and grad_pre_bias in the type of the sums, the others
    in the type of `gradient_dtype`.
    """
    S = len(d_streams)
    weight = torch.tensor(weights, dtype=wide_type(values.dtype), device=values.device).view(S, S)
    error = _decode(wide(values), indices, W_dec) + (wide(pre_bias) - wide(target))[:, None]
    scale = wide(scale)
    nmse = torch.zeros(S, S, dtype=error.dtype, device=error.device)
    grad_recons = torch.zeros_like(error)
    for t, cols in enumerate(stream_slices(d_streams)):
        for s in range(S):
            if weights[s * S + t] != 0:
                error_st = error[:, s, cols]
                nmse[s, t] = (scale[:, t] * error_st.square().sum(1)).sum()
                grad_recons[:, s, cols] = 2 * weight[s, t] * scale[:, t, None] * error_st
    grad_recons = grad_recons.to(gradient_dtype(values))
    return nmse, grad_recons, sparse_decode_grad_values(grad_recons, indices, W_dec), wide(grad_recons).sum((0, 1))


def nested_decode_loss(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    target: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    d_streams: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`decode_loss` of P nested dictionaries at once, the first m_0 <= m_1 <= ... <= m_{P-1} = L latents: the mean.

    m = ``sizes``, and g(l) is the first p with l < m_p: the group of latents that prefix p adds; x = ``target``.

    E[p, n, s, d]           = sum_{j: I[n, s, j] < m_p} values[n, s, j] W_dec[I[n, s, j], d] + pre_bias[d] - x[n, d]
    nmse[p, s, t]           = sum_n scale[n, t] sum_{d in t} E[p, n, s, d]^2
    loss                    = 1 / P sum_p sum_{s, t} weights[s, t] nmse[p, s, t]
    grad_recons[g, n, s, d] = 2 / P weights[s, t] scale[n, t] sum_{p >= g} E[p, n, s, d],  t = s(d): what moves group g
    grad_values[n, s, j]    = dloss/dvalues = sum_d grad_recons[g(l), n, s, d] W_dec[l, d],  l = I[n, s, j]
    grad_pre_bias[d]        = dloss/dpre_bias = sum_{n, s} grad_recons[0, n, s, d]

    Returns nmse [P, S, S], grad_recons [P, N, S, D], grad_values [N, S, k] and grad_pre_bias [D], in the types of
    `decode_loss`. Matryoshka (Bussmann et al., arXiv 2503.17547, who add them up).
    """
    P, shares, dtype = len(sizes), [weight / len(sizes) for weight in weights], gradient_dtype(values)
    losses = []
    for size in sizes:
        of_prefix = torch.where(indices < size, indices, -1)
        losses.append(decode_loss(wide(values), of_prefix, W_dec, pre_bias, target, scale, shares, d_streams))
    of_groups = [losses[-1][1]]
    for _, of_prefix, _, _ in reversed(losses[:-1]):
        of_groups.append(of_groups[-1] + of_prefix)
    grad_recons = torch.stack(of_groups[::-1]).to(dtype)
    groups = by_group(indices, sizes)
    grad_values = wide(sparse_decode_grad_values(grad_recons.flatten(0, 1), groups, W_dec)).view(P, *values.shape)
    nmse = torch.stack([of_prefix for of_prefix, _, _, _ in losses])
    return nmse, grad_recons, grad_values.sum(0).to(dtype), wide(grad_recons[0]).sum((0, 1))


def invert_indices(indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """entries[offsets[l] : offsets[l + 1]] = the flat positions p, ascending, with indices.view(-1)[p] == l.

    offsets is int64 [L + 1], entries int64 [indices.numel()]. Position p of [N, k] is sample p // k; ascending
    positions are ascending samples. The positions of empty slots are in no segment: offsets[L] is the number of the
    others, and entries[offsets[L] :] are these, ascending.
    """
    flat = indices.reshape(-1).long()
    flat = torch.where(flat < 0, n_latents, flat)
    counts = flat.new_zeros(n_latents + 1).index_add_(0, flat, torch.ones_like(flat))
    offsets = torch.cat([counts.new_zeros(1), counts[:n_latents].cumsum(0)])
    return offsets, torch.sort(flat, stable=True).indices


def encoder_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Segment sums over a latent's entries (n, j), with grad_z = grad_values where values > 0 and 0 elsewhere.

    grad_W_enc[l, d]       = sum_{(n, j): I[n, s(d), j] = l} grad_z[n, s(d), j] (x - pre_bias)[n, d]
    grad_latent_bias[s, l] = sum_{(n, j): I[n, s, j] = l} grad_z[n, s, j]
    """
    centred, grad_z = wide(x) - wide(pre_bias), relu_grad(grad_values, values)
    L, S = len(offsets) - 1, len(d_streams)
    # a row more, for what belongs to no latent
    grad_W_enc = centred.new_zeros(L + 1, sum(d_streams))
    grad_latent_bias = centred.new_zeros(S, L + 1)
    for s, cols in enumerate(stream_slices(d_streams)):
        latents, n, j = _entries_of_stream(offsets, entries, values.shape, s)
        coefficient = grad_z[n, s, j]
        grad_W_enc[:, cols].index_add_(0, latents, coefficient[:, None] * centred[n, cols])
        grad_latent_bias[s].index_add_(0, latents, coefficient)
    return grad_W_enc[:L], grad_latent_bias[:, :L].contiguous()


def decoder_gradients(values: Tensor, grad_recons: Tensor, offsets: Tensor, entries: Tensor) -> Tensor:
    """grad_W_dec[l, d] = sum_s sum_{(n, j): I[n, s, j] = l} values[n, s, j] grad_recons[n, s, d]"""
    L, S, D = len(offsets) - 1, values.shape[1], grad_recons.shape[2]
    grad_W_dec = wide(values).new_zeros(L + 1, D)  # a row more, for what belongs to no latent
    for s in range(S):
        latents, n, j = _entries_of_stream(offsets, entries, values.shape, s)
        grad_W_dec.index_add_(0, latents, wide(values[n, s, j])[:, None] * wide(grad_recons[n, s]))
    return grad_W_dec[:L]


def weight_gradients(
    x: Tensor,
    pre_bias: Tensor,
    values: Tensor,
    grad_values: Tensor,
    grad_recons: Tensor,
    offsets: Tensor,
    entries: Tensor,
    d_streams: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_W_enc [L, D], grad_W_dec [L, D], grad_latent_bias [S, L]), from one inverse index."""
    grad_W_enc, grad_latent_bias = encoder_gradients(x, pre_bias, values, grad_values, offsets, entries, d_streams)
    return grad_W_enc, decoder_gradients(values, grad_recons, offsets, entries), grad_latent_bias


def gradient_squares(
    samples: Samples, d_streams: Sequence[int], encoder: bool = True, decoder: bool = True
) -> tuple[Tensor, Tensor]:
    """squares[l] = sum_d grad_W_enc[l, d]^2 + sum_d grad_W_dec[l, d]^2,  float64 [L], for a norm over all latents.

    Of one matrix alone where that is asked for. The second result is grad_latent_bias, of use with the encoder.
    """
    x, pre_bias, values, grad_values, grad_recons, offsets, entries = samples
    squares = torch.zeros(len(offsets) - 1, dtype=torch.float64, device=values.device)
    grad_latent_bias = wide(values.new_empty(0))
    if encoder:
        operands = x, pre_bias, values, grad_values, offsets, entries
        gradient, grad_latent_bias = encoder_gradients(*operands, d_streams)
        squares += gradient.square_().sum(1)
    if decoder:
        squares += decoder_gradients(values, grad_recons, offsets, entries).square_().sum(1)
    return squares, grad_latent_bias


def update_rows(rows: Rows, samples: Samples, adam: AdamStep) -> tuple[Tensor, Tensor]:
    """One training step of every latent's rows, in place: `step_rows` with the gradients of a batch.

    Returns grad_latent_bias [S, L], and  grad_pre_bias[d] = -sum_l grad_latent_bias[s(d), l] W_enc[l, d],  the part
    that comes through the encoder as it was before the step; where the encoder stays, nothing of use.
    """
    x, pre_bias, values, grad_values, grad_recons, offsets, entries = samples
    grad_W_enc = grad_W_dec = grad_latent_bias = grad_pre_bias = wide(values.new_empty(0))
    if rows.W_enc is not None:
        operands = x, pre_bias, values, grad_values, offsets, entries
        grad_W_enc, grad_latent_bias = encoder_gradients(*operands, rows.d_streams)
        grad_pre_bias = pre_bias_gradient(grad_latent_bias, rows.W_enc, rows.d_streams)
    if rows.W_dec is not None:
        grad_W_dec = decoder_gradients(values, grad_recons, offsets, entries)
    step_rows(rows, Gradients(grad_W_enc, grad_W_dec, offsets.diff() > 0), adam)
    return grad_latent_bias, grad_pre_bias


def step_rows(rows: Rows, gradients: Gradients, adam: AdamStep) -> None:
    """One training step of every latent's rows, in place, with the gradients given.

    Per latent and stream  g -= <g, w> w / <w, w>  on the decoder (so that the norm of w does not change to first
    order), Adam on both rows, and w /= ||w|| on the decoder. Moments that are bfloat16 need a ``seed``: rows move by
    the moments as they are in float32, which are then kept as  round_to_bfloat16(moment, `rounding_noise`(seed, step,
    matrix, l)).

    ``rows.copies`` are kept equal to their rows. With ``rows.last_step``, decoder rows of latents that are not used are
    left behind, to `replay_rows` later, and those that are used are marked: their last_step becomes ``step``.

    A matrix that is None stays as it is; so does all that would be of it.
    """
    d_streams, copies, last_step = rows.d_streams, rows.copies, rows.last_step
    adam = adam._replace(seed=rounding_seed(rows.weights[0], rows.their_moments, adam.seed))
    if (W_enc := rows.W_enc) is not None:
        m, v = rows.their_moments[:2]
        apply_adam(W_enc, gradients.W_enc, m, v, *adam[:4], _noise_of_rows(adam, 0, W_enc, slice(None)))
        if copies is not None and copies[0] is not None:
            copies[0].copy_(W_enc)
    if (W_dec := rows.W_dec) is not None:
        moved: slice | Tensor = slice(None)
        if last_step is not None:
            moved = gradients.used.nonzero()[:, 0]
            last_step[moved] = int(adam.step)
        _step_decoder(W_dec, gradients.W_dec, rows.their_moments[-2:], moved, d_streams, adam)
        if copies is not None and copies[1] is not None:
            copies[1][moved] = W_dec[moved].to(copies[1].dtype)


def replay_rows(rows: DecoderRows, latents: Tensor, history: Tensor, seed: int | None = None) -> None:
    """Take decoder rows that `update_rows` left behind through the steps they missed, in place.

    ``latents`` are int64 [R], each once; ``history`` is float64 [T, 4], (lr, beta_1, beta_2, eps) of steps 1 ... T.
    Row l makes steps last_step[l] + 1 ... T with a gradient of 0, which is what a step without an entry is: Adam's
    moments still decay and move it. Bit for bit what `update_rows` without ``last_step`` would have done, with the
    same ``seed`` where moments are bfloat16.
    """
    W_dec, moments, d_streams, last_step, copy = rows
    seed = rounding_seed(W_dec, moments, seed)
    since = last_step[latents]
    for step in range(int(since.min()) + 1 if len(latents) else len(history), len(history) + 1):
        lr, beta_1, beta_2, eps = history[step - 1].tolist()
        late, none = latents[since < step], torch.zeros_like(W_dec)
        _step_decoder(W_dec, none, moments, late, d_streams, AdamStep(lr, (beta_1, beta_2), eps, step, seed))
    last_step[latents] = len(history)
    if copy is not None:
        copy[latents] = W_dec[latents].to(copy.dtype)


def _step_decoder(
    W_dec: Tensor, grad: Tensor, moments: Sequence[Tensor], rows: slice | Tensor, d_streams: Sequence[int],
    adam: AdamStep,
) -> None:  # fmt: skip
    w, m, v = (tensor[rows] for tensor in (W_dec, *moments))
    g = grad[rows].clone()  # somebody else's
    project_gradients(g, w, d_streams)
    apply_adam(w, g, m, v, *adam[:4], _noise_of_rows(adam, 1, W_dec, rows))
    normalize_rows(w, d_streams)
    for tensor, moved in zip((W_dec, *moments), (w, m, v), strict=True):
        tensor[rows] = moved


def pre_bias_gradient(grad_latent_bias: Tensor, W_enc: Tensor, d_streams: Sequence[int]) -> Tensor:
    """grad_pre_bias[d] = -sum_l grad_latent_bias[s(d), l] W_enc[l, d]:  the part that comes through the encoder."""
    parts = [grad_latent_bias[s] @ wide(W_enc[:, cols]) for s, cols in enumerate(stream_slices(d_streams))]
    return -torch.cat(parts)


def apply_adam(
    w: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    step: int | Tensor,
    noise: Tensor | None = None,
) -> None:
    """m += (1 - b1)(g - m);  v = b2 v + (1 - b2) g^2;  w -= lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    bfloat16 moments need ``noise``, what `rounding_noise` gives for these rows: they are rounded after w has moved.
    """
    mean, square = wide(m), wide(v)  # themselves, or copies
    grad = grad.to(mean.dtype)
    mean.lerp_(grad, 1 - betas[0])
    square.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    rate, scale = adam_rates(lr, betas, step, square.dtype)
    w.sub_(rate * mean / (square.sqrt() * scale).add_(eps))
    if noise is not None:
        m.copy_(round_to_bfloat16(mean, noise & 0xFFFF))
        v.copy_(round_to_bfloat16(square, noise >> 16))


def adam_rates(
    lr: float | Tensor, betas: tuple[float, float], step: int | Tensor, dtype: torch.dtype
) -> tuple[float | Tensor, float | Tensor]:
    """lr / (1 - b1^t) and 1 / sqrt(1 - b2^t), taken in float64 and rounded once; tensors stay on their device."""
    if not isinstance(lr, Tensor) and not isinstance(step, Tensor):
        return lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5
    t = torch.as_tensor(step).double()
    rate, scale = lr / (1 - betas[0] ** t), (1 - betas[1] ** t).rsqrt()
    return rate.to(dtype), scale.to(dtype)


def rounding_seed(rows: Tensor, moments: Sequence[Tensor], seed: int | None) -> int | None:
    """The seed that moments of these rows are rounded with; None where they are stored as they are.

    Raises:
        ValueError: bfloat16 moments without a seed, beside others, or of rows that are not float32.
    """
    if all(moment.dtype != torch.bfloat16 for moment in moments):
        return None
    if rows.dtype != torch.float32 or any(moment.dtype != torch.bfloat16 for moment in moments):
        dtypes = ", ".join(str(tensor.dtype) for tensor in (rows, *moments))
        raise ValueError(f"bfloat16 moments must be all of the moments of float32 rows, got rows and moments {dtypes}")
    if seed is None:
        raise ValueError("seed must be an integer where moments are bfloat16, got None")
    return seed


def round_to_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """float32 x to one of the two bfloat16 beside it, for ``random`` drawn evenly from 0 ... 65535: right on average.

    The bits of x plus ``random``, cut off after the upper 16. What bfloat16 holds stays as it is, infinity and NaN
    included; beyond the largest finite bfloat16 the upper neighbour is infinity. The sign stays.
    """
    bits = x.view(torch.int32) + random.to(torch.int32) & -0x10000
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


def rounding_noise(seed: int, step: int | Tensor, matrix: int, latents: Tensor, width: int) -> Tensor:
    """32 random bits for every weight of some rows, int64 [R, width]; the lower 16 are for its first moment, the upper
    for its second. ``matrix`` is 0 for W_enc and 1 for W_dec; ``latents`` are int64 [R].

    They are a hash of (seed, step, matrix, latent l, column d) alone. In integers modulo 2^32, with MurmurHash3's
    finalizer (Appleby) as mix:

    mix(x)         = z ^ z >> 16,  z = (y ^ y >> 13) 0xC2B2AE35,  y = (x ^ x >> 16) 0x85EBCA6B
    a, b           = 0, 0, and then for each word of  (seed, seed >> 32, step, 2 l + matrix)
    a, b           = mix(a + word), mix(b ^ mix(a + word))
    noise[l, d]    = mix(a + d)  with  (y ^ y >> 13 ^ b)  in it
    """
    a = b = latents.new_zeros(())
    for word in (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, torch.as_tensor(step).long(), 2 * latents + matrix):
        a = _mix((a + word) & 0xFFFFFFFF)
        b = _mix(b ^ a)
    return _mix((a[:, None] + torch.arange(width, device=latents.device)) & 0xFFFFFFFF, b[:, None])


def _mix(x: Tensor, key: int | Tensor = 0) -> Tensor:
    y = _times(x ^ x >> 16, 0x85EBCA6B)
    z = _times(y ^ y >> 13 ^ key, 0xC2B2AE35)
    return z ^ z >> 16


def _times(x: Tensor, factor: int) -> Tensor:
    """x factor modulo 2^32, without a product that int64 cannot hold."""
    return ((x & 0xFFFF) * factor + (((x >> 16) * factor & 0xFFFF) << 16)) & 0xFFFFFFFF


def _noise_of_rows(adam: AdamStep, matrix: int, W: Tensor, rows: slice | Tensor) -> Tensor | None:
    if adam.seed is None:
        return None
    return rounding_noise(adam.seed, adam.step, matrix, torch.arange(len(W), device=W.device)[rows], W.shape[1])


def project_gradients(grad: Tensor, W_dec: Tensor, d_streams: Sequence[int]) -> None:
    """grad[l, s] -= <grad[l, s], w> w / <w, w>,  w = W_dec[l, s]: takes out what would change the norm, in place."""
    for cols in stream_slices(d_streams):
        w, g = wide(W_dec[:, cols]), grad[:, cols]
        squared_norm = w.square().sum(1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        g -= ((g * w).sum(1, keepdim=True) / squared_norm * w).to(g.dtype)


def normalize_rows(W_dec: Tensor, d_streams: Sequence[int]) -> None:
    """W_dec[l, s] /= ||W_dec[l, s]||, in place; a zero row stays zero."""
    for cols in stream_slices(d_streams):
        w = wide(W_dec[:, cols])
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        W_dec[:, cols] = w / norm.clamp_min(torch.finfo(w.dtype).tiny)


def count_silence(silence: Tensor, values: Tensor, indices: Tensor) -> None:
    """silence[l] = samples since latent l last fired in any stream, over a batch seen as one block, in place.

    A latent that fired anywhere in the batch (a value > 0 of some stream) becomes 0; every other grows by N.
    """
    active = values > 0
    if indices.ndim == 2:
        active = active.any(1)
    fired = silence.new_zeros(len(silence) + 1)  # the last is of empty slots
    fired.index_put_((indices.reshape(-1).long(),), active.reshape(-1).to(silence.dtype), accumulate=True)
    silence.add_(len(values)).mul_(fired[:-1] == 0)


def relu_grad(grad_values: Tensor, values: Tensor) -> Tensor:
    """grad_values where values > 0, else 0, in the type of the sums."""
    return torch.where(values > 0, wide(grad_values), 0)


def _support(indices: Tensor, s: int) -> Tensor:
    return indices if indices.ndim == 2 else indices[:, s]


def _rows(W: Tensor, latents: Tensor) -> Tensor:
    """W[latents] in the type of the sums; zeros for an empty slot."""
    return wide(W[latents.clamp_min(0)]).masked_fill(latents[..., None] < 0, 0)


def _decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    # a product and a sum, not a matrix product: those sum in an order that depends on the batch
    S = values.shape[1]
    recons = [(values[:, s, :, None] * _rows(W_dec, _support(indices, s))).sum(1) for s in range(S)]
    return torch.stack(recons, dim=1)


def _entries_of_stream(offsets: Tensor, entries: Tensor, shape: torch.Size, s: int) -> tuple[Tensor, Tensor, Tensor]:
    """(latent, sample, position in the support) of every entry of stream s, by latent, then by sample.

    Those of empty slots are of latent L: no shape depends on data.
    """
    N, S, k = shape
    places = torch.arange(len(entries), device=offsets.device)
    latents = torch.searchsorted(offsets, places, right=True) - 1
    if len(entries) == N * k:
        return latents, entries // k, entries % k
    mine = torch.argsort((entries // k % S != s).int(), stable=True)[: N * k]
    return latents[mine], entries[mine] // (S * k), entries[mine] % k


ZERO_ROW = 1e-20
"""A row of smaller squared norm counts as a zero row: relative to nothing, no error can be told."""


def row_energy(x: Tensor, d_streams: Sequence[int]) -> Tensor:
    """energy[n, t] = ||x[n, t]||^2 of each stream, [N, S]."""
    return torch.stack([wide(x[:, cols]).square().sum(1) for cols in stream_slices(d_streams)], dim=1)


def nmse_scale(energy: Tensor, n_samples: int | None = None) -> Tensor:
    """scale[n, t] = 1 / (N energy[n, t]), and 0 for zero rows: what makes squared errors NMSE.

    N is `n_samples`, where these rows are only a part of those that the mean is taken over.
    """
    counted = energy >= ZERO_ROW
    N = len(energy) if n_samples is None else n_samples
    return torch.where(counted, 1 / energy.where(counted, 1.0) / max(N, 1), 0.0)


def sample_scale(x: Tensor, d_streams: Sequence[int], n_samples: int | None = None) -> tuple[Tensor, Tensor]:
    """(energy [N, S] of `row_energy`, scale [N, S] of `nmse_scale`)."""
    energy = row_energy(x, d_streams)
    return energy, nmse_scale(energy, n_samples)


def weighted_sum(nmse: Tensor, weights: Sequence[float]) -> Tensor:
    """sum_{s, t} weights[s, t] nmse[s, t], without those of weight 0; nothing is copied to the device for it."""
    terms = [value * weight for value, weight in zip(nmse.reshape(-1), weights, strict=True) if weight]
    return torch.stack(terms).sum() if terms else nmse.sum() * 0


def loss_summary(
    nmse: Tensor, auxk: Tensor | None, energy: Tensor, weights: Sequence[float], auxk_coef: float
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """What a loss is told by, from nmse [S, S] and energy [N, S].

    total     = sum_{s, t} weights[s, t] nmse[s, t] + auxk
    self      = mean_s nmse[s, s]
    cross     = mean_{s != t} nmse[s, t];  None where no such pair has a weight
    auxk      = auxk / auxk_coef, or None
    nmse
    zero_rows = [S], samples whose energy is below ZERO_ROW
    """
    S = len(nmse)
    total, nmse = weighted_sum(nmse, weights), nmse.detach()
    if auxk is not None:
        total, auxk = total + auxk, auxk.detach() / auxk_coef
    itself = torch.eye(S, dtype=torch.bool, device=nmse.device)
    cross = nmse.masked_fill(itself, 0).sum() / (S * (S - 1)) if has_cross(weights, S) else None
    return total, nmse.diagonal().mean(), cross, auxk, nmse, (energy < ZERO_ROW).sum(0)


def has_cross(weights: Sequence[float], S: int) -> bool:
    """Whether some weight [S, S] is of two streams."""
    return any(weight != 0 for i, weight in enumerate(weights) if i % (S + 1))


def step_biases(biases: Sequence[Bias], adam: AdamStep) -> None:
    """A step of Adam of each bias in place, by the sum of its gradients, and its copy."""
    for bias, gradients, (mean, square), copy in biases:
        apply_adam(bias, sum(gradients[1:], gradients[0]), mean, square, *adam[:4])
        if copy is not None:
            copy.copy_(bias)


def finish_step(
    biases: Sequence[Bias],
    adam: AdamStep,
    silence: Tensor,
    values: Tensor,
    indices: Tensor,
    counted: Tensor | None,
    nmse: Tensor,
    auxk: Tensor | None,
    energy: Tensor,
    weights: Sequence[float],
    auxk_coef: float,
    count: Callable[[Tensor, Tensor, Tensor], None] = count_silence,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """What of a step is left when its rows have moved: `step_biases`, `count_silence` of values and indices, and what
    `loss_summary` returns of nmse and what follows it. `counted`, float64 [], the number of the step where the device
    keeps it, grows by 1 when nothing reads it any more.
    """
    step_biases(biases, adam)
    count(silence, values, indices)
    if counted is not None:
        counted.add_(1)
    return loss_summary(nmse, auxk, energy, weights, auxk_coef)

"""The public operators: each states its contract and checks its arguments, and nothing else does.

x [N, D] holds the streams' samples side by side, in the order of ``d_streams``; W_enc and W_dec [L, D] hold one
latent a row. `sparc_fast.ops.reference` says in index notation what each operator computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from sparc_fast.ops import autograd, backends
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import stream_slices, wide_type

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    *,
    screening: str = "auto",
    among: Tensor | None = None,
    return_scores: Literal[False] = False,
    backend: str | Backend = "auto",
) -> Tensor: ...


@overload
def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    *,
    screening: str = "auto",
    among: Tensor | None = None,
    return_scores: Literal[True],
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]: ...


def global_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    *,
    screening: str = "auto",
    among: Tensor | None = None,
    return_scores: bool = False,
    backend: str | Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The k latents whose pre-activations, summed over streams, are largest (SPARC, arXiv 2507.06265).

    Args:
        x: inputs, [N, D].
        W_enc: encoder, [L, D].
        pre_bias: subtracted from x, [D].
        latent_bias: added to each stream's pre-activations, [S, L].
        k: latents kept per sample, 1 <= k <= L.
        screening: "bf16" looks for candidates with a bfloat16 matrix product whose error is bounded sample by sample,
            and goes on in float32, then float64, where that proves nothing; "off" begins with float32; "auto" takes
            the faster. The support is the same.
        among: bool [L], the latents to choose among; all by default. How many these are is not asked of a device.
        return_scores: also return what the latents were chosen by, for shards or chunks of latents to be merged by
            (score descending, latent ascending).
        backend: "auto" or one of `sparc_fast.available_backends(x.device)`.

    Returns:
        indices, int32 [N, k], ascending in each row, with -1, empty slots, behind them where `among` says fewer than k.
        The support is exact: pre-activations are ranked by
        their float64 sums, rounded once; equal ones go to the lower latent; NaN ranks with +inf. It depends on
        neither the batch, the thread count nor the backend. No gradient.
        With ``return_scores``, (indices, scores): [N, k], float32, or float64 for float64 inputs; the same bits on
        every backend and in every batch. A NaN that was chosen is +inf, as it ranks.
    """
    _check_choice(x, W_enc, pre_bias, latent_bias, k, screening, backend, among)
    if among is not None and return_scores:
        raise ValueError("return_scores must be False with among: an empty slot has no score")
    with torch.no_grad():
        chosen = backends.resolve(backend, x.device)
        indices = chosen.global_topk(x, W_enc, pre_bias, latent_bias, k, screening, among)
        return (indices, chosen.support_scores(x, W_enc, pre_bias, latent_bias, indices)) if return_scores else indices


def local_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    *,
    d_streams: Sequence[int],
    screening: str = "auto",
    among: Tensor | None = None,
    backend: str | Backend = "auto",
) -> Tensor:
    """The k latents of largest pre-activation of each stream by itself; as `global_topk`, but int32 [N, S, k]."""
    _check_choice(x, W_enc, pre_bias, latent_bias, k, screening, backend, among, d_streams)
    with torch.no_grad():
        operator = backends.resolve(backend, x.device).global_topk
        supports = [
            operator(x[:, cols], W_enc[:, cols], pre_bias[cols], latent_bias[s : s + 1], k, screening, among)
            for s, cols in enumerate(stream_slices(d_streams))
        ]
        return torch.stack(supports, dim=1)


def batch_topk(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    k: int,
    *,
    screening: str = "auto",
    backend: str | Backend = "auto",
) -> Tensor:
    """The k N pairs of sample and latent of largest pre-activation, summed over streams, in a batch of N samples.

    BatchTopK (Bussmann et al., arXiv 2412.06410). Arguments as in `global_topk`; k is the mean over samples.

    Returns:
        indices, int32 [N, W], ascending in each row, as wide as the sample of most latents; -1, an empty slot, behind
        the latents of the others. Exact, and the same on every backend, as `global_topk`; equal pre-activations go to
        the earlier sample, then to the lower latent. No gradient.
    """
    _check_choice(x, W_enc, pre_bias, latent_bias, k, screening, backend)
    with torch.no_grad():
        return backends.resolve(backend, x.device).batch_topk(x, W_enc, pre_bias, latent_bias, k, screening)


def latents_above(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    threshold: float,
    *,
    k: int = 64,
    screening: str = "auto",
    backend: str | Backend = "auto",
) -> Tensor:
    """The latents whose pre-activation, summed over streams, is above a threshold.

    Arguments as in `global_topk`; k, about how many there are a sample, changes the time it takes alone.

    Returns:
        indices, int32 [N, W], laid out and exact as those of `batch_topk`; a sample's do not depend on others.
    """
    _check_encoder(x, W_enc, pre_bias, latent_bias)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not isinstance(threshold, float | int) or threshold != threshold:
        raise ValueError(f"threshold must be a number, got {threshold!r}")
    _check_screening(screening)
    with torch.no_grad():
        operator = backends.resolve(backend, x.device).latents_above
        return operator(x, W_enc, pre_bias, latent_bias, float(threshold), min(k, len(W_enc)), screening)[0]


def support_values(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    indices: Tensor,
    *,
    d_streams: Sequence[int],
    backend: str = "auto",
) -> Tensor:
    """Each stream's own activations on the support: ReLU of its pre-activations there.

    Args:
        x, W_enc, pre_bias, latent_bias: as in `global_topk`.
        indices: the support, int32 or int64, [N, k] shared by the streams or [N, S, k]; -1 is an empty slot, its
            value is 0.
        d_streams: widths of the S streams; their sum is D.

    Returns:
        values [N, S, k] in x's dtype. Gradients reach x, W_enc, pre_bias and latent_bias.
    """
    _check_encoder(x, W_enc, pre_bias, latent_bias, d_streams)
    _check_support(indices, x, len(d_streams), len(W_enc))
    chosen = backends.resolve(backend, x.device)
    with autograd.without_autocast(x):
        return cast(
            Tensor, _apply(autograd.SupportValues, x, W_enc, pre_bias, latent_bias, indices, tuple(d_streams), chosen)
        )


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, pre_bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Every stream's activations through every stream's dictionary: all reconstructions from one gather.

    Args:
        values: activations on the support, [N, S, k].
        indices: the support, [N, k] or [N, S, k]; nothing comes from an empty slot, -1, whose value is 0.
        W_dec: decoder, [L, D]; any column slice of it decodes to those columns alone.
        pre_bias: added to each reconstruction, [D].

    Returns:
        recons [N, S, D]: ``recons[:, s, columns of t]`` is stream t reconstructed from stream s.
        Gradients reach values, W_dec and pre_bias.
    """
    _check("values", values, ("N", "S", "k"))
    _check("W_dec", W_dec, ("L", "D"))
    _check("pre_bias", pre_bias, (W_dec.shape[1],))
    _check_together("values", values, W_dec=W_dec, pre_bias=pre_bias)
    _check_support(indices, values, values.shape[1], len(W_dec), values.shape[2])
    chosen = backends.resolve(backend, values.device)
    with autograd.without_autocast(values):
        return cast(Tensor, _apply(autograd.SparseDecode, values, indices, W_dec, pre_bias, chosen))


def reconstruction_loss(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    indices: Tensor,
    *,
    d_streams: Sequence[int],
    scale: Tensor,
    weights: Sequence[float],
    residual: Tensor | None = None,
    sizes: Sequence[int] = (),
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted squared errors of all S * S reconstructions, fused with their gradient.

    Args:
        x, W_enc, pre_bias, latent_bias, indices, d_streams: as in `support_values`; x is data, without gradient.
        W_dec: decoder, [L, D].
        scale: what each sample's squared error counts in each target stream, [N, S]; 1 / (N ||x_t||^2) gives NMSE.
        weights: S * S factors, row-major [source, target]; pairs of weight 0 cost nothing.
        residual: reconstruct this [N, D] and without the pre-bias, instead of x (AuxK).
        sizes: of P nested dictionaries, the first latents each, ascending to L (Matryoshka, arXiv 2503.17547): the loss
            is then the mean of theirs.

    Returns:
        loss: scalar; gradients reach W_enc, W_dec, pre_bias and latent_bias.
        nmse [S, S], values [N, S, k] and grad_recons [N, S, D]: what it was made of, without gradient. Of nested
        dictionaries, nmse is the last one's and grad_recons [P, N, S, D] that of what the latents see that each adds.
    """
    _check_encoder(x, W_enc, pre_bias, latent_bias, d_streams)
    _check_support(indices, x, len(d_streams), len(W_enc))
    _check("W_dec", W_dec, tuple(W_enc.shape))
    _check("scale", scale, (len(x), len(d_streams)))
    _check_together("x", x, W_dec=W_dec)
    if residual is not None:
        _check("residual", residual, tuple(x.shape))
        _check_together("x", x, residual=residual)
    if scale.dtype != wide_type(x.dtype) or scale.device != x.device:
        raise ValueError(f"scale must be {wide_type(x.dtype)} on {x.device}, got {scale.dtype} on {scale.device}")
    if len(weights) != len(d_streams) ** 2:
        raise ValueError(f"weights must hold {len(d_streams) ** 2} factors, source by target, got {len(weights)}")
    if sizes and (list(sizes) != sorted(sizes) or sizes[0] < 0 or sizes[-1] != len(W_enc)):
        raise ValueError(f"sizes must ascend to n_latents={len(W_enc)}, got {tuple(sizes)}")
    arguments = (x, W_enc, W_dec, pre_bias, latent_bias, indices, residual, scale)
    found = autograd.reconstruct(*arguments, weights, d_streams, backends.resolve(backend, x.device), sizes)
    return cast(tuple[Tensor, Tensor, Tensor, Tensor], found[:4])


def invert_indices(indices: Tensor, n_latents: int, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Where each latent occurs: a stable counting sort of the support.

    Args:
        indices: the support, [N, k] or [N, S, k], each in 0 … n_latents - 1, or -1 for an empty slot.
        n_latents: L.

    Returns:
        offsets int64 [L + 1] and entries int64 [indices.numel()]: latent l occurs at the flat positions
        ``entries[offsets[l] : offsets[l + 1]]``, ascending. Empty slots are at ``entries[offsets[L] :]``.
    """
    if indices.ndim not in (2, 3) or indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"indices must be int32 or int64 [N, k] or [N, S, k], got {indices.dtype} {list(indices.shape)}"
        )
    _check_range(indices, n_latents)
    return backends.resolve(backend, indices.device).invert_indices(indices, n_latents)


def _apply(function: type[torch.autograd.Function], *arguments: object) -> Any:
    return function.apply(*arguments)  # type: ignore[no-untyped-call]


def _check_encoder(
    x: Tensor,
    W_enc: Tensor,
    pre_bias: Tensor,
    latent_bias: Tensor,
    d_streams: Sequence[int] | None = None,
) -> None:
    _check("x", x, ("N", "D"))
    _check("W_enc", W_enc, ("L", x.shape[1]))
    _check("pre_bias", pre_bias, (x.shape[1],))
    if d_streams is None:
        _check("latent_bias", latent_bias, ("S", len(W_enc)))
    else:
        if sum(d_streams) != x.shape[1] or min(d_streams, default=0) < 1:
            raise ValueError(
                f"d_streams must be widths of at least 1 that add up to D={x.shape[1]}, got {tuple(d_streams)}"
            )
        _check("latent_bias", latent_bias, (len(d_streams), len(W_enc)))
    _check_together("x", x, W_enc=W_enc, pre_bias=pre_bias, latent_bias=latent_bias)


def _check_choice(
    x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str, backend: str | Backend,
    among: Tensor | None = None, d_streams: Sequence[int] | None = None,
) -> None:  # fmt: skip
    _check_encoder(x, W_enc, pre_bias, latent_bias, d_streams)
    if isinstance(backend, str) and not 1 <= k <= len(W_enc):  # else there may be latents elsewhere, too
        raise ValueError(f"k must be between 1 and n_latents={len(W_enc)}, got {k}")
    _check_screening(screening)
    if among is None:
        return
    if among.dtype != torch.bool or among.shape != W_enc.shape[:1] or among.device != W_enc.device:
        got = f"{among.dtype} {list(among.shape)} on {among.device}"
        raise ValueError(f"among must be bool [{len(W_enc)}] on {W_enc.device}, got {got}")


def _check_screening(screening: str) -> None:
    if screening not in ("auto", "bf16", "off"):
        raise ValueError(f'screening must be "auto", "bf16" or "off", got {screening!r}')


def _check_support(indices: Tensor, like: Tensor, S: int, n_latents: int, k: int | None = None) -> None:
    N = len(like)
    leading = (N,) if indices.ndim == 2 else (N, S)
    if indices.ndim not in (2, 3) or tuple(indices.shape[:-1]) != leading or k not in (None, indices.shape[-1]):
        size = "k" if k is None else f"k={k}"
        raise ValueError(f"indices must be [N={N}, {size}] or [N={N}, S={S}, {size}], got {list(indices.shape)}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.device != like.device:
        raise ValueError(f"indices must be on {like.device}, got {indices.device}")
    _check_range(indices, n_latents)


def _check_range(indices: Tensor, n_latents: int) -> None:
    # where it would wait for a device or break a graph, the range stays the caller's promise
    if indices.device.type != "cpu" or indices.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < -1 or high >= n_latents:
        raise ValueError(f"indices must lie in -1 … n_latents - 1 = {n_latents - 1}, got {low} … {high}")


def _check(name: str, tensor: Tensor, shape: tuple[int | str, ...]) -> None:
    """Raise unless tensor is a float tensor of this shape; a letter stands for any size."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must be [{expected}], got {list(tensor.shape)}")
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_together(like_name: str, like: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.dtype != like.dtype or tensor.device != like.device:
            raise ValueError(
                f"{name} must have the dtype and device of {like_name}, {like.dtype} on {like.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )

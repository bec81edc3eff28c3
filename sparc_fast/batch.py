"""A batch: some streams of N samples, checked, calibrated and side by side, with the weights of just those streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from sparc_fast import arrays
from sparc_fast.ops.layout import stream_slices, wide

Inputs = Mapping[str, Tensor] | Tensor
Arrays = Mapping[str, npt.NDArray[Any]] | npt.NDArray[Any]
Presence = Tensor | npt.NDArray[np.bool_]
Normalize = Literal["l2", "none"]
Whiten = Literal["none", "diag"]

PIECE = 4096  # samples of many that are encoded together: what is taken beside them stays small
MEASURED = 1024  # of those that are calibrated, in float64
PROBES = 8  # numbers of a row that tell most rows from zero rows


class Batch(NamedTuple):
    """Some streams of N samples side by side, and the weights for just those streams."""

    x: Tensor
    streams: tuple[str, ...]
    d_streams: tuple[int, ...]
    leading: tuple[int, ...]
    """The dimensions that were flattened to N."""
    W_enc: Tensor
    W_dec: Tensor
    pre_bias: Tensor
    latent_bias: Tensor
    present: Tensor | None = None
    """bool [N, S'], which of the streams a sample has; None where each has them all."""
    zero_rows: Tensor | None = None
    """int64 [S'], how many rows of zeros were found to be absent; None where none was looked for."""
    given: slice = slice(None)
    """The samples that were given to this process; all but where processes share their batches."""

    of_batch: int | None = None
    """How many samples the batch has, where these are not all of them."""
    latent_threshold: Tensor | None = None
    """[S', L], what latents have to score more than to fire (JumpReLU); None where they have no thresholds."""
    sets: Tensor | None = None
    """bool [n, S'], all sets of streams that some sample of the batch has, where these samples are not all of them."""

    @property
    def n_samples(self) -> int:
        return len(self.x) if self.of_batch is None else self.of_batch

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.W_dec, self.pre_bias, self.latent_bias

    @property
    def scored_by(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The operands of scores; a latent's threshold is taken off, exactly, as a further bias."""
        bias = self.latent_bias
        if self.latent_threshold is not None:
            bias = torch.cat([bias, -self.latent_threshold]).detach()
        return self.x, self.W_enc, self.pre_bias, bias

    def of_streams(self, streams: Sequence[str]) -> Batch:
        """The same batch seen through some of its streams."""
        if tuple(streams) == self.streams:
            return self
        positions = sorted({position(name, self.streams, "support_from") for name in streams})
        if not positions:
            raise ValueError(f"support_from must name at least one of the streams {self.streams}, got none")
        columns = [stream_slices(self.d_streams)[s] for s in positions]
        return self._replace(
            x=_take(self.x, columns),
            streams=tuple(self.streams[s] for s in positions),
            d_streams=tuple(self.d_streams[s] for s in positions),
            W_enc=_take(self.W_enc, columns),
            W_dec=_take(self.W_dec, columns),
            pre_bias=_take(self.pre_bias, columns),
            latent_bias=self.latent_bias[positions],
            latent_threshold=None if self.latent_threshold is None else self.latent_threshold[positions],
        )

    def by_presence(self) -> list[tuple[Tensor | None, Batch]]:
        """The batches of samples that have the same streams, with their rows here: None where it is one batch.

        A sample is thus what it would be if just its streams were given. Which sets of streams there are is read on the
        host.
        """
        if self.present is None:
            return [(None, self)]
        others = self.present[:0] if self.sets is None else self.sets
        sets, which = torch.unique(torch.cat([others, self.present]), dim=0, return_inverse=True)
        which = which[len(others) :]
        parts: list[tuple[Tensor | None, Batch]] = []
        for i, has in enumerate(sets.tolist()):
            rows = (which == i).nonzero()[:, 0]
            part = self._replace(x=self.x[rows], leading=(len(rows),), present=None, sets=None)
            parts.append((rows, part.of_streams([name for name, here in zip(self.streams, has, strict=True) if here])))
        return parts

    def encoder_of_latents(self, latents: Tensor) -> Batch:
        """The same batch before the encoder of these latents alone, without thresholds; its decoder is that of all."""
        return self._replace(W_enc=self.W_enc[latents], latent_bias=self.latent_bias[:, latents], latent_threshold=None)


class BatchSamples(NamedTuple):
    """The fields of a `Batch` that are no weights."""

    x: Tensor
    streams: tuple[str, ...]
    d_streams: tuple[int, ...]
    leading: tuple[int, ...]
    present: Tensor | None = None
    zero_rows: Tensor | None = None
    given: slice = slice(None)
    of_batch: int | None = None
    sets: Tensor | None = None


class AllStreams:
    """Puts what was computed for some streams among nothing for the others: zeros, and empty slots."""

    def __init__(self, d_streams: Mapping[str, int], batch: Batch) -> None:
        columns = stream_slices(tuple(d_streams.values()))
        self.S, self.D = len(columns), columns[-1].stop
        self.complete = batch.streams == tuple(d_streams)
        self.present = [list(d_streams).index(name) for name in batch.streams]
        if not self.complete:
            every = torch.arange(self.D, device=batch.x.device)
            self.present_columns = torch.cat([every[columns[s]] for s in self.present])

    def columns(self, of_present: Tensor) -> Tensor:
        """[..., D'] -> [..., D]"""
        if self.complete:
            return of_present
        out = of_present.new_zeros(*of_present.shape[:-1], self.D)
        out[..., self.present_columns] = of_present
        return out

    def rows(self, of_present: Tensor) -> Tensor:
        """[..., S', j] -> [..., S, j]"""
        if self.complete:
            return of_present
        out = of_present.new_zeros(*of_present.shape[:-2], self.S, of_present.shape[-1])
        out[..., self.present, :] = of_present
        return out

    def streams(self, of_present: Tensor) -> Tensor:
        """[N, S', j] -> [N, S, j]; a support all share, [N, j], stays."""
        if self.complete or of_present.ndim == 2:
            return of_present
        nothing = 0 if of_present.is_floating_point() else -1
        out = of_present.new_full((len(of_present), self.S, of_present.shape[2]), nothing)
        out[:, self.present] = of_present
        return out


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Samples below samples. Narrower supports are filled up with empty slots, their values with 0."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    nothing = 0 if parts[0].is_floating_point() else -1
    fills = [width - part.shape[-1] for part in parts]
    # pad copies what has nothing to be filled up too
    return torch.cat([pad(x, (0, fill), value=nothing) if fill else x for x, fill in zip(parts, fills, strict=True)])


def columns_of(weights: Tensor, streams: Sequence[str], d_streams: Mapping[str, int]) -> Tensor:
    """These streams' columns of [..., D]: a view where they are adjacent, a copy where they are not."""
    named = dict(zip(d_streams, stream_slices(tuple(d_streams.values())), strict=True))
    return _take(weights, [named[name] for name in streams])


def _take(weights: Tensor, columns: Sequence[slice]) -> Tensor:
    if all(a.stop == b.start for a, b in pairwise(columns)):
        return weights[..., columns[0].start : columns[-1].stop]
    return torch.cat([weights[..., cols] for cols in columns], dim=-1)


def as_tensors(inputs: Inputs | Arrays, device: torch.device) -> Inputs:
    """The same with NumPy arrays as tensors on the device; tensors are as they were."""
    if isinstance(inputs, Mapping):
        return {name: _as_tensor(x, device) for name, x in inputs.items()}
    of_all: Tensor = _as_tensor(inputs, device)
    return of_all


def _as_tensor(x: Any, device: torch.device) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if x.dtype.kind not in "fiu":
        raise ValueError(f"inputs must be arrays of real numbers, got {x.dtype}")
    return arrays.as_tensor(x).to(device)


def side_by_side(
    inputs: Inputs, d_streams: Mapping[str, int], into: Tensor | None = None
) -> tuple[tuple[str, ...], Tensor, tuple[int, ...]]:
    """(streams given, their samples [N, D'] as they came, leading dimensions). What is copied is copied `into` this,
    where it has the place."""
    parts = streams_of(inputs, d_streams)
    leading = tuple(next(iter(parts.values())).shape[:-1])
    if isinstance(inputs, Tensor):
        return tuple(parts), inputs.reshape(-1, inputs.shape[-1]), leading
    flat = [part.reshape(-1, d_streams[name]) for name, part in parts.items()]
    if into is not None:
        alike = all(part.dtype == into.dtype and part.device == into.device for part in flat)
        if not alike or into.shape != (len(flat[0]), sum(part.shape[1] for part in flat)):
            into = None
    return tuple(parts), torch.cat(flat, dim=1, out=into), leading


def streams_of(inputs: Inputs, d_streams: Mapping[str, int]) -> dict[str, Tensor]:
    """The streams given, [..., D_s] each, in the order of `d_streams`; checks their names and shapes."""
    streams = tuple(d_streams)
    if isinstance(inputs, Tensor):
        D = sum(d_streams.values())
        if inputs.ndim < 2 or inputs.shape[-1] != D:
            raise ValueError(f"inputs must be [..., D={D}], all streams side by side, got {list(inputs.shape)}")
        columns = stream_slices(tuple(d_streams.values()))
        return {name: inputs[..., cols] for name, cols in zip(streams, columns, strict=True)}
    if not isinstance(inputs, Mapping):
        raise ValueError(
            f"inputs must map streams to tensors, or be one tensor of all of them, got {type(inputs).__name__}"
        )
    if not inputs:
        raise ValueError(f"inputs must hold at least one of the streams {streams}, got none")
    for name in inputs:
        position(name, streams, "inputs")
    present = {name: inputs[name] for name in streams if name in inputs}
    first = next(iter(present))
    for name, x in present.items():
        if not isinstance(x, Tensor) or x.layout != torch.strided or not _is_real(x.dtype):
            kind = f"{x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"inputs[{name!r}] must be a dense tensor of real numbers, got {kind}")
        if x.ndim < 2 or x.shape[-1] != d_streams[name]:
            raise ValueError(f"inputs[{name!r}] must be [..., {d_streams[name]}], got {list(x.shape)}")
        if x.shape[:-1] != present[first].shape[:-1]:
            raise ValueError(
                "inputs must hold the same samples in every stream: "
                f"{first!r} has {list(present[first].shape[:-1])}, {name!r} has {list(x.shape[:-1])}"
            )
    return present


def _is_real(dtype: torch.dtype) -> bool:
    """Whether numbers of this type can be computed with: not truth values, nor eight-bit floats."""
    return not dtype.is_complex and dtype != torch.bool and not (dtype.is_floating_point and dtype.itemsize == 1)


def check_present(
    present: Presence, streams: Sequence[str], leading: tuple[int, ...], device: torch.device
) -> Tensor | None:
    """Which of the streams each sample has, [N, S'] on `device`; None where each has them all."""
    if isinstance(present, np.ndarray):
        present = arrays.as_tensor(present)
    if not isinstance(present, Tensor) or present.dtype != torch.bool:
        got = present.dtype if isinstance(present, Tensor) else type(present).__name__
        raise ValueError(f"present must be a bool tensor, a column for each of the streams {tuple(streams)}, got {got}")
    if tuple(present.shape) != (*leading, len(streams)):
        expected = f"{list(leading)} samples by {len(streams)} streams {tuple(streams)}"
        raise ValueError(f"present must be of {expected}, got {list(present.shape)}")
    present = present.reshape(-1, len(streams))
    if present.all():
        return None
    if len(nothing := (~present.any(1)).nonzero()):
        raise ValueError(f"present must leave each sample at least one stream, got none for row {int(nothing[0])}")
    return present.to(device)


def without_absent(x: Tensor, present: Tensor, d_streams: Sequence[int]) -> Tensor:
    """x [N, D'] with 0 for the streams that a sample does not have, whatever was there."""
    columns = [present[:, s, None].expand(-1, width) for s, width in enumerate(d_streams)]
    return x.masked_fill(~torch.cat(columns, dim=1), 0)


def normalized_streams(normalize: Normalize | Mapping[str, Normalize], streams: Sequence[str]) -> dict[str, Normalize]:
    """stream -> "l2" of those whose rows are normalized, from one word for all or from some streams' own."""
    given = normalize if isinstance(normalize, Mapping) else dict.fromkeys(streams, normalize)
    for name, how in given.items():
        position(name, streams, "normalize")
        if how not in ("l2", "none"):
            raise ValueError(f'normalize must be "l2" or "none", or a table of streams, got {how!r} for {name!r}')
    return {name: "l2" for name in streams if given.get(name) == "l2"}


def unit_rows(x: Tensor, which: Sequence[bool], d_streams: Sequence[int]) -> Tensor:
    """x [N, D'] with rows of norm 1 in the streams that `which` says, in float32 or wider; a zero row stays."""
    x = wide(x)
    parts = [x[:, cols] for cols in stream_slices(d_streams)]
    return torch.cat([_unit(part) if here else part for part, here in zip(parts, which, strict=True)], dim=1)


def _unit(rows: Tensor) -> Tensor:
    largest = rows.abs().amax(1, keepdim=True)  # squares neither overflow nor vanish beside it
    rows = rows / torch.where(largest > 0, largest, 1.0)
    norm: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norm.clamp_min(1)  # only that of a zero row is below 1


def zero_rows(x: Tensor, d_streams: Sequence[int]) -> Tensor:
    """bool [N, S']: where a stream's row of x is 0 throughout, as that of an image that could not be read is."""
    return torch.stack([_is_zero(x[:, cols]) for cols in stream_slices(d_streams)], dim=1)


def _is_zero(rows: Tensor) -> Tensor:
    zero = (rows[:, :: -(-rows.shape[1] // PROBES)] == 0).all(1)
    if rows.device.type != "cpu":  # where asking which would wait for the device
        return zero & (rows == 0).all(1)
    if len(maybe := zero.nonzero()[:, 0]):
        zero[maybe] = (rows[maybe] == 0).all(1)
    return zero


def check_finite(x: Tensor, streams: Sequence[str], d_streams: Sequence[int], first: int = 0) -> None:
    """ValueError names the stream and the first row, counted from `first`, that is not finite; waits for the device."""
    # one sum sees any NaN or inf; where it overflows without them, the slow look below finds no row
    if x.numel() == 0 or math.isfinite(x.detach().sum().item()):
        return
    for name, cols in zip(streams, stream_slices(d_streams), strict=True):
        bad = (~torch.isfinite(x[:, cols]).all(1)).nonzero()[:, 0]
        if len(bad):
            raise ValueError(
                f"inputs[{name!r}] must be finite in {x.dtype}, "
                f"got NaN or infinity in {len(bad)} of {len(x)} rows, "
                f"first in row {first + int(bad[0])}"
            )


def in_pieces(
    inputs: Inputs, d_streams: Mapping[str, int], most: int, n_samples: int = 1
) -> Iterator[dict[str, Tensor]]:
    """The streams given, [n, D_s] each, so many samples at a time at most; as many pieces as of `n_samples` at least,
    the last of them empty where there are fewer."""
    flat = {name: part.reshape(-1, part.shape[-1]) for name, part in streams_of(inputs, d_streams).items()}
    N = len(next(iter(flat.values())))
    for start in range(0, max(N, n_samples), most):
        yield {name: part[start : start + most] for name, part in flat.items()}


class Moments:
    """Mean [D] and mean squared deviation [D] of samples [n, D] that come in pieces, in float64.

    Pieces are combined as in Chan et al., 1979, so they equal the measurement in one piece to rounding.
    """

    def __init__(self) -> None:
        self.n = 0
        self.mean = self.spread = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, piece: Tensor) -> None:
        if len(piece):
            x = piece.double()
            mean = x.mean(0)
            self.add_moments(len(x), mean, (x - mean).square_().mean(0))

    def add_moments(self, n: int, mean: Tensor, spread: Tensor) -> None:
        """Those of n more samples."""
        if self.n == 0:
            self.mean, self.spread = mean, spread
        else:
            apart, share = mean - self.mean, n / (self.n + n)
            self.spread = self.spread + (spread - self.spread) * share + apart.square() * (share * (1 - share))
            self.mean = self.mean + apart * share
        self.n += n


def measure(
    pieces: Iterable[tuple[Tensor, Tensor | None]], d_streams: Sequence[int], whiten: str = "none"
) -> tuple[Tensor, Tensor, list[int]]:
    """(mean [D], what `scales` says, n of each stream) of samples [n, D] in pieces, with which streams count [n, S]."""
    streams = [Moments() for _ in d_streams]
    for piece, counts in pieces:
        for s, cols in enumerate(stream_slices(d_streams)):
            rows = piece[:, cols]
            streams[s].add(rows if counts is None or bool(counts[:, s].all()) else rows[counts[:, s]])
    mean = torch.cat([moments.mean.expand(width) for moments, width in zip(streams, d_streams, strict=True)])
    spreads = [moments.spread.expand(width) for moments, width in zip(streams, d_streams, strict=True)]
    spread = torch.cat(spreads) if whiten == "diag" else torch.stack([each.sum() for each in spreads])
    return mean, scales(mean, spread, d_streams), [moments.n for moments in streams]


def spread_of(
    batches: Iterable[Batch], of_all: Callable[[dict[str, Moments]], dict[str, Moments]]
) -> dict[str, Tensor]:
    """stream -> mean_n ||x_s[n] - mean_s||^2 over those samples of some batches that have it, float64.

    `of_all` adds the samples of other processes. 0 where it is rounding alone: a stream that does not vary has nothing
    that an error could be told by.
    """
    found: dict[str, Moments] = {}
    for batch in batches:
        for s, (name, cols) in enumerate(zip(batch.streams, stream_slices(batch.d_streams), strict=True)):
            here = batch.x[:, cols] if batch.present is None else batch.x[batch.present[:, s], cols]
            found.setdefault(name, Moments()).add(here)
    varying = {}
    for name, moments in of_all(found).items():
        spread = moments.spread.sum()
        varying[name] = torch.where(spread > 1e-12 * moments.mean.square().sum(), spread, 0.0)
    return varying


def scales(mean: Tensor, spread: Tensor, d_streams: Sequence[int]) -> Tensor:
    """What inputs are divided by: rms_s of each stream, from spread [S] = rms_s^2 = mean_n ||x_s[n] - mean_s||^2.

    From the spread of each column, [D]: sqrt(D_s spread_d), by which all columns of a stream get the same variance, and
    the stream a mean squared norm of 1, as by its rms.
    """
    columns = stream_slices(d_streams)
    if len(spread) == len(columns):
        size = torch.stack([mean[cols].norm() for cols in columns])
        rms = spread.sqrt()
        return torch.where(rms > 1e-6 * size, rms, 1.0)  # a constant stream has no scale of its own
    of_streams = scales(mean, torch.stack([spread[cols].sum() for cols in columns]), d_streams)
    widths = torch.tensor(d_streams, device=mean.device)
    deviation = spread.sqrt()
    own = deviation * widths.double().sqrt().repeat_interleave(widths)
    # nor has a constant column; what noise it has stays as small beside the others as it is
    return torch.where(deviation > 1e-6 * mean.abs(), own, of_streams.repeat_interleave(widths))


def scales_of(rms: Tensor, d_streams: Sequence[int]) -> Sequence[Tensor]:
    """What each stream is divided by: one number of [S], or one a column of [D]."""
    return rms.unbind() if len(rms) == len(d_streams) else torch.split(rms, list(d_streams))


def calibrate(x: Tensor, mean: Tensor, rms: Sequence[Tensor], d_streams: Sequence[int]) -> Tensor:
    """(x_s - mean_s) / rms_s of every stream, its rms one number or one a column, in float32 or wider."""
    parts = [(x[:, cols] - mean[cols]) / rms[s] for s, cols in enumerate(stream_slices(d_streams))]
    return torch.cat(parts, dim=1)


def as_names(given: str | Collection[str]) -> tuple[str, ...]:
    """Names, of which there may be one alone; what are none are told by whoever looks them up."""
    return tuple(given) if isinstance(given, Collection) and not isinstance(given, str) else (given,)


def position(name: str, streams: Sequence[str], argument: str) -> int:
    """Where a stream stands; ValueError says that `argument` must be one of them."""
    if name not in streams:
        raise ValueError(f"{argument} must be one of the streams {tuple(streams)}, got {name!r}")
    return list(streams).index(name)

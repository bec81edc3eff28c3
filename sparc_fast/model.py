"""SPARC: one sparse latent space for several streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from sparc_fast import batch, checkpoint
from sparc_fast.batch import (
    AllStreams,
    Arrays,
    Batch,
    BatchSamples,
    Inputs,
    Normalize,
    Presence,
    Whiten,
    columns_of,
    position,
)  # fmt: skip
from sparc_fast.codes import SparseLatents
from sparc_fast.objective import Loss, Objective, SparcLoss, fired, nested_sizes, of_all_replicas
from sparc_fast.ops import backends, functional, reference
from sparc_fast.ops.huge_pages import empty_rows
from sparc_fast.ops.layout import stream_slices
from sparc_fast.selection import BY_THRESHOLD, LOCAL, RULES, Private, Selection, Thresholds, encode, select
from sparc_fast.selection.jumprelu import BANDWIDTH, SPARSITY_COEF, JumpReLU
from sparc_fast.sizes import is_number
from sparc_fast.whole import WHOLE, Whole

if TYPE_CHECKING:
    from sparc_fast.interop.hub import Card


@dataclass(frozen=True)
class SparcOutput:
    """What `SPARC.forward` returns."""

    codes: SparseLatents
    recons: dict[tuple[str, str], Tensor]
    """(source, target) -> [..., D_target]; sources are the streams given, targets all streams of the model."""
    loss: SparcLoss | None
    """The objective without AuxK, differentiable, when every stream was given; else None."""


class SPARC(nn.Module):
    """A TopK sparse autoencoder over several streams that share one latent space (arXiv 2507.06265).

    A latent is a row: ``W_enc[l]`` and ``W_dec[l]`` hold the weights of latent l for all streams, side by side in
    the order of `d_streams`. Decoder rows have unit norm in each stream; call `project_gradients_` before and
    `normalize_decoder_` after every optimizer step to keep them so (`SparcAdam` and `Trainer` do it).

    To a calibrated model a row of zeros is a stream that its sample lacks; but under torch.compile and in a CUDA graph,
    which wait for no answer, it is its stream's mean, of which no error is told: see `encode`.

    Args:
        d_streams: name -> width of each stream, in order.
        n_latents: L, latents in the shared dictionary.
        k: latents kept per sample, 1 <= k <= L.
        selection: "global", one support for all streams of a sample; "local", one per stream; "batch", one for all
            streams, of k latents on average: in training the k N largest of a batch, else those above a threshold that
            training learns (BatchTopK, arXiv 2412.06410); "jumprelu", those above thresholds of their own, which are
            trained so that they are k on average (JumpReLU, arXiv 2407.14435), and "local_jumprelu", the same of each
            stream.
        private: stream -> how many of the L latents are its own: they fire by its scores alone, and reconstruct it
            alone, from itself. Those of all streams are the first, `n_shared`, of which the rule chooses k; behind them
            are each stream's, in the order of the streams (`private_latents`). By default all latents are shared.
        private_k: how many of its own latents a stream fires for a sample, beside the k; one number, or one a stream.
        auxk: dead latents that reconstruct the residual during training; 0 turns AuxK off.
        dead_after: a latent is dead once no stream fired it for more than this many training samples.
        normalize: "l2" gives every row of inputs unit norm before anything else is done with it; of some streams alone
            as {name: "l2"}. Zero rows stay. Reconstructions are then of rows of unit norm (`normalized`).
        loss: what errors are told by: "nmse", each sample's squared error over its squared norm; or "fvu", all samples'
            squared errors over their squared deviations from the batch's mean, so that rows of tiny norm, of which
            every reconstruction is far off, have no more say than others. `sparc_fast.nmse` and `fvu` say it exactly.
        matryoshka: sizes of nested dictionaries, ascending, each the first latents (arXiv 2503.17547); all `n_latents`
            are always the last, named or not. Training minimises the mean of their losses, of what those latents of a
            sample's support that are in a dictionary reconstruct alone; () has one dictionary.
        sparsity_coef: under "jumprelu" and "local_jumprelu", the weight of (L0 / k - 1)^2 in the loss.
        bandwidth: there, how wide the band of scores is that move thresholds, relative to the mean threshold.
        backend: "auto", the fastest available for the inputs' device, or a name.
        check_finite: raise on NaN or infinite inputs. On a GPU this waits for the device; under torch.compile
            and in a CUDA graph it is skipped.
        dtype, device: of the weights; inputs are converted to this dtype.
    """

    W_enc: nn.Parameter
    W_dec: nn.Parameter
    pre_bias: nn.Parameter
    latent_bias: nn.Parameter
    latent_threshold: nn.Parameter | None
    input_mean: Tensor
    input_rms: Tensor
    silence: Tensor
    threshold: Tensor
    threshold_count: Tensor

    def __init__(
        self,
        d_streams: Mapping[str, int],
        n_latents: int,
        k: int,
        *,
        selection: Selection = "global",
        auxk: int = 64,
        dead_after: int = 256_000,
        private: Mapping[str, int] | None = None,
        private_k: int | Mapping[str, int] | None = None,
        normalize: Normalize | Mapping[str, Normalize] = "none",
        loss: Loss = "nmse",
        matryoshka: Sequence[int] = (),
        sparsity_coef: float = SPARSITY_COEF,
        bandwidth: float = BANDWIDTH,
        backend: str = "auto",
        check_finite: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(d_streams, Mapping) or not d_streams or not all(map(_is_stream, d_streams.items())):
            raise ValueError(f"d_streams must name at least one stream, each an integer width >= 1, got {d_streams}")
        if not all(isinstance(size, Integral) for size in (n_latents, k, auxk, dead_after)):
            raise ValueError(
                f"n_latents, k, auxk and dead_after must be integers, got {n_latents}, {k}, {auxk} and {dead_after}"
            )
        n_latents, k, auxk, dead_after = int(n_latents), int(k), int(auxk), int(dead_after)
        if dtype not in functional.FLOATS:
            raise ValueError(f"dtype must be torch.float32, bfloat16, float16 or float64, got {dtype!r}")
        if not 1 <= k <= n_latents:
            raise ValueError(f"k must be between 1 and n_latents={n_latents}, got {k}")
        if not isinstance(backend, str):
            raise ValueError(f"backend must be a name, got {backend!r}")
        if selection not in RULES:
            raise ValueError(f"selection must be one of {RULES}, got {selection!r}")
        if auxk < 0 or dead_after < 0:
            raise ValueError(f"auxk and dead_after must be >= 0, got {auxk} and {dead_after}")
        self.d_streams = {name: int(width) for name, width in d_streams.items()}
        self.n_latents, self.k, self.selection = n_latents, k, selection
        self.auxk, self.dead_after = auxk, dead_after
        self._private = Private.of(self.d_streams, n_latents, k, private, private_k)
        self.normalize = batch.normalized_streams(normalize, self.streams)
        if loss not in ("nmse", "fvu"):
            raise ValueError(f'loss must be "nmse" or "fvu", got {loss!r}')
        self.error: Loss = loss
        self.matryoshka = nested_sizes(matryoshka, n_latents, private)
        are_finite = all(is_number(one) and math.isfinite(one) for one in (sparsity_coef, bandwidth))
        if not are_finite or sparsity_coef < 0 or bandwidth <= 0:
            raise ValueError(
                f"sparsity_coef must be >= 0 and bandwidth > 0, both finite, got {sparsity_coef!r} and {bandwidth!r}"
            )
        self.jumprelu = None
        if selection in ("jumprelu", "local_jumprelu"):
            self.jumprelu = JumpReLU(selection, float(bandwidth), float(sparsity_coef))
        self.backend, self.check_finite = backend, check_finite

        S, L, D = len(self.d_streams), n_latents, sum(self.d_streams.values())
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(empty_rows(L, D, **like))
        self.W_dec = nn.Parameter(empty_rows(L, D, **like))
        self.pre_bias = nn.Parameter(torch.empty(D, **like))
        self.latent_bias = nn.Parameter(torch.empty(S, L, **like))
        self.latent_threshold = nn.Parameter(torch.empty(S, L, **like)) if self.jumprelu is not None else None
        self.register_buffer("input_mean", torch.zeros(D, dtype=torch.float32, device=device))
        self.register_buffer("input_rms", torch.ones(S, dtype=torch.float32, device=device))
        self.register_buffer("silence", torch.zeros(L, dtype=torch.int64, device=device))
        if selection in BY_THRESHOLD:
            buffers = BY_THRESHOLD[selection].empty(S, device)
            for name, buffer in zip(("threshold", "threshold_count"), buffers, strict=True):
                self.register_buffer(name, buffer)
        self._shards: Whole = WHOLE
        self._calibration: tuple[tuple[tuple[Tensor, int], ...], bool] = (), False
        self._catch_up: Callable[[], None] | None = None
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
        self.register_state_dict_pre_hook(_before_state)  # type: ignore[no-untyped-call]
        backends.resolve(backend, self.W_enc.device)
        self.reset_parameters()

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams, in the order of their columns."""
        return tuple(self.d_streams)

    @property
    def n_shared(self) -> int:
        """How many latents all streams share: the first of all."""
        return self.n_latents if self._private is None else self._private.n_shared

    @property
    def private_latents(self) -> dict[str, slice]:
        """stream -> the latents that are its own, of the streams that have some."""
        return {} if self._private is None else dict(self._private.latents)

    @property
    def _private_here(self) -> Private | None:
        """Among the latents whose weights are here."""
        if self._private is None or self._shards.is_whole:
            return self._private
        return self._private.within(self._shards.rows(self.n_latents))

    def _slots(self, streams: Sequence[str] | None = None) -> int:
        """Of the support of a sample of these streams, or of all, where a rule gives each sample k latents."""
        if self._private is None:
            return self.k
        return self.k + self._private.slots(streams or self.streams, apart=self.selection in LOCAL)

    @property
    def dead(self) -> Tensor:
        """bool [L]: no stream fired this latent in more than `dead_after` training samples."""
        return self.silence > self.dead_after

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs are scaled and centred before anything else: what the buffers say, whoever wrote them."""
        buffers = self.input_mean, self.input_rms
        if torch.compiler.is_compiling():
            return self._calibration[1]
        # on a device the answer waits; it is asked again only when a buffer was written or replaced
        versions = [0 if b.is_inference() else b._version for b in buffers]
        seen, _ = self._calibration
        if len(seen) != 2 or any(a is not b or v != w for (a, v), b, w in zip(seen, buffers, versions, strict=True)):
            changed = not self.input_mean.is_meta and bool((self.input_mean != 0).any() or (self.input_rms != 1).any())
            self._calibration = tuple(zip(buffers, versions, strict=True)), changed
        return self._calibration[1]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Encoder rows uniform in +-1/sqrt(D_s) per stream, decoder rows the same directions at unit norm, biases 0.

        Nothing is calibrated, and no latent is dead.
        """
        if self.W_enc.is_meta:  # which has no numbers, and takes its time to say so
            return
        for cols in stream_slices(tuple(self.d_streams.values())):
            bound = 1 / math.sqrt(cols.stop - cols.start)
            self._shards.draw(self.W_enc[:, cols], bound)
        self.W_dec.copy_(self.W_enc)
        self.normalize_decoder_()
        self.pre_bias.zero_()
        self.latent_bias.zero_()
        if self.latent_threshold is not None:
            self.latent_threshold.zero_()
        self.silence.zero_()
        self.input_mean.zero_()
        self.input_rms.fill_(1)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give every decoder row unit norm in each stream. Call after each optimizer step."""
        reference.normalize_rows(self.W_dec, tuple(self.d_streams.values()))
        self._clear_private()

    def _clear_private(self) -> None:
        """A private latent has no weights in other streams, whatever was written there."""
        if (private := self._private_here) is not None:
            private.clear(self.W_enc, self.W_dec, self.latent_bias)

    def _decoder(self) -> Tensor:
        """W_dec, where it is differentiated by: what must stay zero has no gradient."""
        private = self._private_here
        return self.W_dec if private is None else private.decoder(self.W_dec)

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Take out of the decoder's gradient what would only change row norms. Call before each optimizer step."""
        if self.W_dec.grad is not None:
            reference.project_gradients(self.W_dec.grad, self.W_dec, tuple(self.d_streams.values()))

    def normalized(self, inputs: Inputs | Arrays) -> dict[str, Tensor]:
        """The streams given, [..., D_s], in the units of reconstructions: with unit norm where `normalize` says so."""
        parts = batch.streams_of(self._tensors(inputs), self.d_streams)
        return {name: self._unit_rows(x.flatten(0, -2), (name,)).view_as(x) for name, x in parts.items()}

    def _unit_rows(self, x: Tensor, streams: Sequence[str]) -> Tensor:
        """Rows of these streams side by side, [N, D'], normalized."""
        which = [name in self.normalize for name in streams]
        return batch.unit_rows(x, which, [self.d_streams[name] for name in streams]) if any(which) else x

    @torch.no_grad()
    def calibrate(self, inputs: Inputs | Arrays, whiten: Whiten = "none", streams: Sequence[str] | None = None) -> None:
        """Measure each stream so that none outweighs the others in the shared support; stored with the model.

        Afterwards the model sees ``(x_s - mean_s) / rms_s`` with rms_s^2 = mean_n ||x_s[n] - mean_s||^2: centred
        streams of mean squared norm 1. Reconstructions come back in the streams' own units; losses are measured
        on the calibrated inputs. Rows that are to be normalized are, first; rows of zeros are not measured, and count
        as absent from then on (under torch.compile and in a CUDA graph as the mean: see `encode`). All streams must be
        given.

        Args:
            whiten: "diag" divides each dimension by its own standard deviation, times sqrt(D_s): centred streams of
                mean squared norm 1 as before, but all dimensions of a stream of the same variance, so that one that is
                a hundred times as large as the others does not hide them. A dimension that is constant stays small.
                Under DistributedDataParallel all processes must calibrate then, since input_rms is [D].
            streams: those whose calibration is set; that of the others, which weights may rely on, stays.
        """
        if not self._shards.is_whole:
            raise ValueError("calibrate must be called before a model's latents are shared between processes")
        if whiten not in ("none", "diag"):
            raise ValueError(f'whiten must be "none" or "diag", got {whiten!r}')
        inputs = self._tensors(inputs)
        given = tuple(batch.streams_of(inputs, self.d_streams))
        n = len(next(batch.in_pieces(inputs, self.d_streams, batch.MEASURED))[given[0]])
        if given != self.streams or not n:
            raise ValueError(
                f"inputs must hold samples of every stream {self.streams} to calibrate, got {n} of {given}"
            )
        widths = tuple(self.d_streams.values())
        pieces = ((x, ~batch.zero_rows(x, widths)) for x in self._finite_pieces(inputs))
        mean, rms, _ = batch.measure(pieces, widths, whiten)
        self._calibrate_streams(mean, rms, self.streams if streams is None else batch.as_names(streams))

    @torch.no_grad()
    def with_stream(self, name: str, width: int, *, normalize: Normalize = "none") -> SPARC:
        """A model of one stream more, the last; its weights are as of a new model, all others' a copy, bit for bit.

        Codes of the other streams are what they were. To train the new one alone, ``SparcAdam(..., freeze=streams)``
        with those there were; calibrate it alone with ``calibrate(inputs, streams=[name])``.
        """
        if not self._shards.is_whole:
            raise ValueError("with_stream must be called before a model's latents are shared between processes")
        if not isinstance(name, str) or name in self.streams:
            raise ValueError(f"name must be of a stream that is new beside {self.streams}, got {name!r}")
        streams = {"d_streams": {**self.d_streams, name: width}, "normalize": {**self.normalize, name: normalize}}
        return self._with(None, **streams)

    @torch.no_grad()
    def prefix(self, n_latents: int, k: int | None = None) -> SPARC:
        """A model of the first latents alone, which are a dictionary of their own where `matryoshka` has their number.

        Its weights are copies, its dictionaries those of `matryoshka` that fit. It chooses its supports among these
        latents: k of them, by default as many as this model's, though fewer of its k were among them in training; under
        ``selection="batch"`` those above this model's threshold, just the ones that it fires of them.
        """
        if not self._shards.is_whole:
            raise ValueError(
                "prefix must be of a whole model, not of latents that processes share: save the model, and take "
                f"SPARC.load(path).prefix({n_latents})"
            )
        most = self.n_shared
        if not isinstance(n_latents, Integral) or not 1 <= n_latents <= most:
            raise ValueError(f"n_latents must be between 1 and those that streams share, {most}, got {n_latents}")
        sizes = [size for size in self.matryoshka if size <= n_latents]
        settings = {"n_latents": n_latents, "k": min(self.k, n_latents) if k is None else k, "matryoshka": sizes}
        return self._with(slice(n_latents), **settings, private=None, private_k=None)

    def _with(self, rows: slice | None, **settings: Any) -> SPARC:
        """A model of other settings, with copies of these latents' weights, or of all."""
        like: dict[str, Any] = {"dtype": self.W_enc.dtype, "device": self.W_enc.device, "backend": self.backend}
        model = SPARC(**{**self.config(), **settings}, **like)
        model._take_over(self, rows)
        return model.train(self.training)

    @torch.no_grad()
    def _take_over(self, other: SPARC, rows: slice | None = None) -> None:
        """Become `other`, or these latents of it, in the streams that it has, whatever their order; the rest stays."""
        rows = self._shards.rows(self.n_latents) if rows is None else rows
        self.silence.copy_(other.silence[rows])
        if self.selection == other.selection and self.selection in BY_THRESHOLD:
            self._all_thresholds().take_over(other._all_thresholds())
        mean, scales = self.input_mean.clone(), list(self._scales())
        for name, theirs, scale in zip(other.streams, other._columns(), other._scales(), strict=True):
            s = self.streams.index(name)
            mine = self._columns()[s]
            for weights, given in zip((self.W_enc, self.W_dec), (other.W_enc, other.W_dec), strict=True):
                weights[:, mine].copy_(given[rows, theirs])
            self.pre_bias[mine].copy_(other.pre_bias[theirs])
            self.latent_bias[s].copy_(other.latent_bias[other.streams.index(name), rows])
            if self.latent_threshold is not None and other.latent_threshold is not None:
                self.latent_threshold[s].copy_(other.latent_threshold[other.streams.index(name), rows])
            mean[mine].copy_(other.input_mean[theirs])
            scales[s] = scale.to(mean.device)
        self._set_calibration(mean, scales)

    def _set_calibration(self, mean: Tensor, scales: Sequence[Tensor]) -> None:
        """mean [D], and of each stream one number or one a column."""
        if all(scale.ndim == 0 for scale in scales):
            rms = torch.stack(list(scales))
        else:
            widths = self.d_streams.values()
            rms = torch.cat([scale.expand(width) for scale, width in zip(scales, widths, strict=True)])
        self._make_room_for_scales(len(rms))
        self.input_mean.copy_(mean)
        self.input_rms.copy_(rms)
        _look_at_calibration(self)

    def _calibrate_streams(self, mean: Tensor, rms: Tensor, streams: Sequence[str]) -> None:
        """As was measured of all streams, in some; the others' calibration stays."""
        measured, kept = batch.scales_of(rms, tuple(self.d_streams.values())), list(self._scales())
        means = self.input_mean.to(mean, copy=True)
        for name in streams:
            s = position(name, self.streams, "streams")
            means[self._columns()[s]] = mean[self._columns()[s]]
            kept[s] = measured[s].to(self.input_rms)
        self._set_calibration(means, kept)

    @torch.no_grad()
    def learn_thresholds(self, inputs: Inputs | Arrays, present: Presence | None = None) -> None:
        """Learn the threshold of every set of the streams given once more, from the first samples of these inputs.

        Under ``selection="batch"`` and JumpReLU, whose training learns them too; other models have none.
        """
        if self.selection not in BY_THRESHOLD:
            raise ValueError(
                f"selection must be one of {tuple(BY_THRESHOLD)} for thresholds to be learned, got {self.selection!r}"
            )
        self._learn(self._batch(self._tensors(inputs), present), Thresholds.learn_all)

    def _all_thresholds(self) -> Thresholds:
        return BY_THRESHOLD[self.selection](self.threshold, self.threshold_count, self.streams, self._shards)

    def _thresholds(self) -> Thresholds | None:
        """What latents fire by where they have to beat a threshold, not each other."""
        among_each_other = self.selection == "batch" and self.training
        return self._all_thresholds() if self.selection in BY_THRESHOLD and not among_each_other else None

    def _learn_threshold(self, given: Batch) -> None:
        """Move the thresholds by a batch, in training mode only.

        Inside DistributedDataParallel, to the mean of what all processes learned, so that all have the same.
        """
        if self.selection not in BY_THRESHOLD or not self.training:
            return
        before = self.threshold_count.clone() if _is_replicated() else None
        self._learn(given, BY_THRESHOLD[self.selection].learn)
        if before is not None:
            learned = (self.threshold_count > before).to(self.threshold)
            total = torch.stack([self.threshold * learned, learned])
            torch.distributed.all_reduce(total)
            torch.distributed.all_reduce(self.threshold_count, torch.distributed.ReduceOp.MAX)
            self.threshold.copy_(torch.where(total[1] > 0, total[0] / total[1].clamp(min=1), self.threshold))

    def _learn(self, given: Batch, how: Callable[..., None]) -> None:
        private = self._private_here
        for _, part in given.by_presence():
            of_shared = part if private is None else private.shared(part)
            how(self._all_thresholds(), of_shared, self.k, self._shards.backend(self.backend, part.x.device))

    def _finite_pieces(self, inputs: Inputs) -> Iterator[Tensor]:
        first = 0
        for piece in batch.in_pieces(inputs, self.d_streams, batch.MEASURED):
            streams, x, _ = batch.side_by_side(piece, self.d_streams)
            batch.check_finite(x, streams, tuple(self.d_streams.values()), first)
            first += len(x)
            yield self._unit_rows(x, streams)

    def encode(self, inputs: Inputs | Arrays, present: Presence | None = None) -> SparseLatents:
        """Sparse codes of any non-empty subset of streams; the support is chosen from the streams given.

        A support that all streams share has the private latents of each in its last slots, which have a value in their
        own stream alone; one of a stream has its own.

        Args:
            inputs: name -> [..., D_s] with equal leading dimensions, or all streams side by side, [..., D]. NumPy
                arrays are moved to the model's device.
            present: bool [..., S'], which of the S' streams given a sample has, in the model's order; by default all,
                but for rows of zeros once the model is calibrated: what could not be read is no sample of a stream.
                A sample's code is then that of the streams it has; values of the others are 0, and their own supports,
                under local selection, empty slots: -1. Under torch.compile and in a CUDA graph, where no shape may
                depend on what inputs hold, rows of zeros are not absent: each is its stream's mean, which has a say in
                the support and a code, though no error is told of it. Given `present`, a compiled model finds what
                one that is not does, and its graph is split.
        """
        inputs = self._tensors(inputs)
        if not torch.compiler.is_compiling():
            with self._shards.agreed("encode"):
                parts = batch.streams_of(inputs, self.d_streams)
                some = next(iter(parts.values()))
                leading = tuple(some.shape[:-1])
            n_samples = self._shards.most(math.prod(leading))
            if n_samples > batch.PIECE:
                with self._shards.agreed("encode"):
                    if present is not None:
                        present = batch.check_present(present, tuple(parts), leading, some.device)
                return self._encode_in_pieces(inputs, present, n_samples).reshape(*leading)
        return self._encode_together(inputs, present)

    def _encode_in_pieces(self, inputs: Inputs, present: Presence | None, n_samples: int) -> SparseLatents:
        """Beside the inputs it takes what a piece does: autograd, if it is on, encodes each again on its way back."""
        codes, first = [], 0
        for piece in batch.in_pieces(inputs, self.d_streams, batch.PIECE, n_samples):
            n = len(next(iter(piece.values())))
            has = None if present is None else present[first : first + n]
            codes.append(
                torch.utils.checkpoint.checkpoint(
                    self._encode_together, piece, has, first, use_reentrant=False, preserve_rng_state=False
                )
            )
            first += n
        return SparseLatents.cat(codes)

    def _encode_together(self, inputs: Inputs, present: Presence | None, first: int = 0) -> SparseLatents:
        given = self._batch(inputs, present, first)
        return self._codes(given, *self._encode(given))

    def decode(self, codes: SparseLatents, source: str, target: str) -> Tensor:
        """Stream `target` reconstructed from the activations of stream `source`, [..., D_target]."""
        with self._shards.agreed("decode"):
            if not isinstance(codes, SparseLatents):
                raise ValueError(f"codes must be SparseLatents, as encode gives them, got {type(codes).__name__}")
            if codes.n_latents != self.n_latents:
                raise ValueError(f"codes must be of a model with n_latents={self.n_latents}, got {codes.n_latents}")
            position(source, codes.streams, "source")
            values, indices = codes.stream(source)
            if self._private is not None:
                values = self._private.heard(values, indices, source)
            t = position(target, self.streams, "target")
        cols = self._columns()[t]
        k = values.shape[-1]
        decode = partial(
            functional.sparse_decode, W_dec=self._decoder()[:, cols], pre_bias=self.pre_bias[cols], backend=self.backend
        )
        recons = self._shards.decode(decode, values.reshape(-1, 1, k), indices.reshape(-1, k))
        recons = recons.reshape(*values.shape[:-1], cols.stop - cols.start)
        return self._uncalibrate(recons, t)

    def translate(self, inputs: Inputs | Arrays, source: str, target: str) -> Tensor:
        """Stream `target` predicted from stream `source` alone, [..., D_target]; `target` may be absent."""
        with self._shards.agreed("translate"):
            position(source, self.streams, "source")
            parts = batch.streams_of(self._tensors(inputs), self.d_streams)
            if source not in parts:
                raise ValueError(f"inputs must hold the source stream {source!r}, got {tuple(parts)}")
        return self.decode(self.encode({source: parts[source]}), source, target)

    def forward(self, inputs: Inputs | Arrays, cross_loss_coef: float = 1.0) -> SparcOutput:
        """Codes, every reconstruction, and (when all streams are given) the differentiable loss.

        `loss` computes the same objective, and AuxK, without keeping the reconstructions: train with that, or, under
        DistributedDataParallel, with this. In training mode dead counters and thresholds move as in `loss`, under
        DistributedDataParallel by the samples of all processes; the loss is there of a process's own: FVU and
        JumpReLU's penalty are over them, and BatchTopK chooses among them.
        Rows of zeros count as in `encode`: reconstructions are what `decode` makes of its codes, from an absent stream
        too.
        """
        if not self._shards.is_whole:
            raise ValueError("forward must be of a whole model: where processes share the latents, call loss or decode")
        given = self._batch(inputs)
        self._learn_threshold(given)
        values, indices = self._encode(given)
        nested = [functional.sparse_decode(values, indices, self._decoder(), self.pre_bias, backend=self.backend)]
        self._count_silence(values, indices)
        is_complete = given.streams == self.streams
        for size in reversed(self.matryoshka[:-1] if is_complete else ()):
            some = torch.where(indices < size, indices, -1)
            nested.append(functional.sparse_decode(values, some, self.W_dec, self.pre_bias, backend=self.backend))
        nested.reverse()
        objective, fired = self._objective(cross_loss_coef), None
        if self.jumprelu is not None:
            nested, fired = objective.through_thresholds(nested, given, indices, self.W_dec)
        loss = objective.over([given]).compare(nested, given, fired) if is_complete else None
        recons = nested[-1]
        named = {
            (source, target): self._uncalibrate(recons[:, s, cols], t).reshape(*given.leading, self.d_streams[target])
            for s, source in enumerate(given.streams)
            for t, (target, cols) in enumerate(zip(self.streams, self._columns(), strict=True))
        }
        return SparcOutput(self._codes(given, values, indices), named, loss)

    def loss(
        self,
        inputs: Inputs | Arrays,
        cross_loss_coef: float = 1.0,
        auxk_coef: float = 1 / 32,
        support_from: Sequence[str] | None = None,
        present: Presence | None = None,
    ) -> SparcLoss:
        """The training objective:  mean_s NMSE(s, s) + cross_loss_coef mean_{s != t} NMSE(s, t) + auxk_coef AuxK.

        Of a model with ``loss="fvu"``, FVU over the batch in place of NMSE; a stream that does not vary in it has none.
        Of nested dictionaries (`matryoshka`) the mean over all of them in place of the first two terms.
        Over the streams given: self terms of each, cross terms between every ordered pair of them. AuxK joins in
        training mode while latents are dead: the `auxk` largest of the dead latents reconstruct what each stream's
        own reconstruction left over (Gao et al., arXiv 2406.04093). In training mode the dead counters move.
        How many latents are dead is read on the host: with AuxK, torch.compile splits the graph there.

        Args:
            support_from: under global selection, the streams whose pre-activations choose the support; by default
                all that are given. A random subset in every batch teaches single streams to choose it alone.
            present: as in `encode`, also where it is not given. A sample's loss is that of the streams it has, and the
                batch's the mean over samples; what a sample does not have is in no error and no gradient, whatever the
                inputs hold there.
        """
        given = self._batch(inputs, present)
        objective = self._objective(cross_loss_coef, auxk_coef, support_from).over([given])
        self._learn_threshold(given)
        parts = objective.choose(given)
        flows = [part.measure(given.n_samples) for part in parts]
        if self.training:
            every = self.d_streams if self._shards.has_replicas else None
            self._count_silence(*self._shards.of_replicas(*fired(parts, flows, every)))
        terms = {part.batch.streams: flow.terms() for part, flow in zip(parts, flows, strict=True)}
        terms = of_all_replicas(terms, self._shards, self.W_enc.device)
        return objective.summarize(terms, given.streams, given.zero_rows)

    def _objective(
        self,
        cross_loss_coef: float,
        auxk_coef: float = 0.0,
        support_from: Sequence[str] | None = None,
        reads_host: bool = True,
    ) -> Objective:
        if not torch.compiler.is_compiling():
            for name, coef in (("cross_loss_coef", cross_loss_coef), ("auxk_coef", auxk_coef)):
                if not is_number(coef) and not isinstance(coef, Tensor):
                    raise ValueError(f"{name} must be a number, got {coef!r}")
            support_from = None if support_from is None else batch.as_names(support_from)
        dead = self.dead if self.training and self.auxk and auxk_coef else None
        n_dead = 0
        if dead is not None and reads_host:
            dead = dead.nonzero()[:, 0]  # before this batch's work is under way, so that the host need not wait for it
            n_dead = self._shards.total(len(dead))
            dead = dead if n_dead else None
        return Objective(
            self.selection,
            self.k,
            self.backend,
            cross_loss_coef,
            support_from,
            self.auxk,
            auxk_coef,
            dead,
            self.error,
            thresholds=self._thresholds(),
            jumprelu=self.jumprelu,
            n_dead=n_dead,
            shards=self._shards,
            sizes=self.matryoshka,
            private=self._private_here,
        )

    def _batch(self, inputs: Inputs | Arrays, present: Presence | None = None, first: int = 0) -> Batch:
        """Check inputs, of which these are rows `first` and on, and put them side by side, calibrated, with weights.

        With those of all processes that share the latents.
        """
        return self._begin_batch(inputs, present, first)()

    def _begin_batch(
        self, inputs: Inputs | Arrays, present: Presence | None = None, first: int = 0, into: Tensor | None = None
    ) -> Callable[[], Batch]:
        """`_batch` when it is called; the samples of other processes come meanwhile. `into` is memory that those given
        may take, if they need some."""
        samples = self._shards.begin_batch(partial(self._own_samples, inputs, present, first, into))
        return lambda: self._with_weights(samples())

    def _own_samples(
        self, inputs: Inputs | Arrays, present: Presence | None, first: int, into: Tensor | None
    ) -> BatchSamples:
        streams, x, leading = batch.side_by_side(self._tensors(inputs), self.d_streams, into)
        positions = [self.streams.index(name) for name in streams]
        widths = tuple(self.d_streams[name] for name in streams)
        is_zero = has = None
        if present is not None:
            has = batch.check_present(present, streams, leading, x.device)
        elif self.is_calibrated:
            is_zero = batch.zero_rows(x, widths)
        if has is not None:
            x = batch.without_absent(x, has, widths)
        x = self._unit_rows(x, streams)
        if self.is_calibrated:
            mean = columns_of(self.input_mean, streams, self.d_streams)
            scales = self._scales()
            x = batch.calibrate(x, mean, [scales[s] for s in positions], widths)
        x = x.to(self.W_enc.dtype)
        may_wait, left_out = not torch.compiler.is_compiling() and not _is_capturing(x), None
        if is_zero is not None and not (may_wait and not is_zero.any()):
            x = batch.without_absent(x, ~is_zero, widths)  # 0, not -mean / rms: no error is told of it
            if may_wait:
                found = ~is_zero | is_zero.all(1, keepdim=True)
                has, left_out = None if found.all() else found, (~found).sum(0)
        if self.check_finite and may_wait:
            batch.check_finite(x, streams, widths, first)
        return BatchSamples(x, streams, widths, leading, has, left_out)

    def _with_weights(self, samples: BatchSamples) -> Batch:
        streams, positions = samples.streams, [self.streams.index(name) for name in samples.streams]
        W_enc, W_dec, pre_bias = (
            columns_of(w, streams, self.d_streams) for w in (self.W_enc, self._decoder(), self.pre_bias)
        )
        latent_bias, latent_threshold = (
            by_stream if by_stream is None or streams == self.streams else by_stream[positions]
            for by_stream in (self.latent_bias, self.latent_threshold)
        )
        weights: dict[str, Any] = {"W_enc": W_enc, "W_dec": W_dec, "pre_bias": pre_bias, "latent_bias": latent_bias}
        weights["latent_threshold"] = latent_threshold
        if not self._shards.is_whole:  # nothing is differentiated by them
            weights = {name: None if part is None else part.detach() for name, part in weights.items()}
        return Batch(**samples._asdict(), **weights)

    def _tensors(self, inputs: Inputs | Arrays) -> Inputs:
        return batch.as_tensors(inputs, self.W_enc.device)

    def _encode(self, given: Batch) -> tuple[Tensor, Tensor]:
        """(values [N, S', k], the support), each sample's by the streams it has."""
        parts = [(rows, part, self._encode_alike(part)) for rows, part in given.by_presence()]
        if given.present is None:
            return parts[0][2]
        widths = dict(zip(given.streams, given.d_streams, strict=True))
        order = torch.cat([rows for rows, _, _ in parts if rows is not None]).argsort()
        whole = [[AllStreams(widths, part).streams(one) for one in code] for _, part, code in parts]
        values, indices = (batch.stack(ones)[order] for ones in zip(*whole, strict=True))
        return values, indices

    def _encode_alike(self, given: Batch) -> tuple[Tensor, Tensor]:
        """The same of samples that all have these streams."""
        chosen = self.selection, given, self.k
        settings: Any = {"thresholds": self._thresholds(), "private": self._private_here}
        settings["backend"] = self._shards.backend(self.backend, given.x.device)
        if torch.is_grad_enabled():  # values carry one
            indices, values = select(*chosen, **settings), None
        else:
            indices, values = encode(*chosen, **settings)
        if values is None:
            values = functional.support_values(
                given.x, given.W_enc, given.pre_bias, given.latent_bias, indices,
                d_streams=given.d_streams, backend=self.backend,
            )  # fmt: skip
        return self._shards.codes(values, indices)

    def _codes(self, given: Batch, values: Tensor, indices: Tensor) -> SparseLatents:
        values, indices = (part[given.given].reshape(*given.leading, *part.shape[1:]) for part in (values, indices))
        return SparseLatents(values, indices, given.streams, self.n_latents)

    @torch.no_grad()
    def _count_silence(self, values: Tensor, indices: Tensor) -> None:
        """Move the dead counters by a batch of codes; in training mode only.

        Inside DistributedDataParallel, by the samples of all processes, so that a latent is dead on all or none.
        """
        if not self.training:
            return
        count = backends.resolve(self.backend, values.device).count_silence
        if not _is_replicated():
            count(self.silence, values, indices)
            return
        of_batch = torch.full_like(self.silence, 1)
        count(of_batch, values, indices)  # 0 where a latent fired
        fired = (of_batch == 0).to(torch.int64)
        samples = torch.tensor(len(values), dtype=torch.int64, device=values.device)
        for part in (fired, samples):
            torch.distributed.all_reduce(part)
        self.silence.copy_(torch.where(fired > 0, 0, self.silence + samples))

    def _before_reading_decoder(self, catch_up: Callable[[], None]) -> None:
        """Have `catch_up` called before this model reads its decoder: for an optimizer that leaves rows behind."""
        self._make_current()
        self._catch_up = catch_up

    def _make_current(self) -> None:
        catch_up = self.__dict__.get("_catch_up")
        if catch_up is not None:
            catch_up()

    @contextmanager
    def _rows_left_behind(self) -> Iterator[None]:
        """Here decoder rows are read as the optimizer left them."""
        catch_up, self._catch_up = self._catch_up, None
        try:
            yield
        finally:
            self._catch_up = catch_up

    def __getattr__(self, name: str) -> Any:
        if name == "W_dec":
            self._make_current()
        return super().__getattr__(name)

    def named_parameters(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As on any module; with ``lazy="replay"``, decoder rows are brought up to date first."""
        self._make_current()
        return super().named_parameters(*arguments, **options)

    def save(self, path: str | Path) -> None:
        """Write weights, counters, calibration and configuration to one safetensors file, atomically."""
        self._shards.save(path, self.state_dict(), self.config())

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str | None = None, backend: str = "auto") -> SPARC:
        """The model that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, or is not a sparc_fast model.
        """
        tensors, config = checkpoint.load(path)
        dtype = tensors["W_enc"].dtype if "W_enc" in tensors else torch.float32
        try:
            with torch.random.fork_rng(devices=[]):  # the first weights are thrown away: draw nothing for them
                model = cls(**config, dtype=dtype, device=device, backend=backend)
            model.load_state_dict(tensors)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"path must be a model saved by sparc_fast, but {path} does not fit: {error}") from error
        return model

    def save_pretrained(self, folder: str | Path, card: Card | None = None) -> None:
        """Write a folder as the Hugging Face Hub shows it: see `sparc_fast.interop.hub.save_pretrained`."""
        from sparc_fast.interop import hub

        hub.save_pretrained(self, folder, card)

    def push_to_hub(self, repo_id: str, card: Card | None = None, **options: Any) -> str:
        """Upload such a folder in one commit: see `sparc_fast.interop.hub.push_to_hub` for the options."""
        from sparc_fast.interop import hub

        return hub.push_to_hub(self, repo_id, card, **options)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, device: torch.device | str | None = None, backend: str = "auto", **options: Any
    ) -> SPARC:
        """The model of a folder that `save_pretrained` wrote, or of a repository of the Hugging Face Hub, in eval mode.

        The options are huggingface_hub's: revision, token, cache_dir, force_download, local_files_only.
        """
        from sparc_fast.interop import hub

        return cls.load(hub.fetch(name, **options), device=device, backend=backend).eval()

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that are part of the model, as plain data."""
        names = ("d_streams", "n_latents", "k", "selection", "auxk", "dead_after", "check_finite")
        config = {name: getattr(self, name) for name in names}
        if self.normalize:  # files of models without are what they were
            config["normalize"] = dict(self.normalize)
        if self.matryoshka:
            config["matryoshka"] = list(self.matryoshka)
        if self.jumprelu is not None:
            config |= {"sparsity_coef": self.jumprelu.sparsity_coef, "bandwidth": self.jumprelu.bandwidth}
        if self._private is not None:
            config |= {"private": dict(self._private.counts), "private_k": dict(self._private.quotas)}
        return config if self.error == "nmse" else {**config, "loss": self.error}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config().items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SPARC:
        """A change of the weights' dtype leaves the calibration in its own: it belongs to the inputs."""
        self._make_current()
        measured = self.input_mean, self.input_rms
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.input_mean.dtype != measured[0].dtype:
            self.input_mean, self.input_rms = (buffer.to(self.input_mean.device) for buffer in measured)
        return self

    def __getstate__(self) -> dict[str, Any]:
        self._make_current()
        return {**self.__dict__, "_catch_up": None, "_calibration": ((), self.is_calibrated)}

    def _scales(self) -> Sequence[Tensor]:
        """What each stream is divided by: one number, or one a column."""
        return batch.scales_of(self.input_rms, tuple(self.d_streams.values()))

    def _make_room_for_scales(self, count: int) -> None:
        """`input_rms` is [S], or [D] where each dimension has a scale of its own."""
        if len(self.input_rms) != count and count in (len(self.d_streams), sum(self.d_streams.values())):
            self.input_rms = self.input_rms.new_ones(count)

    def _columns(self) -> list[slice]:
        return stream_slices(tuple(self.d_streams.values()))

    def _uncalibrate(self, recons: Tensor, t: int) -> Tensor:
        if not self.is_calibrated:
            return recons
        return (recons * self._scales()[t] + self.input_mean[self._columns()[t]]).to(recons.dtype)


@contextmanager
def evaluating(model: SPARC) -> Iterator[None]:
    """Eval mode here, and afterwards what there was before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _is_replicated() -> bool:
    """Whether this is the forward pass of a DistributedDataParallel."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return getattr(torch.nn.parallel.DistributedDataParallel, "_active_ddp_module", None) is not None


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _before_state(model: SPARC, *_: object) -> None:
    model._make_current()


def _before_loading(model: SPARC, state: Mapping[str, Any], prefix: str, *_: object) -> None:
    model._make_current()
    if isinstance(scales := state.get(f"{prefix}input_rms"), Tensor) and scales.ndim == 1:
        model._make_room_for_scales(len(scales))


def _look_at_calibration(model: SPARC, *_: object) -> None:
    model.is_calibrated  # noqa: B018  (a compiled model does not look at its buffers)


def _after_loading(model: SPARC, *_: object) -> None:
    model._clear_private()
    _look_at_calibration(model)


def _is_stream(item: tuple[object, object]) -> bool:
    name, width = item
    return isinstance(name, str) and isinstance(width, Integral) and int(width) >= 1

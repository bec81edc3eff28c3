"""SPARC: one sparse latent space for several streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from sparc_fast import backends, checkpoint, functional, losses, reference
from sparc_fast.huge_pages import empty_rows
from sparc_fast.losses import SparcLoss

Inputs = Mapping[str, Tensor] | Tensor
Selection = Literal["global", "local"]


@dataclass(frozen=True)
class SparseLatents:
    """A batch of codes: the few latents that are on, and how strongly each stream drives them."""

    values: Tensor
    """[..., S, k], ReLU of each stream's own pre-activations on the support: a selected latent may be 0."""
    indices: Tensor
    """int32, [..., k] shared by all streams, or [..., S, k] where each stream has its own support."""
    streams: tuple[str, ...]
    """The S streams encoded, in the model's order."""
    n_latents: int
    """L."""

    def stream(self, name: str) -> tuple[Tensor, Tensor]:
        """(values, indices) of one stream, both [..., k]."""
        s = _position(name, self.streams, "stream")
        shared = self.indices.ndim < self.values.ndim
        return self.values[..., s, :], self.indices if shared else self.indices[..., s, :]

    def dense(self, name: str) -> Tensor:
        """One stream's latents scattered to [..., L]; for inspection, since it is as large as it looks."""
        values, indices = self.stream(name)
        return values.new_zeros(*values.shape[:-1], self.n_latents).scatter(-1, indices.long(), values)


@dataclass(frozen=True)
class SparcOutput:
    """What `SPARC.forward` returns."""

    codes: SparseLatents
    recons: dict[tuple[str, str], Tensor]
    """(source, target) -> [..., D_target]; sources are the streams given, targets all streams of the model."""
    loss: SparcLoss | None
    """The objective's reconstruction part, differentiable, when every stream was given; else None."""


class Packed(NamedTuple):
    """Some streams of a batch side by side, and the model's weights for just those streams."""

    x: Tensor
    streams: tuple[str, ...]
    d_streams: tuple[int, ...]
    leading: tuple[int, ...]
    W_enc: Tensor
    W_dec: Tensor
    pre_bias: Tensor
    latent_bias: Tensor

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.W_enc, self.W_dec, self.pre_bias, self.latent_bias

    def of_streams(self, streams: Sequence[str]) -> Packed:
        """The same batch seen through some of its streams."""
        if tuple(streams) == self.streams:
            return self
        positions = sorted({_position(name, self.streams, "support_from") for name in streams})
        if not positions:
            raise ValueError(f"support_from must name at least one of the streams {self.streams}, got none")
        columns = [reference.stream_slices(self.d_streams)[s] for s in positions]
        return self._replace(
            x=_take_columns(self.x, columns),
            streams=tuple(self.streams[s] for s in positions),
            d_streams=tuple(self.d_streams[s] for s in positions),
            W_enc=_take_columns(self.W_enc, columns),
            W_dec=_take_columns(self.W_dec, columns),
            pre_bias=_take_columns(self.pre_bias, columns),
            latent_bias=self.latent_bias[positions],
        )

    def of_latents(self, latents: Tensor) -> Packed:
        """The same batch before a dictionary of these latents alone."""
        return self._replace(
            W_enc=self.W_enc[latents], W_dec=self.W_dec[latents], latent_bias=self.latent_bias[:, latents]
        )


class SPARC(nn.Module):
    """A TopK sparse autoencoder over several streams that share one latent space (arXiv 2507.06265).

    A latent is a row: ``W_enc[l]`` and ``W_dec[l]`` hold the weights of latent l for all streams, side by side in
    the order of `d_streams`. Decoder rows have unit norm in each stream; call `project_gradients_` before and
    `normalize_decoder_` after every optimizer step to keep them so (`SparcAdam` and `Trainer` do it).

    Args:
        d_streams: name -> width of each stream, in order.
        n_latents: L, latents in the shared dictionary.
        k: latents kept per sample, 1 <= k <= L.
        selection: "global", one support for all streams of a sample; "local", one per stream.
        auxk: dead latents that reconstruct the residual during training; 0 turns AuxK off.
        dead_after: a latent is dead once no stream fired it for more than this many training samples.
        backend: "auto", the fastest available for the inputs' device, or a name.
        check_finite: raise on NaN or infinite inputs. On a GPU this waits for the device; under torch.compile
            and in a CUDA graph it is skipped.
        dtype, device: of the weights; inputs are converted to this dtype.
    """

    input_mean: Tensor
    input_rms: Tensor
    silence: Tensor

    def __init__(
        self,
        d_streams: Mapping[str, int],
        n_latents: int,
        k: int,
        *,
        selection: Selection = "global",
        auxk: int = 64,
        dead_after: int = 256_000,
        backend: str = "auto",
        check_finite: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(d_streams, Mapping) or not d_streams or not all(map(_is_stream, d_streams.items())):
            raise ValueError(f"d_streams must name at least one stream, each an integer width >= 1, got {d_streams}")
        if not all(isinstance(size, int) for size in (n_latents, k, auxk, dead_after)):
            raise ValueError(
                f"n_latents, k, auxk and dead_after must be integers, got {n_latents}, {k}, {auxk} and {dead_after}"
            )
        if dtype not in functional.FLOATS:
            raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        if not 1 <= k <= n_latents:
            raise ValueError(f"k must be between 1 and n_latents={n_latents}, got {k}")
        if selection not in ("global", "local"):
            raise ValueError(f'selection must be "global" or "local", got {selection!r}')
        if auxk < 0 or dead_after < 0:
            raise ValueError(f"auxk and dead_after must be >= 0, got {auxk} and {dead_after}")
        self.d_streams = dict(d_streams)
        self.n_latents, self.k, self.selection = n_latents, k, selection
        self.auxk, self.dead_after = auxk, dead_after
        self.backend, self.check_finite = backend, check_finite

        S, L, D = len(self.d_streams), n_latents, sum(self.d_streams.values())
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        self.W_enc = nn.Parameter(empty_rows(L, D, **like))
        self.W_dec = nn.Parameter(empty_rows(L, D, **like))
        self.pre_bias = nn.Parameter(torch.empty(D, **like))
        self.latent_bias = nn.Parameter(torch.empty(S, L, **like))
        self.register_buffer("input_mean", torch.zeros(D, device=device))
        self.register_buffer("input_rms", torch.ones(S, device=device))
        self.register_buffer("silence", torch.zeros(L, dtype=torch.int64, device=device))
        self.is_calibrated = False
        self._catch_up: Callable[[], None] | None = None
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_before_loading)  # type: ignore[no-untyped-call]
        self.register_state_dict_pre_hook(_before_saving)  # type: ignore[no-untyped-call]
        backends.resolve(backend, self.W_enc.device)
        self.reset_parameters()

    @property
    def streams(self) -> tuple[str, ...]:
        """Names of the streams, in the order of their columns."""
        return tuple(self.d_streams)

    @property
    def dead(self) -> Tensor:
        """bool [L]: no stream fired this latent in more than `dead_after` training samples."""
        return self.silence > self.dead_after

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Encoder rows uniform in +-1/sqrt(D_s) per stream, decoder rows the same directions at unit norm, biases 0."""
        for cols in reference.stream_slices(tuple(self.d_streams.values())):
            bound = 1 / math.sqrt(cols.stop - cols.start)
            self.W_enc[:, cols].uniform_(-bound, bound)
        self.W_dec.copy_(self.W_enc)
        self.normalize_decoder_()
        self.pre_bias.zero_()
        self.latent_bias.zero_()
        self.silence.zero_()

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give every decoder row unit norm in each stream. Call after each optimizer step."""
        self._make_current()
        reference.normalize_rows(self.W_dec, tuple(self.d_streams.values()))

    @torch.no_grad()
    def project_gradients_(self) -> None:
        """Take out of the decoder's gradient what would only change row norms. Call before each optimizer step."""
        if self.W_dec.grad is not None:
            self._make_current()
            reference.project_gradients(self.W_dec.grad, self.W_dec, tuple(self.d_streams.values()))

    @torch.no_grad()
    def calibrate(self, inputs: Inputs) -> None:
        """Measure each stream so that none outweighs the others in the shared support; stored with the model.

        Afterwards the model sees ``(x_s - mean_s) / rms_s`` with rms_s^2 = mean_n ||x_s[n] - mean_s||^2: centred
        streams of mean squared norm 1. Reconstructions come back in the streams' own units; losses are measured
        on the calibrated inputs. All streams must be given.
        """
        streams, x, _ = self._side_by_side(inputs)
        if streams != self.streams or not len(x):
            raise ValueError(
                f"inputs must hold samples of every stream {self.streams} to calibrate, got {len(x)} of {streams}"
            )
        self._check_rows(x, self.d_streams)
        x = x.double()
        mean = x.mean(0)
        rms = torch.stack([(x - mean)[:, cols].square().sum(1).mean().sqrt() for cols in self._columns()])
        size = torch.stack([mean[cols].norm() for cols in self._columns()])
        self.input_mean.copy_(mean)
        self.input_rms.copy_(torch.where(rms > 1e-6 * size, rms, 1.0))  # a constant stream has no scale of its own
        self._notice_calibration()

    def encode(self, inputs: Inputs | Packed) -> SparseLatents:
        """Sparse codes of any non-empty subset of streams; the support is chosen from the streams given.

        Args:
            inputs: name -> [..., D_s] with equal leading dimensions, or all streams side by side, [..., D].
        """
        packed = self.pack(inputs)
        indices = self.select(packed)
        values = functional.support_values(
            packed.x, packed.W_enc, packed.pre_bias, packed.latent_bias, indices,
            d_streams=packed.d_streams, backend=self.backend,
        )  # fmt: skip
        return SparseLatents(
            values.reshape(*packed.leading, *values.shape[1:]),
            indices.reshape(*packed.leading, *indices.shape[1:]),
            packed.streams,
            self.n_latents,
        )

    def decode(self, codes: SparseLatents, source: str, target: str) -> Tensor:
        """Stream `target` reconstructed from the activations of stream `source`, [..., D_target]."""
        self._make_current()
        if codes.n_latents != self.n_latents:
            raise ValueError(f"codes must be of a model with n_latents={self.n_latents}, got {codes.n_latents}")
        values, indices = codes.stream(source)
        t = _position(target, self.streams, "target")
        cols = self._columns()[t]
        k = values.shape[-1]
        recons = functional.sparse_decode(
            values.reshape(-1, 1, k), indices.reshape(-1, k), self.W_dec[:, cols], self.pre_bias[cols],
            backend=self.backend,
        )  # fmt: skip
        recons = recons.reshape(*values.shape[:-1], cols.stop - cols.start)
        return self._uncalibrate(recons, t)

    def translate(self, inputs: Inputs, source: str, target: str) -> Tensor:
        """Stream `target` predicted from stream `source` alone, [..., D_target]; `target` may be absent."""
        _position(source, self.streams, "source")
        parts = self._parts(inputs)
        if source not in parts:
            raise ValueError(f"inputs must hold the source stream {source!r}, got {tuple(parts)}")
        return self.decode(self.encode({source: parts[source]}), source, target)

    def forward(self, inputs: Inputs, cross_loss_coef: float = 1.0) -> SparcOutput:
        """Codes, every reconstruction, and (when all streams are given) the differentiable reconstruction loss.

        `loss` computes the same objective, and AuxK, without keeping the reconstructions: train with that.
        """
        packed = self.pack(inputs)
        codes = self.encode(packed)
        values = codes.values.reshape(-1, *codes.values.shape[-2:])
        indices = codes.indices.reshape(len(values), *codes.indices.shape[len(packed.leading) :])
        recons = functional.sparse_decode(values, indices, self.W_dec, self.pre_bias, backend=self.backend)
        self.count_silence(values, indices)
        loss = None
        if packed.streams == self.streams:
            loss = self._loss_of(recons, packed, cross_loss_coef)
        named = {
            (source, target): self._uncalibrate(recons[:, s, cols], t).reshape(*packed.leading, self.d_streams[target])
            for s, source in enumerate(packed.streams)
            for t, (target, cols) in enumerate(zip(self.streams, self._columns(), strict=True))
        }
        return SparcOutput(codes, named, loss)

    def loss(
        self,
        inputs: Inputs,
        cross_loss_coef: float = 1.0,
        auxk_coef: float = 1 / 32,
        support_from: Sequence[str] | None = None,
    ) -> SparcLoss:
        """The training objective:  mean_s NMSE(s, s) + cross_loss_coef mean_{s != t} NMSE(s, t) + auxk_coef AuxK.

        Over the streams given: self terms of each, cross terms between every ordered pair of them. AuxK joins in
        training mode while latents are dead: the `auxk` largest of the dead latents reconstruct what each stream's
        own reconstruction left over (Gao et al., arXiv 2406.04093). In training mode the dead counters move.
        How many latents are dead is read on the host: with AuxK, torch.compile splits the graph there.

        Args:
            support_from: under global selection, the streams whose pre-activations choose the support; by default
                all that are given. A random subset in every batch teaches single streams to choose it alone.
        """
        packed = self.pack(inputs)
        indices = self.select(packed, support_from=support_from)
        S = len(packed.streams)
        energy = losses.row_energy(packed.x, packed.d_streams)
        scale = losses.nmse_scale(energy)
        total, nmse, values, grad_recons = functional.reconstruction_loss(
            *packed.operands(), indices,
            d_streams=packed.d_streams, scale=scale,
            weights=losses.pair_weights(S, cross_loss_coef), backend=self.backend,
        )  # fmt: skip
        auxk = None
        dead = self.dead_latents(auxk_coef)
        if dead is not None:
            residual = losses.self_residual(grad_recons, scale, packed.d_streams)
            weighted_auxk = self._auxk_loss(packed, dead, residual, auxk_coef)
            total, auxk = total + weighted_auxk, weighted_auxk.detach() / auxk_coef
        self.count_silence(values, indices)
        return losses.summarize(total, nmse, auxk, energy, cross_loss_coef)

    def dead_latents(self, auxk_coef: float = 1.0) -> Tensor | None:
        """The latents AuxK may use now, int64 [n_dead]; None when there is nothing for it to do."""
        if not self.training or self.auxk == 0 or auxk_coef == 0:
            return None
        dead = self.dead.nonzero()[:, 0]
        return dead if len(dead) else None

    def _loss_of(self, recons: Tensor, packed: Packed, cross_loss_coef: float) -> SparcLoss:
        columns, S = self._columns(), len(packed.streams)
        pairs = [losses.nmse(recons[:, s, cols], packed.x[:, cols]) for s in range(S) for cols in columns]
        nmse = torch.stack(pairs).view(S, S)
        total = (nmse * nmse.new_tensor(losses.pair_weights(S, cross_loss_coef)).view(S, S)).sum()
        energy = losses.row_energy(packed.x, packed.d_streams)
        return losses.summarize(total, nmse.detach(), None, energy, cross_loss_coef)

    def _auxk_loss(self, packed: Packed, dead: Tensor, residual: Tensor, auxk_coef: float) -> Tensor:
        among_dead = packed.of_latents(dead)
        indices = self.select(among_dead, min(self.auxk, len(dead)))
        scale = losses.nmse_scale(losses.row_energy(residual, packed.d_streams))
        return functional.reconstruction_loss(
            *among_dead.operands(), indices,
            d_streams=packed.d_streams, scale=scale,
            weights=losses.self_weights(len(packed.streams), auxk_coef), residual=residual, backend=self.backend,
        )[0]  # fmt: skip

    def select(self, packed: Packed, k: int | None = None, support_from: Sequence[str] | None = None) -> Tensor:
        """The support of a packed batch: [N, k], or [N, S, k] under local selection."""
        if support_from is not None:
            if self.selection == "local":
                raise ValueError("support_from must be None under local selection: each stream chooses its own")
            packed = packed.of_streams(support_from)
        operands = (packed.x, packed.W_enc, packed.pre_bias, packed.latent_bias, k or self.k)
        if self.selection == "global":
            return functional.global_topk(*operands, backend=self.backend)
        return functional.local_topk(*operands, d_streams=packed.d_streams, backend=self.backend)

    def shape_of(self, inputs: Inputs) -> tuple[tuple[str, ...], int]:
        """(streams given, samples) of a batch, whose shapes it checks."""
        parts = self._parts(inputs)
        return tuple(parts), math.prod(next(iter(parts.values())).shape[:-1])

    def pack(self, inputs: Inputs | Packed, *, current: bool = True) -> Packed:
        """Check a batch, put its streams side by side as [N, D'], calibrated, with the weights they need.

        Without `current`, decoder rows stay as an optimizer left them.
        """
        if current:
            self._make_current()
        if isinstance(inputs, Packed):
            return inputs
        streams, x, leading = self._side_by_side(inputs)
        positions = [self.streams.index(name) for name in streams]
        columns = [self._columns()[s] for s in positions]
        x = self._calibrate(x, positions, columns).to(self.W_enc.dtype)
        d_streams = {name: self.d_streams[name] for name in streams}
        if self.check_finite and not torch.compiler.is_compiling() and not _is_capturing(x):
            self._check_rows(x, d_streams)
        return Packed(
            x=x,
            streams=streams,
            d_streams=tuple(d_streams.values()),
            leading=leading,
            W_enc=self.columns_of(self.W_enc, streams),
            W_dec=self.columns_of(self.W_dec, streams),
            pre_bias=self.columns_of(self.pre_bias, streams),
            latent_bias=self.latent_bias if streams == self.streams else self.latent_bias[positions],
        )

    def columns_of(self, weights: Tensor, streams: Sequence[str]) -> Tensor:
        """The columns of these streams: a view where they are adjacent, a copy where they are not."""
        return _take_columns(weights, [self._columns()[self.streams.index(name)] for name in streams])

    def before_reading_decoder(self, catch_up: Callable[[], None]) -> None:
        """Have `catch_up` called before this model reads its decoder: for an optimizer that leaves rows behind."""
        self._make_current()
        self._catch_up = catch_up

    def _make_current(self) -> None:
        if self._catch_up is not None:
            self._catch_up()

    def save(self, path: str | Path) -> None:
        """Write weights, counters, calibration and configuration to one safetensors file, atomically."""
        checkpoint.save(path, self.state_dict(), self.config())

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

    def config(self) -> dict[str, Any]:
        """The constructor's arguments that are part of the model, as plain data."""
        names = ("d_streams", "n_latents", "k", "selection", "auxk", "dead_after", "check_finite")
        return {name: getattr(self, name) for name in names}

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
        return {**self.__dict__, "_catch_up": None}

    def _notice_calibration(self) -> None:
        self.is_calibrated = bool((self.input_mean != 0).any() or (self.input_rms != 1).any())

    def _columns(self) -> list[slice]:
        return reference.stream_slices(tuple(self.d_streams.values()))

    def _side_by_side(self, inputs: Inputs) -> tuple[tuple[str, ...], Tensor, tuple[int, ...]]:
        """(streams given, their samples [N, D'] as they came, leading dimensions)."""
        parts = self._parts(inputs)
        streams = tuple(parts)
        leading = tuple(parts[streams[0]].shape[:-1])
        if isinstance(inputs, Tensor):
            return streams, inputs.reshape(-1, inputs.shape[-1]), leading
        flat = [parts[name].reshape(-1, self.d_streams[name]) for name in streams]
        return streams, torch.cat(flat, dim=1), leading

    def _parts(self, inputs: Inputs) -> dict[str, Tensor]:
        return self._split(inputs) if isinstance(inputs, Tensor) else self._check(inputs)

    def _split(self, inputs: Tensor) -> dict[str, Tensor]:
        D = sum(self.d_streams.values())
        if inputs.ndim < 2 or inputs.shape[-1] != D:
            raise ValueError(f"inputs must be [..., D={D}], all streams side by side, got {list(inputs.shape)}")
        return {name: inputs[..., cols] for name, cols in zip(self.streams, self._columns(), strict=True)}

    def _check(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"inputs must map streams to tensors, or be one tensor of all of them, got {type(inputs).__name__}"
            )
        if not inputs:
            raise ValueError(f"inputs must hold at least one of the streams {self.streams}, got none")
        for name in inputs:
            _position(name, self.streams, "inputs")
        present = {name: inputs[name] for name in self.streams if name in inputs}
        first = next(iter(present))
        for name, x in present.items():
            if not isinstance(x, Tensor) or x.is_complex():
                raise ValueError(f"inputs[{name!r}] must be a real tensor, got {_kind(x)}")
            if x.ndim < 2 or x.shape[-1] != self.d_streams[name]:
                raise ValueError(f"inputs[{name!r}] must be [..., {self.d_streams[name]}], got {list(x.shape)}")
            if x.shape[:-1] != present[first].shape[:-1]:
                raise ValueError(
                    "inputs must hold the same samples in every stream: "
                    f"{first!r} has {list(present[first].shape[:-1])}, {name!r} has {list(x.shape[:-1])}"
                )
        return present

    def _check_rows(self, x: Tensor, d_streams: Mapping[str, int]) -> None:
        # one sum sees any NaN or inf; where it overflows without them, the slow look below finds no row
        if x.numel() == 0 or torch.isfinite(x.detach().sum()):
            return
        for name, cols in zip(d_streams, reference.stream_slices(tuple(d_streams.values())), strict=True):
            bad = (~torch.isfinite(x[:, cols]).all(1)).nonzero()[:, 0]
            if len(bad):
                raise ValueError(
                    f"inputs[{name!r}] must be finite in {x.dtype}, "
                    f"got NaN or infinity in {len(bad)} of {len(x)} rows, "
                    f"first in row {int(bad[0])}"
                )

    def _calibrate(self, x: Tensor, positions: Sequence[int], columns: Sequence[slice]) -> Tensor:
        if not self.is_calibrated:
            return x
        parts = torch.split(x, [cols.stop - cols.start for cols in columns], dim=1)
        return torch.cat(
            [
                (part - self.input_mean[cols]) / self.input_rms[s]  # in float32, or wider
                for part, s, cols in zip(parts, positions, columns, strict=True)
            ],
            dim=1,
        )

    def _uncalibrate(self, recons: Tensor, t: int) -> Tensor:
        if not self.is_calibrated:
            return recons
        return (recons * self.input_rms[t] + self.input_mean[self._columns()[t]]).to(recons.dtype)

    @torch.no_grad()
    def count_silence(self, values: Tensor, indices: Tensor) -> None:
        """Move the dead counters by a batch of codes; in training mode only."""
        if self.training:
            backends.resolve(self.backend, values.device).count_silence(self.silence, values, indices)


def _is_capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _before_loading(model: SPARC, *_: object) -> None:
    model._make_current()


def _before_saving(model: SPARC, *_: object) -> None:
    model._make_current()


def _after_loading(model: SPARC, _: object) -> None:
    model._notice_calibration()


def _is_stream(item: tuple[object, object]) -> bool:
    name, width = item
    return isinstance(name, str) and isinstance(width, int) and width >= 1


def _kind(x: object) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else type(x).__name__


def _take_columns(W: Tensor, columns: Sequence[slice]) -> Tensor:
    """Some streams' columns: a view where they are adjacent, a copy where they are not."""
    if all(a.stop == b.start for a, b in pairwise(columns)):
        return W[..., columns[0].start : columns[-1].stop]
    return torch.cat([W[..., cols] for cols in columns], dim=-1)


def _position(name: str, streams: Sequence[str], argument: str) -> int:
    if name not in streams:
        raise ValueError(f"{argument} must be one of the streams {tuple(streams)}, got {name!r}")
    return list(streams).index(name)

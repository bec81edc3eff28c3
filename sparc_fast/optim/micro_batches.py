"""Gradients summed over the parts of a batch, which is then one batch to the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sparc_fast.objective import Terms
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import stream_slices, wide
from sparc_fast.ops.row_step import AdamStep, Gradients, Rows, Samples
from sparc_fast.optim.freezing import Run
from sparc_fast.optim.private_rows import Block, blocks, of_all, sum_of_columns
from sparc_fast.selection import Private

LATENTS_AT_ONCE = 1024
"""Rows of W_enc whose products are in memory at a time."""


class OneBatch(NamedTuple):
    """A batch given in one piece; not its `Flow`, whose gradients are in the samples already."""

    streams: tuple[str, ...]
    """Those given."""
    terms: dict[tuple[str, ...], Terms]
    """Streams -> the terms of the samples that have just these."""
    values: Tensor
    """Of the reconstruction, [N, S', k], and its support."""
    support: Tensor
    samples: Samples
    grad_pre_bias: Tensor
    """The decoder's part, of all streams, [D]."""
    used: Tensor
    """The supports that the samples' entries are of."""
    zero_rows: Tensor | None
    """As in `Batch`."""
    of_decoder: Samples | None = None
    """Of nested dictionaries, whose groups of latents see other gradients, the samples once for each: W_dec's are sums
    over these."""
    private: Private | None = None
    """Latents whose rows move in one stream alone."""
    of_threshold: Tensor | None = None
    """Under JumpReLU, the sums of `JumpGradients.both` of all streams."""
    grad_threshold: Tensor | None = None
    """[S, L], made of these when all of the batch is known."""

    def update(self, rows: Rows, run: Run | None, adam: AdamStep, backend: Backend) -> tuple[Tensor, Tensor]:
        """A step of the rows, those of a run of streams or all; returns what a backend's `update_rows` does."""
        if self.private is not None:
            moved = [(b, one.update(b.rows, b.run, adam, backend)) for b, one in self._blocks(rows, run, backend)]
            grad_latent_bias = of_all(self.samples, self.private, rows, [(block, bias) for block, (bias, _) in moved])
            return grad_latent_bias, sum_of_columns(self.samples, rows, [(block, sums) for block, (_, sums) in moved])
        grads = self.grad_pre_bias.new_empty(0), self.grad_pre_bias.new_empty(0)
        for some, samples in self._of(rows, run, backend):
            found = backend.update_rows(some, samples, adam)
            grads = grads if some.W_enc is None else found
        return grads

    def squared_norm(self, rows: Rows, run: Run | None, backend: Backend) -> tuple[Tensor, Tensor]:
        """(the sum of squares of the rows' gradients, float64, grad_latent_bias), as for `update`."""
        total = torch.zeros((), dtype=torch.float64, device=self.grad_pre_bias.device)
        if self.private is not None:
            of_blocks = [(b, one.squared_norm(b.rows, b.run, backend)) for b, one in self._blocks(rows, run, backend)]
            total = torch.stack([total, *(squares for _, (squares, _) in of_blocks)]).sum()
            return total, of_all(self.samples, self.private, rows, [(block, bias) for block, (_, bias) in of_blocks])
        grad_latent_bias = self.grad_pre_bias.new_empty(0)
        for some, samples in self._of(rows, run, backend):
            moves = some.W_enc is not None, some.W_dec is not None
            squares, found = backend.gradient_squares(samples, rows.d_streams, *moves)
            total += squares.sum()
            grad_latent_bias = found if moves[0] else grad_latent_bias
        return total, grad_latent_bias

    def scaled(self, factor: Tensor) -> OneBatch:
        """The same with all gradients times a factor >= 0: they are sums with these coefficients."""
        factor = factor.to(self.grad_pre_bias.dtype)
        values, grad_values = (wide(part) * factor for part in (self.samples.values, self.samples.grad_values))
        samples, of_decoder = self.samples._replace(values=values, grad_values=grad_values), self.of_decoder
        if of_decoder is not None:
            of_decoder = of_decoder._replace(values=wide(of_decoder.values) * factor)
        return self._replace(
            samples=samples, of_decoder=of_decoder, grad_pre_bias=self.grad_pre_bias * factor,
            grad_threshold=None if self.grad_threshold is None else self.grad_threshold * factor,
        )  # fmt: skip

    def with_grad_threshold(self, grad_threshold: Tensor) -> OneBatch:
        return self._replace(grad_threshold=grad_threshold)

    def weight_gradients(self, d_streams: tuple[int, ...], backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_W_enc [L, D], grad_W_dec [L, D], grad_latent_bias [S, L])"""
        if self.of_decoder is None:
            return backend.weight_gradients(*self.samples, d_streams)
        x, pre_bias, values, grad_values, _, *inverse = self.samples
        of_encoder = x, pre_bias, values, grad_values, inverse[0], inverse[1]
        grad_W_enc, grad_latent_bias = backend.encoder_gradients(*of_encoder, d_streams)
        _, _, values, _, grad_recons, *inverse = self.of_decoder
        return grad_W_enc, backend.decoder_gradients(values, grad_recons, inverse[0], inverse[1]), grad_latent_bias

    def _blocks(self, rows: Rows, run: Run | None, backend: Backend) -> Iterator[tuple[Block, OneBatch]]:
        """Where there are private latents, each block of rows, and the batch as it sees it."""
        assert self.private is not None
        for block in blocks(self.samples, self.used, self.private, rows, run, backend):
            yield block, self._replace(samples=block.samples, used=block.used, private=None)

    def _of(self, rows: Rows, run: Run | None, backend: Backend) -> Iterator[tuple[Rows, Samples]]:
        """Rows, and the samples that their gradients are sums over."""
        samples, of_decoder = self.samples, self.of_decoder or self.samples
        if run is None and self.of_decoder is None:
            yield rows, samples
            return
        if run is not None:
            samples, of_decoder = (_of_columns(some, run.columns) for some in (samples, of_decoder))
        if rows.W_dec is not None:  # its gradients come from all streams
            yield rows.of_decoder, of_decoder
        if rows.W_enc is not None and run is None:
            yield rows.of_encoder, samples
        elif rows.W_enc is not None and run is not None:
            own = {name: getattr(samples, name)[:, run.streams] for name in ("values", "grad_values", "grad_recons")}
            if self.used.ndim == 3:
                inverse = backend.invert_indices(self.used[:, run.streams].contiguous(), len(rows.W_enc))
                own |= {"offsets": inverse[0], "entries": inverse[1]}
            yield rows.of_encoder, samples._replace(**own)

    def count_silence(self, silence: Tensor, backend: Backend) -> None:
        backend.count_silence(silence, self.values, self.support)


def _of_columns(samples: Samples, columns: slice) -> Samples:
    return samples._replace(
        x=samples.x[:, columns], pre_bias=samples.pre_bias[columns], grad_recons=samples.grad_recons[:, :, columns]
    )


class MicroBatches:
    """What `OneBatch` is, for one that is given in parts: its sums, with both weight gradients [L, D] in memory."""

    def __init__(
        self,
        d_streams: tuple[int, ...],
        silence: Tensor,
        backend: Backend,
        n_samples: int,
        private: Private | None = None,
    ) -> None:
        self.d_streams, self.backend, self.n_samples = d_streams, backend, n_samples
        self._private = private
        self._gradients: tuple[Tensor, Tensor, Tensor] | None = None
        self.terms: dict[tuple[str, ...], Terms] = {}
        self.zero_rows: Tensor | None = None
        self.of_threshold: Tensor | None = None
        self.grad_threshold: Tensor | None = None
        self._silence = torch.zeros_like(silence)
        self._used = torch.zeros(len(silence), dtype=torch.bool, device=silence.device)

    def add(self, part: OneBatch) -> None:
        for streams, terms in part.terms.items():
            before = self.terms.get(streams)
            self.terms[streams] = terms._replace(loss=None) if before is None else before.plus(terms)
        self.streams = part.streams
        if part.zero_rows is not None:
            self.zero_rows = part.zero_rows if self.zero_rows is None else self.zero_rows + part.zero_rows
        if part.of_threshold is not None:
            self.of_threshold = part.of_threshold + (0 if self.of_threshold is None else self.of_threshold)
        gradients = part.weight_gradients(self.d_streams, self.backend)
        if self._private is not None:
            self._private.clear(*gradients)
        if self._gradients is None:
            self._gradients, self.grad_pre_bias = gradients, part.grad_pre_bias
        else:
            for total, gradient in zip(self._gradients, gradients, strict=True):
                total += gradient
            self.grad_pre_bias = self.grad_pre_bias + part.grad_pre_bias
        part.count_silence(self._silence, self.backend)
        self._used |= part.samples.offsets.diff() > 0

    def update(self, rows: Rows, run: Run | None, adam: AdamStep, backend: Backend) -> tuple[Tensor, Tensor]:
        """As `OneBatch.update`."""
        W_enc, W_dec, latent_bias = self._of(run)
        through_encoder = latent_bias.new_zeros(sum(rows.d_streams))
        if rows.W_enc is not None:
            for first in range(0, len(rows.W_enc), LATENTS_AT_ONCE):
                some = slice(first, first + LATENTS_AT_ONCE)
                for s, columns in enumerate(stream_slices(rows.d_streams)):
                    # not a matrix product: its order of summation depends on the number of threads
                    through_encoder[columns] -= (latent_bias[s, some, None] * rows.W_enc[some, columns]).sum(0)
        backend.step_rows(rows, Gradients(W_enc, W_dec, self._used), adam)
        return latent_bias, through_encoder

    def squared_norm(self, rows: Rows, run: Run | None, backend: Backend) -> tuple[Tensor, Tensor]:
        """As `OneBatch.squared_norm`."""
        W_enc, W_dec, latent_bias = self._of(run)
        moved = [gradient for gradient, W in ((W_enc, rows.W_enc), (W_dec, rows.W_dec)) if W is not None]
        return torch.stack([torch.linalg.vector_norm(part).double().square() for part in moved]).sum(), latent_bias

    def scaled(self, factor: Tensor) -> MicroBatches:
        """As `OneBatch.scaled`, in place."""
        assert self._gradients is not None
        factor = factor.to(self.grad_pre_bias.dtype)
        for gradient in self._gradients:
            gradient.mul_(factor)
        self.grad_pre_bias = self.grad_pre_bias * factor
        if self.grad_threshold is not None:
            self.grad_threshold = self.grad_threshold * factor
        return self

    def with_grad_threshold(self, grad_threshold: Tensor) -> MicroBatches:
        self.grad_threshold = grad_threshold
        return self

    def _of(self, run: Run | None) -> tuple[Tensor, Tensor, Tensor]:
        assert self._gradients is not None
        W_enc, W_dec, latent_bias = self._gradients
        if run is None:
            return self._gradients
        return W_enc[:, run.columns], W_dec[:, run.columns], latent_bias[run.streams]

    def count_silence(self, silence: Tensor, backend: Backend) -> None:
        """As over one batch: a latent that fired in any part becomes 0, every other grows by all samples."""
        silence += self.n_samples
        silence.masked_fill_(self._silence < self.n_samples, 0)

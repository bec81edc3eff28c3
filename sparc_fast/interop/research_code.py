"""A drop-in for the SPARC research code's model: its names, its numbers, quirks included, and none of its dense work.

    - from sparc.model import get_sae_model_class
    - from sparc.model.utils import unit_norm_decoder_, unit_norm_decoder_grad_adjustment_
    + from sparc_fast.compat import get_sae_model_class, unit_norm_decoder_, unit_norm_decoder_grad_adjustment_

An existing training loop, with any torch optimizer, then sees the same losses to float32 rounding: constructor, random
initial weights, parameter names and shapes, state_dict, output and loss keys are the same. What is [N, L] (logits,
dense codes, masks) is computed when somebody reads it. docs/migration.md says what `SPARC` does differently, and why.

Written from the paper's mathematics (arXiv 2507.06265) and the behaviour of its code.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from sparc_fast.ops import backends, functional

__all__ = [
    "LocalMultiStreamSparseAutoencoder",
    "MultiStreamSparseAutoencoder",
    "Outputs",
    "get_sae_model_class",
    "normalized_mean_squared_error",
    "unit_norm_decoder_",
    "unit_norm_decoder_grad_adjustment_",
]


def get_sae_model_class(topk_type: Literal["global", "local"]) -> type[MultiStreamSparseAutoencoder]:
    """The class for "global" (one support for all streams of a sample) or "local" (one per stream) TopK."""
    if topk_type not in ("global", "local"):
        raise ValueError(f'topk_type must be "global" or "local", got {topk_type!r}')
    return MultiStreamSparseAutoencoder if topk_type == "global" else LocalMultiStreamSparseAutoencoder


def normalized_mean_squared_error(reconstruction: Tensor, original_input: Tensor) -> Tensor:
    """mean_n ||reconstruction[n] - original_input[n]||^2 / ||original_input[n]||^2 of [N, D]; inf for a zero row."""
    error = (reconstruction - original_input).square().mean(dim=1)
    return (error / original_input.square().mean(dim=1)).mean()


@torch.no_grad()
def unit_norm_decoder_(decoder: nn.Linear) -> None:
    """Divide each latent's decoder weights (a column of [D_s, L]) by their norm + 1e-8."""
    weight = decoder.weight.data
    weight /= torch.linalg.vector_norm(weight, dim=0, keepdim=True) + 1e-8


@torch.no_grad()
def unit_norm_decoder_grad_adjustment_(decoder: nn.Linear) -> None:
    """Take the component along each latent's decoder weights out of their gradient, as if they had unit norm."""
    weight, grad = decoder.weight.data, decoder.weight.grad
    if grad is not None:
        grad.addcmul_(weight, torch.einsum("dl, dl -> l", weight, grad)[None], value=-1)


@dataclass(frozen=True)
class Code:
    """One stream's codes in sparse form."""

    values: Tensor
    """[N, k], ReLU of the pre-activations on the support."""
    indices: Tensor
    """int32 [N, k], the support, ascending."""
    auxk_values: Tensor
    """[N, A], ReLU of the pre-activations of the dead latents AuxK chose; A is 0 while none is dead."""
    auxk_indices: Tensor
    """int32 [N, A]."""


class _Later(NamedTuple):
    make: Callable[[], Tensor]
    weights: Sequence[Tensor]
    versions: Sequence[int]


class Outputs(UserDict[str, Tensor]):
    """What `forward` returns: the research code's keys; what is [N, L] is made when it is first read."""

    data: dict[str, Any]
    """Entries, and of those that nobody has read yet a `_Later`."""

    def __init__(self, codes: Mapping[str, Code]) -> None:
        super().__init__()
        self.codes = codes
        self._grad = torch.is_grad_enabled()

    def later(self, name: str, make: Callable[[], Tensor], weights: Sequence[Tensor] = ()) -> None:
        """Make an entry when it is first read; `weights` are what it is made from then."""
        self.data[name] = _Later(make, weights, [weight._version for weight in weights])

    def __getitem__(self, name: str) -> Tensor:
        entry = self.data[name]
        if isinstance(entry, _Later):
            if any(weight._version != version for weight, version in zip(entry.weights, entry.versions, strict=True)):
                raise RuntimeError(
                    f"outputs[{name!r}] must be read before the weights it is computed from change, "
                    "but the optimizer has stepped"
                )
            with torch.set_grad_enabled(self._grad):
                entry = self.data[name] = entry.make()
        return cast(Tensor, entry)

    def __repr__(self) -> str:
        return f"Outputs({', '.join(self)})"


class MultiStreamSparseAutoencoder(nn.Module):
    """The research code's autoencoder with global TopK, on the operators of `sparc_fast.functional`.

    ``decoders[s].weight`` is [D_s, L] as in nn.Linear, but stored with a latent's numbers together, as the operators
    read them: its transpose is contiguous. Optimizers and checkpoints do not see it; after
    ``load_state_dict(assign=True)`` a step is slower and its result the same.

    `forward` moves the dead counters, in eval mode too.

    Args:
        d_streams: name -> width of each stream, in order.
        n_latents: L.
        k: latents kept per sample, 1 <= k <= L.
        auxk: latents AuxK may use; None turns it off. With AuxK and no dead latent, a constant close to 1 joins the
            reported AuxK loss and its gradient pulls the pre-biases.
        auxk_threshold: a latent fires in a batch when a value exceeds this.
        dead_steps_threshold: a stream's latent is dead after more than this many batches without firing.
        use_sparse_decoder: accepted and kept; decoding is always sparse.
        backend: "auto" or one of `sparc_fast.available_backends(device)`.
    """

    _is_local = False
    """Whether each stream has a support of its own, and what the research code does otherwise there."""

    def __init__(
        self,
        d_streams: Mapping[str, int],
        n_latents: int,
        k: int,
        auxk: int | None = None,
        auxk_threshold: float = 1e-3,
        dead_steps_threshold: int = 1000,
        use_sparse_decoder: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not d_streams:
            raise ValueError(f"d_streams must name at least one stream and its width, got {d_streams}")
        if not 1 <= k <= n_latents:
            raise ValueError(f"k must be between 1 and n_latents={n_latents}, got {k}")
        least_auxk = 0 if self._is_local else 1
        if auxk is not None and not least_auxk <= auxk <= n_latents:
            raise ValueError(f"auxk must be None or {least_auxk} … n_latents={n_latents}, got {auxk}")
        self.streams = list(d_streams)
        self.n_latents, self.k, self.auxk = n_latents, k, auxk
        self.auxk_threshold, self.dead_steps_threshold = auxk_threshold, dead_steps_threshold
        self.use_sparse_decoder, self.backend = use_sparse_decoder, backend

        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        self.pre_biases, self.latent_biases = nn.ParameterDict(), nn.ParameterDict()
        for stream, width in d_streams.items():
            # both draw their first weights, so that a seed gives the research code's model
            encoder, decoder = nn.Linear(width, n_latents, bias=False), nn.Linear(n_latents, width, bias=False)
            decoder.weight = nn.Parameter(encoder.weight.detach().clone().T)
            unit_norm_decoder_(decoder)
            self.encoders[stream], self.decoders[stream] = encoder, decoder
            self.pre_biases[stream] = nn.Parameter(torch.zeros(width))
            self.latent_biases[stream] = nn.Parameter(torch.zeros(n_latents))
            self.register_buffer(_counter(stream), torch.zeros(n_latents, dtype=torch.int64))
        backends.resolve(backend, encoder.weight.device)

    def forward(self, inputs: Mapping[str, Tensor]) -> Outputs:
        """Codes and reconstructions of any non-empty subset of the streams.

        Args:
            inputs: name -> [N, D_s], the same N samples in each.

        Returns:
            for each stream s given, and each ordered pair of them: ``recon_{s}`` and ``cross_recon_{t}_from_{s}``
            [N, D]; ``logits_{s}``, ``sparse_codes_{s}`` and ``mask_{s}`` [N, L]; the support int64 [N, k], strongest
            first, as ``shared_indices`` and ``shared_mask``; AuxK's ``auxk_indices_{s}`` and ``auxk_sparse_codes_{s}``;
            ``avg_num_active_neurons``, which is k.
        """
        streams = self._check(inputs)
        supports = self._supports(inputs, streams)
        masks, codes = {}, {}
        for stream in streams:
            masks[stream], codes[stream] = self._encode(stream, inputs[stream], supports[stream])
        outputs = Outputs(codes)
        for stream in streams:
            self._add_codes(outputs, stream, inputs[stream], masks[stream])
        self._add_support(outputs, inputs, supports)
        self._add_recons(outputs)
        active = torch.tensor(float(self.k), dtype=torch.float32, device=supports[stream].device)
        if self._is_local:
            outputs["avg_sparsity"] = active
        outputs["avg_num_active_neurons"] = active
        return outputs

    def get_dead_neurons(self, threshold: int | None = None) -> dict[str, Tensor]:
        """name -> bool [L]: the stream's latents silent for more than `threshold` batches (`dead_steps_threshold`)."""
        return {stream: self._dead(stream, threshold) for stream in self.streams}

    def compute_loss(
        self,
        outputs: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        auxk_coef: float = 1 / 32,
        cross_loss_coef: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(total loss, every part of it by name); every stream must be there.

        As in the research code, ``losses["avg_mse_loss"]`` is the total loss, not the mean of ``mse_loss_{s}``, and
        cross losses are reported at ``cross_loss_coef=0`` too.

        Args:
            outputs: what `forward` returned; reconstructions may have been replaced.
            inputs: name -> [N, D_s].
        """
        if not isinstance(outputs, Outputs):
            raise ValueError(f"outputs must be what forward returned, got {type(outputs).__name__}")
        if set(inputs) != set(self.streams) or set(outputs.codes) != set(self.streams):
            got = f"{list(inputs)} and {list(outputs.codes)}"
            raise ValueError(f"inputs and outputs must hold every stream {self.streams}, got {got}")
        losses: dict[str, Tensor] = {}
        mse, l1, auxk = [], [], []
        for stream in self.streams:
            mse.append(normalized_mean_squared_error(outputs[f"recon_{stream}"], inputs[stream]))
            l1.append((outputs.codes[stream].values.abs().sum(dim=1) / self.k).mean())
            losses[f"mse_loss_{stream}"], losses[f"l1_sparsity_{stream}"] = mse[-1], l1[-1]
            losses[f"num_active_neurons_{stream}"] = outputs["avg_num_active_neurons"]
            if self.auxk is not None:
                auxk.append(self._auxk_loss(stream, outputs, inputs[stream]))
                losses[f"auxk_loss_{stream}"] = auxk[-1]
        cross = []
        for source, target in permutations(self.streams, 2):
            name = f"{target}_from_{source}"
            cross.append(normalized_mean_squared_error(outputs[f"cross_recon_{name}"], inputs[target]))
            losses[f"cross_loss_{name}"] = cross[-1]

        total = _mean(mse)
        if self.auxk is not None:
            # NaN counts as no loss
            total = total + self._add_part(losses, "avg_auxk_loss", auxk if sum(auxk) > 0 else [], auxk_coef, total)
        if cross_loss_coef > 0 and (cross or self._is_local):
            total = total + self._add_part(losses, "avg_cross_loss", cross, cross_loss_coef, total)
        losses["avg_l1_sparsity"], losses["avg_num_active_neurons"] = _mean(l1), outputs["avg_num_active_neurons"]
        losses["avg_mse_loss"] = losses["total_loss"] = total
        return total, losses

    @staticmethod
    def _add_part(losses: dict[str, Tensor], name: str, parts: list[Tensor], coef: float, like: Tensor) -> Tensor:
        losses[name] = _mean(parts) if parts else torch.zeros((), dtype=like.dtype, device=like.device)
        losses[f"{name}_scaled"] = losses[name] * coef
        return losses[f"{name}_scaled"]

    def _auxk_loss(self, stream: str, outputs: Outputs, x: Tensor) -> Tensor:
        code, pre_bias = outputs.codes[stream], self.pre_biases[stream]
        target = x - outputs[f"recon_{stream}"].detach() + pre_bias.detach()
        if not code.auxk_indices.shape[1]:
            return normalized_mean_squared_error(pre_bias.expand_as(target), target)
        (recon,) = self._decode(code.auxk_values[:, None], code.auxk_indices, stream)
        return normalized_mean_squared_error(recon, target)

    def _supports(self, inputs: Mapping[str, Tensor], streams: Sequence[str]) -> dict[str, Tensor]:
        """The support of each stream, int32 [N, k]."""
        topk = partial(functional.global_topk, k=self.k, backend=self.backend)
        if self._is_local:
            return {s: topk(inputs[s], *self._encoder(s)) for s in streams}
        x = _side_by_side([inputs[s].detach() for s in streams])
        W_enc = _side_by_side([_weight(self.encoders[s]).detach() for s in streams])
        pre_bias = _side_by_side([self.pre_biases[s].detach() for s in streams])
        latent_bias = torch.stack([self.latent_biases[s].detach() for s in streams])
        return dict.fromkeys(streams, topk(x, W_enc, pre_bias, latent_bias))

    def _encode(self, stream: str, x: Tensor, support: Tensor) -> tuple[Tensor, Code]:
        """Which latents are dead for AuxK, bool [L], and the stream's codes; moves its counters."""
        before = self._dead(stream)
        values = self._values(stream, x, support)
        self._count(stream, values.detach(), support)
        dead = before if self._is_local else self._dead(stream)
        chosen = self._auxk_support(stream, x, dead)
        if chosen.shape[1]:
            # one operator for both supports: one gradient of the encoder
            values = self._values(stream, x, torch.cat([support, chosen], dim=1))
        return dead, Code(values[:, : self.k], support, values[:, self.k :], chosen)

    def _dead(self, stream: str, threshold: int | None = None) -> Tensor:
        return self.get_buffer(_counter(stream)) > (self.dead_steps_threshold if threshold is None else threshold)

    @torch.no_grad()
    def _auxk_support(self, stream: str, x: Tensor, dead: Tensor) -> Tensor:
        """int32 [N, A], the largest of the dead latents; the research code fills up with live ones of value 0."""
        latents = dead.nonzero()[:, 0]
        A = min(self.auxk or 0, len(latents))
        if A == 0:
            return latents.new_empty(len(x), 0, dtype=torch.int32)
        W_enc, pre_bias, latent_bias = self._encoder(stream)
        operands = x, W_enc[latents], pre_bias, latent_bias[:, latents], A
        among_dead = functional.global_topk(*operands, backend=self.backend)
        return latents.int()[among_dead.long()]

    @torch.no_grad()
    def _count(self, stream: str, values: Tensor, indices: Tensor) -> None:
        counter = self.get_buffer(_counter(stream))
        active = (values > self.auxk_threshold).to(counter.dtype)
        fired = torch.zeros_like(counter).index_put_((indices.reshape(-1).long(),), active.reshape(-1), accumulate=True)
        counter.mul_(fired == 0).add_(1)  # one that fired is at 1, not 0

    def _values(self, stream: str, x: Tensor, indices: Tensor) -> Tensor:
        """[N, j], differentiable."""
        operands = x, *self._encoder(stream), indices
        values = functional.support_values(*operands, d_streams=x.shape[1:], backend=self.backend)
        return values[:, 0]

    def _decode(self, values: Tensor, indices: Tensor, target: str) -> tuple[Tensor, ...]:
        """Reconstructions [N, D_target] from each of values [N, sources, j], through one gather of decoder rows."""
        W_dec, pre_bias = _weight(self.decoders[target]).T, self.pre_biases[target]
        return torch.unbind(functional.sparse_decode(values, indices, W_dec, pre_bias, backend=self.backend), 1)

    def _encoder(self, stream: str) -> tuple[Tensor, Tensor, Tensor]:
        """(W_enc [L, D_s], pre_bias [D_s], latent_bias [1, L])"""
        return _weight(self.encoders[stream]), self.pre_biases[stream], self.latent_biases[stream][None]

    def _add_codes(self, outputs: Outputs, stream: str, x: Tensor, dead: Tensor) -> None:
        code, weights = outputs.codes[stream], self._encoder_parameters([stream])
        outputs.later(f"logits_{stream}", partial(self._logits, stream, x), weights)
        outputs.later(f"sparse_codes_{stream}", partial(self._dense, code.values, code.indices))
        outputs.later(f"mask_{stream}", partial(self._mask, code.indices))
        if self.auxk is None:
            return
        topk = partial(self._masked_topk, outputs, stream, dead)
        outputs.later(f"auxk_indices_{stream}", lambda: topk().indices, weights)
        if self._is_local:
            outputs.later(f"auxk_values_{stream}", lambda: topk().values, weights)
        else:
            outputs.later(f"auxk_sparse_codes_{stream}", partial(self._dense, code.auxk_values, code.auxk_indices))

    def _add_support(self, outputs: Outputs, inputs: Mapping[str, Tensor], supports: Mapping[str, Tensor]) -> None:
        if self._is_local:
            for stream, support in supports.items():
                weights = self._encoder_parameters([stream])
                outputs.later(f"indices_{stream}", partial(self._ranked, inputs, [stream], support), weights)
            return
        streams = list(supports)
        support, weights = supports[streams[0]], self._encoder_parameters(streams)
        outputs.later("shared_mask", partial(self._mask, support))
        outputs.later("shared_indices", partial(self._ranked, inputs, streams, support), weights)

    def _add_recons(self, outputs: Outputs) -> None:
        codes = outputs.codes
        values = torch.stack([code.values for code in codes.values()], dim=1)
        supports = [code.indices for code in codes.values()]
        indices = torch.stack(supports, dim=1) if self._is_local else supports[0]
        for target in codes:
            recons = self._decode(values, indices, target)
            for source, recon in zip(codes, recons, strict=True):
                name = f"recon_{target}" if source == target else f"cross_recon_{target}_from_{source}"
                outputs[name] = recon

    def _logits(self, stream: str, x: Tensor) -> Tensor:
        W_enc, pre_bias, latent_bias = self._encoder(stream)
        return nn.functional.linear(x - pre_bias, W_enc, latent_bias[0])

    def _dense(self, values: Tensor, indices: Tensor) -> Tensor:
        return values.new_zeros(len(values), self.n_latents).scatter(1, indices.long(), values)

    def _mask(self, indices: Tensor) -> Tensor:
        mask = torch.zeros(len(indices), self.n_latents, dtype=torch.bool, device=indices.device)
        return mask.scatter_(1, indices.long(), True)

    def _masked_topk(self, outputs: Outputs, stream: str, dead: Tensor) -> torch.return_types.topk:
        return torch.topk(outputs[f"logits_{stream}"] * dead, self.auxk or 0, dim=1)

    @torch.no_grad()
    def _ranked(self, inputs: Mapping[str, Tensor], streams: Sequence[str], support: Tensor) -> Tensor:
        """The support, int64, by descending pre-activation summed over streams."""
        score = torch.zeros((), dtype=torch.float32, device=support.device)
        for stream in streams:
            x, (W_enc, pre_bias, latent_bias) = inputs[stream], self._encoder(stream)
            for sign in (1, -1):  # h = relu(h) - relu(-h)
                operands = x, sign * W_enc, pre_bias, sign * latent_bias, support
                values = functional.support_values(*operands, d_streams=x.shape[1:], backend=self.backend)
                score = score + sign * values[:, 0]
        return support.long().gather(1, score.argsort(dim=1, descending=True, stable=True))

    def _encoder_parameters(self, streams: Sequence[str]) -> list[Tensor]:
        return [parameter for s in streams for parameter in self._encoder(s)]

    def _check(self, inputs: Mapping[str, Tensor]) -> list[str]:
        """The streams given, in the model's order."""
        unknown = [name for name in inputs if name not in self.streams]
        if unknown or not inputs:
            raise ValueError(f"inputs must hold some of the streams {self.streams}, got {list(inputs)}")
        streams = [name for name in self.streams if name in inputs]
        for name in streams:
            if not isinstance(inputs[name], Tensor) or inputs[name].ndim != 2:
                raise ValueError(f"inputs[{name!r}] must be a tensor [N, D], got {inputs[name]!r:.60}")
        N = len(inputs[streams[0]])
        for name in streams:
            x, W_enc = inputs[name], _weight(self.encoders[name])
            if tuple(x.shape) != (N, W_enc.shape[1]) or x.dtype != W_enc.dtype or x.device != W_enc.device:
                raise ValueError(
                    f"inputs[{name!r}] must be {W_enc.dtype} [N={N}, {W_enc.shape[1]}] on {W_enc.device}, "
                    f"got {x.dtype} {list(x.shape)} on {x.device}"
                )
        return streams


class LocalMultiStreamSparseAutoencoder(MultiStreamSparseAutoencoder):
    """The research code's autoencoder with local TopK: each stream of a sample has its own support.

    Parameters, counters and state_dict are those of the global class, and checkpoints are interchangeable. AuxK sees
    the dead latents as they were before the batch, not after. ``indices_{s}`` and ``auxk_values_{s}`` take the places
    of ``shared_indices`` and ``auxk_sparse_codes_{s}``.
    """

    _is_local = True


def _weight(linear: nn.Module) -> Tensor:
    """Of one of a ModuleDict's nn.Linear."""
    return linear.get_parameter("weight")


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)


def _counter(stream: str) -> str:
    return f"stats_last_nonzero_{stream}"


def _mean(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum() / len(parts)

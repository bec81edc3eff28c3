"""AuxK (Gao et al., arXiv 2406.04093): dead latents reconstruct what the living left over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparc_fast import autograd, losses
from sparc_fast.backends import Backend
from sparc_fast.passes import Pass
from sparc_fast.sae import SPARC, Packed

OUT_OF_REACH = -1e30
"""A latent bias no pre-activation makes up for; finite, so that bounds around it are."""


@dataclass(frozen=True)
class AmongDead:
    """A support of dead latents, [N, k'] or [N, S, k'], chosen before any decoder row is read."""

    indices: Tensor
    latent_bias: Tensor
    any_dead: Tensor | None
    """bool scalar, or None where the answer is known to be yes."""

    def reconstruct(
        self, packed: Packed, residual: Tensor, auxk_coef: float, backend: Backend, n_samples: int
    ) -> tuple[Tensor, Pass]:
        """(auxk_coef x mean NMSE of the residual over `n_samples`, what flowed)."""
        scale = losses.nmse_scale(losses.row_energy(residual, packed.d_streams), n_samples)
        if self.any_dead is not None:
            scale = scale * self.any_dead
        weights = losses.self_weights(len(packed.streams), auxk_coef)
        operands = packed._replace(latent_bias=self.latent_bias).operands()
        values, nmse, grad_recons, grad_values, _ = autograd.encode_decode_compare(
            *operands, self.indices, residual, scale, weights, packed.d_streams, backend
        )
        return autograd.weighted_sum(nmse, weights), Pass(values, grad_values, grad_recons)


def among_dead(model: SPARC, packed: Packed, auxk_coef: float) -> AmongDead | None:
    """From a GEMM over the dead latents alone; how many they are is read on the host."""
    dead = model.dead_latents(auxk_coef)
    if dead is None:
        return None
    # without their decoder rows, which choosing does not read
    encoder = packed._replace(W_enc=packed.W_enc[dead], latent_bias=packed.latent_bias[:, dead])
    indices = model.select(encoder, min(model.auxk, len(dead)))
    return AmongDead(dead.int()[indices.long()], packed.latent_bias, None)


def among_all(model: SPARC, packed: Packed, auxk_coef: float) -> AmongDead | None:
    """From a GEMM over all latents, in which only the dead can win: nothing is read on the host.

    Where fewer than `auxk` are dead, others fill the support, with values of 0.
    """
    if not model.training or model.auxk == 0 or auxk_coef == 0:
        return None
    bias = packed.latent_bias.masked_fill(~model.dead, max(OUT_OF_REACH, torch.finfo(packed.latent_bias.dtype).min))
    indices = model.select(packed._replace(latent_bias=bias), min(model.auxk, model.n_latents))
    return AmongDead(indices, bias, model.dead.any())

"""SparcAdam: a whole SPARC training step, with no gradient of a weight matrix in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparc_fast import autograd, backends, losses, reference
from sparc_fast.losses import SparcLoss
from sparc_fast.sae import SPARC, Inputs, Packed

Extra = tuple[Tensor, Tensor, Tensor, Tensor]


class SparcAdam(torch.optim.Optimizer):
    """torch.optim.Adam on `model.loss`, with the decoder's gradient projection and unit norm, in one call a step.

    ``opt.step(inputs)`` equals, to rounding::

        loss = model.loss(inputs)
        loss.total.backward()
        model.project_gradients_()
        adam.step()
        model.normalize_decoder_()

    Learning-rate schedulers and `state_dict` work as on any optimizer; the state of each parameter is that of
    torch.optim.Adam. Weights narrower than float32 keep float32 master rows in the state.

    Args:
        model: the model to train.
        lr, betas, eps: as in torch.optim.Adam (Kingma & Ba, arXiv 1412.6980).
    """

    def __init__(
        self, model: SPARC, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        if not lr >= 0 or not eps >= 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr and eps must be >= 0 and betas in [0, 1), got lr={lr}, eps={eps}, betas={betas}")
        self.model = model
        self._seen: dict[Tensor, int] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "amsgrad": False}
        super().__init__(list(model.parameters()), options)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        inputs: Inputs,
        cross_loss_coef: float = 1.0,
        auxk_coef: float = 1 / 32,
        support_from: Sequence[str] | None = None,
    ) -> SparcLoss:
        """One training step on a batch; returns its loss, before the step. Arguments as in `SPARC.loss`."""
        self._check_trainable()
        model = self.model
        packed = model.pack(inputs)
        with autograd.without_autocast(packed.x):
            return self._step(packed, cross_loss_coef, auxk_coef, support_from)

    def _step(
        self, packed: Packed, cross_loss_coef: float, auxk_coef: float, support_from: Sequence[str] | None
    ) -> SparcLoss:
        model = self.model
        backend = backends.resolve(model.backend, packed.x.device)
        S = len(packed.streams)
        energy = losses.row_energy(packed.x, packed.d_streams)
        scale = losses.nmse_scale(energy)
        weights = losses.pair_weights(S, cross_loss_coef)
        indices = model.select(packed, support_from=support_from)
        values, nmse, grad_recons, grad_values = autograd.encode_decode_compare(
            *packed.operands(), indices, None, scale, weights, packed.d_streams, backend
        )
        total = autograd.weighted_sum(nmse, weights)

        extra = auxk = None
        dead = model.dead_latents(auxk_coef)
        if dead is not None:
            residual = losses.self_residual(grad_recons, scale, packed.d_streams)
            extra, weighted_auxk = self._auxk(packed, dead, residual, auxk_coef, backend)
            total, auxk = total + weighted_auxk, weighted_auxk / auxk_coef

        self._update(packed, indices, values, grad_values, grad_recons, extra, backend)
        model.count_silence(values, indices)
        return losses.summarize(total, nmse, auxk, energy, cross_loss_coef)

    def _auxk(
        self, packed: Packed, dead: Tensor, residual: Tensor, auxk_coef: float, backend: backends.Backend
    ) -> tuple[Extra, Tensor]:
        among_dead = packed.of_latents(dead)
        indices = self.model.select(among_dead, min(self.model.auxk, len(dead)))
        scale = losses.nmse_scale(losses.row_energy(residual, packed.d_streams))
        weights = losses.self_weights(len(packed.streams), auxk_coef)
        values, nmse, grad_recons, grad_values = autograd.encode_decode_compare(
            *among_dead.operands(), indices, residual, scale, weights, packed.d_streams, backend
        )
        inverse = backend.invert_indices(indices, len(dead))
        grads = backend.weight_gradients(
            packed.x, packed.pre_bias, values, grad_values, grad_recons, *inverse, packed.d_streams
        )
        grad_W_enc, grad_W_dec, grad_latent_bias = grads
        return (dead, grad_W_enc, grad_W_dec, grad_latent_bias), autograd.weighted_sum(nmse, weights)

    def _update(
        self,
        packed: Packed,
        indices: Tensor,
        values: Tensor,
        grad_values: Tensor,
        grad_recons: Tensor,
        extra: Extra | None,
        backend: backends.Backend,
    ) -> None:
        model, group = self.model, self.param_groups[0]
        x = packed.x
        if packed.streams != model.streams:
            # an absent stream is a stream without gradient: zero activations, zero residuals
            absent = _Absent(model, packed)
            x, grad_recons = absent.columns(x), absent.columns(grad_recons)
            values, grad_values = absent.streams(values), absent.streams(grad_values)
            indices = indices if indices.ndim == 2 else absent.streams(indices)
            if extra is not None:
                dead, extra_W_enc, extra_W_dec, bias = extra
                bias = absent.streams(bias.T[:, :, None])[:, :, 0].T
                extra = (dead, absent.columns(extra_W_enc), absent.columns(extra_W_dec), bias)
        states = [self._state(p) for p in (model.W_enc, model.W_dec, model.latent_bias, model.pre_bias)]
        for state in states:
            state["step"] += 1
        step = int(states[0]["step"])
        lr, betas, eps = group["lr"], group["betas"], group["eps"]
        inverse = backend.invert_indices(indices, model.n_latents)
        moments = [state[name] for state in states[:2] for name in ("exp_avg", "exp_avg_sq")]
        grad_latent_bias, grad_pre_bias = backend.update_rows(
            self._rows(model.W_enc), self._rows(model.W_dec), moments, x, model.pre_bias,
            values, grad_values, grad_recons, *inverse, tuple(model.d_streams.values()), lr, betas, eps, step, extra,
        )  # fmt: skip
        grad_pre_bias += reference.wide(grad_recons).sum((0, 1))
        for bias, grad, state in (
            (model.latent_bias, grad_latent_bias, states[2]),
            (model.pre_bias, grad_pre_bias, states[3]),
        ):
            reference.adam(self._rows(bias), grad, state["exp_avg"], state["exp_avg_sq"], lr, betas, eps, step)
        for parameter in model.parameters():
            if "master" in self.state[parameter]:
                parameter.copy_(self.state[parameter]["master"])
                self._seen[parameter] = parameter._version

    def _rows(self, parameter: Tensor) -> Tensor:
        """What Adam moves: the parameter, or its float32 master."""
        rows: Tensor = self.state[parameter].get("master", parameter)
        return rows

    def _check_trainable(self) -> None:
        if not self.model.training:
            raise ValueError("model must be in training mode to step, got eval mode: call model.train()")
        frozen = [name for name, p in self.model.named_parameters() if not p.requires_grad]
        if frozen:
            raise ValueError(f"SparcAdam trains every weight of the model, but {', '.join(frozen)} is frozen")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only the model's own weights, given to the constructor, can be trained."""
        if self.param_groups:
            raise ValueError("SparcAdam has one parameter group, the model's weights, and takes no other")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "model": self.model, "_seen": self._seen}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            rows = reference.wide(parameter.detach())
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(rows), torch.zeros_like(rows)
            if parameter.dtype != rows.dtype:
                state["master"] = rows
        elif "master" in state and self._seen.get(parameter) != parameter._version:
            # somebody else wrote the weights: where they did, their rounding is all there is
            master = state["master"]
            master.copy_(torch.where(parameter == master.to(parameter.dtype), master, parameter))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As on any optimizer; master rows and moments keep their float32. torch.optim.Adam's state loads too."""
        for group in state_dict["param_groups"]:
            if group.get("weight_decay") or group.get("amsgrad"):
                raise ValueError("state_dict must be of an Adam without weight decay and amsgrad")
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        for name, parameter in zip(names, parameters, strict=True):
            for key, value in state_dict["state"].get(name, {}).items():
                device = value.device if key == "step" else parameter.device
                self.state[parameter][key] = value.to(device, copy=True)


class _Absent:
    """Puts what was computed for some streams among zeros for all streams of the model."""

    def __init__(self, model: SPARC, packed: Packed) -> None:
        columns = reference.stream_slices(tuple(model.d_streams.values()))
        self.S, self.D = len(columns), columns[-1].stop
        self.present = [model.streams.index(name) for name in packed.streams]
        self.present_columns = torch.cat([torch.arange(columns[s].start, columns[s].stop) for s in self.present])

    def columns(self, of_present: Tensor) -> Tensor:
        """[..., D'] -> [..., D]; a gradient [N, S', D'] -> [N, S, D]."""
        if of_present.ndim == 3:
            of_present = self.streams(of_present)
        out = of_present.new_zeros(*of_present.shape[:-1], self.D)
        out[..., self.present_columns.to(out.device)] = of_present
        return out

    def streams(self, of_present: Tensor) -> Tensor:
        """[N, S', j] -> [N, S, j]"""
        out = of_present.new_zeros(len(of_present), self.S, of_present.shape[2])
        out[:, self.present] = of_present
        return out

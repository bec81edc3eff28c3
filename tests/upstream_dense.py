"""The research code's model in plain dense PyTorch, written from its equations: the truth that `sparc_fast.compat` meets.

With h_s = W_enc^s (x_s - b_s) + c_s, per sample:

    I   = topk(sum_s h_s)                        global;   I_s = topk(h_s)  local
    z_s = relu(h_s) on the support, 0 elsewhere
    x_t from s = W_dec^t z_s + b_t
    n_s = 1 where z_s > threshold anywhere in the batch, else n_s + 1
    J_s = topk of h_s * [n_s > dead_steps],      before (local) or after (global) n_s has moved
    AuxK_s = NMSE(W_dec^s relu(h_s on J_s, dead) + b_s,  x_s - stop(x_s from s) + stop(b_s))
    loss = mean_s NMSE(x_s from s, x_s) + a mean_s AuxK_s + c mean_{s != t} NMSE(x_t from s, x_t)

As a program: `python tests/upstream_dense.py` times whole training steps of it and of the drop-in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UpstreamDense(nn.Module):
    def __init__(
        self,
        d_streams: dict[str, int],
        n_latents: int,
        k: int,
        auxk: int | None = None,
        auxk_threshold: float = 1e-3,
        dead_steps_threshold: int = 1000,
        *,
        selection: str = "global",
    ) -> None:
        super().__init__()
        self.streams, self.selection = list(d_streams), selection
        self.k, self.auxk, self.dead_steps = k, auxk, dead_steps_threshold
        self.threshold = auxk_threshold
        self.encoders, self.decoders = nn.ModuleDict(), nn.ModuleDict()
        self.pre_biases, self.latent_biases = nn.ParameterDict(), nn.ParameterDict()
        for s, d in d_streams.items():
            self.encoders[s] = nn.Linear(d, n_latents, bias=False)
            self.decoders[s] = nn.Linear(n_latents, d, bias=False)
            self.decoders[s].weight.data.copy_(self.encoders[s].weight.data.T)
            normalize(self.decoders[s])
            self.pre_biases[s] = nn.Parameter(torch.zeros(d))
            self.latent_biases[s] = nn.Parameter(torch.zeros(n_latents))
            self.register_buffer(f"stats_last_nonzero_{s}", torch.zeros(n_latents, dtype=torch.int64))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        given = [s for s in self.streams if s in inputs]
        h = {s: F.linear(inputs[s] - self.pre_biases[s], self.encoders[s].weight, self.latent_biases[s]) for s in given}
        if self.selection == "global":
            support = dict.fromkeys(given, torch.topk(sum(h.values()), self.k).indices)
            out["shared_indices"] = support[given[0]]
            out["shared_mask"] = torch.zeros_like(h[given[0]], dtype=torch.bool).scatter(1, support[given[0]], True)
        else:
            support = {s: torch.topk(h[s], self.k).indices for s in given}
            out |= {f"indices_{s}": support[s] for s in given}
            out["avg_sparsity"] = torch.tensor(float(self.k))
        out["avg_num_active_neurons"] = torch.tensor(float(self.k))
        for s in given:
            z = torch.zeros_like(h[s]).scatter(1, support[s], h[s].gather(1, support[s]).relu())
            steps = self.get_buffer(f"stats_last_nonzero_{s}")
            dead = steps > self.dead_steps
            steps.copy_(torch.where((z > self.threshold).any(0), 1, steps + 1))
            if self.selection == "global":
                dead = steps > self.dead_steps
            out |= {f"logits_{s}": h[s], f"sparse_codes_{s}": z}
            out[f"mask_{s}"] = torch.zeros_like(z, dtype=torch.bool).scatter(1, support[s], True)
            if self.auxk is not None:
                top = torch.topk(h[s] * dead, self.auxk)
                out[f"auxk_indices_{s}"] = top.indices
                if self.selection == "global":
                    out[f"auxk_sparse_codes_{s}"] = torch.zeros_like(z).scatter(1, top.indices, top.values.relu())
                else:
                    out[f"auxk_values_{s}"] = top.values
        for s in given:
            for t in given:
                name = f"recon_{t}" if s == t else f"cross_recon_{t}_from_{s}"
                out[name] = self.decode(out[f"sparse_codes_{s}"], t)
        return out

    def decode(self, z: Tensor, t: str) -> Tensor:
        return F.linear(z, self.decoders[t].weight) + self.pre_biases[t]

    def compute_loss(
        self, out: dict[str, Tensor], inputs: dict[str, Tensor], auxk_coef: float = 1 / 32, cross_loss_coef: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        S, losses = len(self.streams), {}
        own = auxk = cross = l1 = 0.0
        for s in self.streams:
            losses[f"mse_loss_{s}"] = nmse(out[f"recon_{s}"], inputs[s])
            counts = out[f"mask_{s}"].float().sum(1)
            losses[f"l1_sparsity_{s}"] = (out[f"sparse_codes_{s}"].abs().sum(1) / (counts + 1e-8)).mean()
            losses[f"num_active_neurons_{s}"] = counts.mean()
            own, l1 = own + losses[f"mse_loss_{s}"], l1 + losses[f"l1_sparsity_{s}"]
            if self.auxk is not None:
                if self.selection == "global":
                    z = out[f"auxk_sparse_codes_{s}"]
                else:
                    z = torch.zeros_like(out[f"sparse_codes_{s}"])
                    z = z.scatter(1, out[f"auxk_indices_{s}"], out[f"auxk_values_{s}"].relu())
                target = inputs[s] - out[f"recon_{s}"].detach() + self.pre_biases[s].detach()
                losses[f"auxk_loss_{s}"] = nmse(self.decode(z, s), target)
                auxk = auxk + losses[f"auxk_loss_{s}"]
            for t in self.streams:
                if t != s:
                    name = f"{t}_from_{s}"
                    losses[f"cross_loss_{name}"] = nmse(out[f"cross_recon_{name}"], inputs[t])
                    cross = cross + losses[f"cross_loss_{name}"]
        total = own / S
        if self.auxk is not None:
            losses["avg_auxk_loss"] = auxk / S if auxk > 0 else torch.tensor(0.0)
            losses["avg_auxk_loss_scaled"] = losses["avg_auxk_loss"] * auxk_coef
            total = total + losses["avg_auxk_loss_scaled"]
        if cross_loss_coef > 0 and (S > 1 or self.selection == "local"):
            losses["avg_cross_loss"] = cross / (S * (S - 1)) if S > 1 else torch.tensor(0.0)
            losses["avg_cross_loss_scaled"] = losses["avg_cross_loss"] * cross_loss_coef
            total = total + losses["avg_cross_loss_scaled"]
        losses["avg_l1_sparsity"], losses["avg_num_active_neurons"] = l1 / S, out["avg_num_active_neurons"]
        losses["avg_mse_loss"] = losses["total_loss"] = total
        return total, losses


def nmse(recon: Tensor, x: Tensor) -> Tensor:
    return ((recon - x).pow(2).mean(1) / x.pow(2).mean(1)).mean()


def normalize(decoder: nn.Linear) -> None:
    """W_dec[:, l] /= ||W_dec[:, l]|| + 1e-8"""
    decoder.weight.data /= decoder.weight.data.norm(dim=0, keepdim=True) + 1e-8


def project(decoder: nn.Linear) -> None:
    """g[:, l] -= <W_dec[:, l], g[:, l]> W_dec[:, l]"""
    W, g = decoder.weight.data, decoder.weight.grad
    g -= (W * g).sum(0, keepdim=True) * W


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: dict[str, Tensor],
    helpers: Sequence[Callable[[nn.Linear], None]] = (normalize, project),
) -> dict[str, Tensor]:
    """The research code's step: loss and gradients, then normalise, project, step. Its losses."""
    optimizer.zero_grad()
    loss, losses = model.compute_loss(model(inputs), inputs)
    loss.backward()
    for decoder in model.decoders.values():
        for helper in helpers:
            helper(decoder)
    optimizer.step()
    return losses


def main() -> None:
    import argparse
    import statistics
    import time

    from sparc_fast import compat

    parser = argparse.ArgumentParser(
        description="Time whole training steps of the dense model and the drop-in, in turns."
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of all threads, instead of wall time: for a busy machine"
    )
    arguments = parser.parse_args()
    now = time.process_time if arguments.cpu_time else time.perf_counter
    shape = {"dino": 1024, "clip_img": 768, "clip_txt": 768}, 8192, 64, 64
    inputs = {s: F.normalize(torch.randn(256, d)) for s, d in shape[0].items()}
    sides = {
        "dense": (UpstreamDense, (normalize, project)),
        "drop-in": (
            compat.MultiStreamSparseAutoencoder,
            (compat.unit_norm_decoder_, compat.unit_norm_decoder_grad_adjustment_),
        ),
    }
    contenders = {}
    for name, (make, helpers) in sides.items():
        for fused in (False, True):
            torch.manual_seed(0)
            model = make(*shape)
            adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)
            contenders[f"{name}, Adam{'(fused=True)' if fused else ''}"] = model, adam, helpers, []
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, N 256, L 8192, k 64, D 1024 + 768 + 768")
    for round_ in range(arguments.rounds + 1):
        for model, optimizer, helpers, seconds in contenders.values():
            start = now()
            train_step(model, optimizer, inputs, helpers)
            if round_:
                seconds.append(now() - start)
    dense = contenders["dense, Adam"][3]
    for name, (*_, seconds) in contenders.items():
        ratio = statistics.median(a / b for a, b in zip(dense, seconds, strict=True))
        low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
        print(f"{name:26} {middle:6.0f} ms ({low:.0f} … {high:.0f}), {ratio:.1f}x")


if __name__ == "__main__":
    main()

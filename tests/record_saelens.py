"""Records what SAELens saves of SAEs of its kinds, and computes with them: ``python tests/record_saelens.py``.

It needs the real package; the ordinary suite reads what it wrote to ``tests/recorded/saelens``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).parent / "recorded" / "saelens"
D, L, N = 6, 16, 12


def record() -> None:
    from sae_lens import (
        SAE,
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        JumpReLUSAE,
        JumpReLUSAEConfig,
        TopKSAE,
        TopKSAEConfig,
        TopKTrainingSAE,
        TopKTrainingSAEConfig,
    )

    torch.manual_seed(0)
    batch = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=L, k=2.5))
    batch.topk_threshold.fill_(0.1)
    topk = {"d_in": D, "d_sae": L, "k": 3}
    saes = {
        "topk": TopKSAE(TopKSAEConfig(**topk)),
        "topk_rescaled": TopKSAE(TopKSAEConfig(**topk, rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)),
        "topk_normalized": TopKSAE(TopKSAEConfig(**topk, normalize_activations="constant_norm_rescale")),
        "topk_trained": TopKTrainingSAE(TopKTrainingSAEConfig(**topk)),
        "batchtopk": batch,
        "jumprelu": JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=L)),
    }
    shutil.rmtree(FOLDER, ignore_errors=True)
    x = 2 * torch.randn(N, D) + 1
    for name, sae in saes.items():
        with torch.no_grad():
            for bias in (sae.b_enc, sae.b_dec):
                bias.normal_(std=0.3)
            sae.W_enc.normal_()
            sae.W_dec.mul_(torch.rand(L, 1) + 0.5)
            if name == "jumprelu":
                sae.threshold.uniform_(0.0, 1.0)
        folder = FOLDER / name
        sae.save_model(folder)
        keep(folder, sae if name == "batchtopk" else SAE.load_from_disk(folder), x)
    batch.save_inference_model(FOLDER / "batchtopk_inference")  # a JumpReLU there
    keep(FOLDER / "batchtopk_inference", SAE.load_from_disk(FOLDER / "batchtopk_inference"), x)


def keep(folder: Path, sae: torch.nn.Module, x: torch.Tensor) -> None:
    with torch.no_grad():
        codes = sae.encode(x)
        save_file({"x": x, "codes": codes, "recons": sae.decode(codes)}, folder / "computed.safetensors")


if __name__ == "__main__":
    record()

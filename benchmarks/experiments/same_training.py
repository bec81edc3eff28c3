"""Do two installed versions of sparc_fast train the same bits?

``python benchmarks/experiments/same_training.py OLD NEW``: each is a command that starts the Python that has a version,
like ``/old/.venv/bin/python`` or ``"env PYTHONPATH=/old python"``. Each trains every case in a process of its own, and
weights, buffers, moments, losses and gradients are compared byte for byte. Then both read the model files of the old
version, and go on with its interrupted run. Only public names that both have are used.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

WIDTHS = {"image": 40, "drawing": 24, "text": 12}
N_LATENTS, K, N_SAMPLES = 96, 6, 32
LR = 1e-2
RUN_STEPS, INTERRUPTED_AT = 30, 15

Bits = dict[str, Tensor]


def batches(
    steps: int, device: str, dtype: torch.dtype = torch.float32, zero_row: bool = True
) -> list[dict[str, Tensor]]:
    """Streams that see the same few concepts through directions of their own; one sample of one stream is all zero.

    Not to be calibrated, where such a row was a sample like any other once and is absent now.
    """
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(10, sum(WIDTHS.values()), generator=generator)
    drawn = []
    for _ in range(steps):
        x = (torch.randn(N_SAMPLES, 10, generator=generator) @ mixing).to(dtype)
        x[3, :40] = 0.0 if zero_row else 0.1
        drawn.append({name: part.to(device) for name, part in zip(WIDTHS, x.split([*WIDTHS.values()], 1), strict=True)})
    return drawn


def some_streams(i: int) -> list[str]:
    """Of the streams, two, one or all, in turns; the first batch has all."""
    chosen = ((0, 1, 2), (0, 2), (1,), (0, 1), (2,), (1, 2))[i % 6]
    return [list(WIDTHS)[s] for s in chosen]


def model_of(**options: Any) -> Any:
    import sparc_fast as sf

    torch.manual_seed(0)
    options = {"auxk": 8, "dead_after": 150, **options}
    return sf.SPARC(WIDTHS, N_LATENTS, K, **options)


def bits_of(model: Any, optimizer: Any) -> Bits:
    bits = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for p, state in optimizer.state_dict()["state"].items():
        bits.update({f"state.{p}.{key}": tensor for key, tensor in state.items()})
    return bits


def bits_of_loss(i: int, loss: Any) -> Bits:
    return {f"loss.{i}.{name}": part.detach() for name, part in loss._asdict().items() if part is not None}


def fused(
    steps: int,
    model: Mapping[str, Any],
    optimizer: Mapping[str, Any],
    inputs: Callable[[int, dict[str, Tensor]], Any] = lambda i, batch: batch,
    step: Callable[[int], Mapping[str, Any]] = lambda i: {},
    calibrate: bool = False,
) -> Bits:
    """Training with SparcAdam."""
    import sparc_fast as sf

    trained = model_of(**model)
    drawn = batches(steps, trained.W_enc.device, trained.W_enc.dtype, zero_row=not calibrate)
    if calibrate:
        trained.calibrate(drawn[0])
    opt = sf.SparcAdam(trained, lr=LR, **optimizer)
    bits: Bits = {}
    for i, batch in enumerate(drawn):
        bits |= bits_of_loss(i, opt.step(inputs(i, batch), **step(i)))
        if i == steps // 2:  # what a lazy optimizer left behind is brought up to date on the way, too
            bits |= {f"middle.{name}": tensor for name, tensor in bits_of(trained, opt).items()}
            bits = {name: tensor.clone() for name, tensor in bits.items()}
    return bits | bits_of(trained, opt)


def autograd(
    steps: int,
    model: Mapping[str, Any],
    loss_of: Callable[[Any, int, dict[str, Tensor]], Any] = lambda model, i, batch: model.loss(batch),
) -> Bits:
    """Training with a loss's backward and torch's Adam."""
    trained = model_of(**model)
    opt = torch.optim.Adam(trained.parameters(), lr=LR)
    bits: Bits = {}
    for i, batch in enumerate(batches(steps, trained.W_enc.device, trained.W_enc.dtype)):
        opt.zero_grad()
        loss = loss_of(trained, i, batch)
        loss.total.backward()
        bits |= bits_of_loss(i, loss)
        bits |= {f"grad.{i}.{name}": p.grad.clone() for name, p in trained.named_parameters() if p.grad is not None}
        trained.project_gradients_()
        opt.step()
        trained.normalize_decoder_()
    return bits | bits_of(trained, opt)


def research_code(steps: int, topk_type: Any, device: str, backend: str) -> Bits:
    """The research code's class and loop, with torch's Adam."""
    from sparc_fast import compat

    torch.manual_seed(0)
    trained = compat.get_sae_model_class(topk_type)(
        WIDTHS, N_LATENTS, K, auxk=8, dead_steps_threshold=4, backend=backend
    ).to(device)
    opt = torch.optim.Adam(trained.parameters(), lr=LR)
    bits: Bits = {}
    for i, batch in enumerate(batches(steps, device)):
        batch["image"][3] = 1.0  # the research code divides by a zero row
        opt.zero_grad()
        total, losses = trained.compute_loss(trained(batch), batch)
        total.backward()
        bits |= {f"loss.{i}.{name}": torch.as_tensor(value).detach() for name, value in losses.items()}
        for decoder in trained.decoders.values():
            compat.unit_norm_decoder_(decoder)
            compat.unit_norm_decoder_grad_adjustment_(decoder)
        opt.step()
    return bits | bits_of(trained, opt)


def cases(steps: int, device: str, backend: str) -> Iterator[tuple[str, Callable[[], Bits]]]:
    model = {"device": device, "backend": backend}
    local, narrow = {**model, "selection": "local"}, {**model, "dtype": torch.bfloat16}
    lazy, rounded = {"lazy": "replay"}, {"moments": "bfloat16", "seed": 3}
    from_some = {"step": lambda i: {"support_from": some_streams(i)}}

    def absent(i: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in some_streams(i)}

    def parts(i: int, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        split = {name: x.split((7, 0, 16, 9)) for name, x in batch.items()}
        return [{name: x[j] for name, x in split.items()} for j in range(4)]

    def absent_parts(i: int, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        return parts(i, absent(i, batch))

    yield "global", lambda: fused(steps, model, {})
    yield "local", lambda: fused(steps, local, {})
    yield "side by side", lambda: fused(steps, model, {}, lambda i, batch: torch.cat([*batch.values()], 1))
    yield "no AuxK", lambda: fused(steps, {**model, "auxk": 0}, {})
    yield "AuxK wider than k", lambda: fused(steps, {**model, "auxk": 20}, {})
    yield "AuxK narrower than k", lambda: fused(steps, {**local, "auxk": 3}, {})
    yield "no cross loss", lambda: fused(steps, model, {}, step=lambda i: {"cross_loss_coef": 0.0})
    yield "AuxK comes and goes", lambda: fused(steps, model, {}, step=lambda i: {"auxk_coef": 0.5 * (i % 3)})
    yield "calibrated", lambda: fused(steps, model, {}, calibrate=True)
    yield "float64", lambda: fused(steps, {**model, "dtype": torch.float64}, {})
    yield "float16", lambda: fused(steps, {**model, "dtype": torch.float16}, {})
    yield "capturable", lambda: fused(steps, model, {"capturable": True})
    yield "capturable local", lambda: fused(steps, local, {"capturable": True}, absent)
    yield "replay", lambda: fused(steps, model, lazy)
    yield "replay local", lambda: fused(steps, local, lazy)
    yield "replay absent", lambda: fused(steps, model, lazy, absent)
    yield "replay bf16 moments", lambda: fused(steps, model, {**lazy, **rounded})
    yield "replay bf16 weights", lambda: fused(steps, narrow, lazy)
    yield "bf16 moments", lambda: fused(steps, model, rounded)
    yield "bf16 weights", lambda: fused(steps, narrow, {})
    yield "bf16 both", lambda: fused(steps, {**narrow, "selection": "local"}, rounded)
    yield "accumulate", lambda: fused(steps, model, {}, parts)
    yield "accumulate local", lambda: fused(steps, local, {}, parts)
    yield "accumulate absent", lambda: fused(steps, model, {}, absent_parts)
    yield "accumulate replay", lambda: fused(steps, model, lazy, parts)
    yield "accumulate bf16", lambda: fused(steps, narrow, rounded, parts)
    yield "accumulate from some", lambda: fused(steps, model, {}, parts, **from_some)
    yield "absent", lambda: fused(steps, model, {}, absent)
    yield "absent local", lambda: fused(steps, local, {}, absent)
    yield "support_from", lambda: fused(steps, model, {}, **from_some)
    yield "autograd", lambda: autograd(steps, model)
    yield "autograd local", lambda: autograd(steps, local)
    yield "autograd bf16", lambda: autograd(steps, narrow)
    yield "autograd absent", lambda: autograd(steps, model, lambda model, i, batch: model.loss(absent(i, batch)))
    yield (
        "autograd coefficients",
        lambda: autograd(steps, local, lambda model, i, batch: model.loss(batch, i % 2, 0.3 * (i % 3))),
    )
    yield (
        "autograd support_from",
        lambda: autograd(steps, model, lambda model, i, batch: model.loss(batch, support_from=some_streams(i))),
    )
    yield "forward", lambda: autograd(steps, model, lambda model, i, batch: model(batch).loss)
    yield "forward local", lambda: autograd(steps, local, lambda model, i, batch: model(batch, 0.5).loss)
    yield "compat global", lambda: research_code(steps, "global", device, backend)
    yield "compat local", lambda: research_code(steps, "local", device, backend)


RUNS: dict[str, dict[str, Any]] = {
    "dense": {},
    "replay": {"lazy": True, "moments": "bfloat16", "seed": 3},
    "accumulate": {"accumulate": 3, "selection": "local", "support_dropout": 0.0},
}


def train_run(folder: Path, **changes: Any) -> None:
    """Train in a folder, or go on there, with every schedule at work and latents dying."""
    from sparc_fast import data
    from sparc_fast.training import Config, Trainer

    rows = batches(40, "cpu", zero_row=False)
    files = data.open({name: torch.cat([batch[name] for batch in rows]) for name in WIDTHS})
    settings: dict[str, Any] = {
        "n_latents": 64, "k": 3, "auxk": 8, "dead_after": 300, "steps": RUN_STEPS, "batch_size": 32, "lr": 1e-2,
        "support_dropout": 0.3, "k_start": 6, "k_ramp": 0.5, "cross_loss_ramp": 0.2, "reading_threads": 1,
        "calibration_rows": 500, "log_every": 7, "checkpoint_every": INTERRUPTED_AT, "keep": 9,
    }  # fmt: skip
    with Trainer(Config(**{**settings, **changes}), folder, files=files) as trainer:
        trainer.run()


def record(folder: Path, steps: int, device: str, backend: str) -> None:
    """Every case's bits, a model file of each selection, and runs to their end and to their middle."""
    for name, train in cases(steps, device, backend):
        torch.save(train(), folder / f"{name}.pt")
    for selection in ("global", "local"):
        model = model_of(selection=selection)
        model.calibrate(batches(1, "cpu", zero_row=False)[0])
        model.save(folder / f"{selection}.safetensors")
    for name, changes in RUNS.items():
        train_run(folder / "finished" / name, **changes)
        middle = folder / "interrupted" / name
        shutil.copytree(folder / "finished" / name, middle)
        (middle / "model.safetensors").unlink()
        (middle / "checkpoints" / f"step-{RUN_STEPS:09d}.safetensors").unlink()


def read(folder: Path, of_old: Path) -> None:
    """What this version makes of the old version's model files, and of its interrupted runs."""
    import sparc_fast as sf

    for selection in ("global", "local"):
        model = sf.SPARC.load(of_old / f"{selection}.safetensors")
        batch = batches(1, "cpu", zero_row=False)[0]
        codes = model.encode(batch)
        bits = {
            "values": codes.values,
            "indices": codes.indices,
            "recon": model.decode(codes, "text", "image"),
        }
        bits = {name: tensor.detach() for name, tensor in bits.items()} | bits_of_loss(0, model.loss(batch))
        torch.save(bits | dict(model.state_dict()), folder / f"read {selection}.pt")
        model.save(folder / f"read {selection}.safetensors")
    shutil.copytree(of_old / "interrupted", folder / "resumed")
    for name, changes in RUNS.items():
        train_run(folder / "resumed" / name, **changes)


def difference(old: Bits, new: Bits) -> str:
    """The first tensor that is not the same, in words; empty when all are."""
    if old.keys() != new.keys():
        return f"other tensors: {sorted(old.keys() ^ new.keys())[:4]}"
    for name, a in old.items():
        b = new[name]
        if a.dtype != b.dtype or a.shape != b.shape:
            return f"{name}: {a.dtype} {list(a.shape)}, now {b.dtype} {list(b.shape)}"
        flat = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
        if not torch.equal(*flat):
            return f"{name}: up to {(a.double() - b.double()).abs().max():.3g} apart"
    return ""


def file_difference(old: Path, new: Path) -> str:
    """As `difference`. Means of losses may be rounded otherwise, and are kept with more counts in a checkpoint."""
    if not new.is_file():
        return "not there"
    if old.suffix == ".safetensors":
        tensors = [load_file(path) for path in (old, new)]
        for bits in tensors:
            bits.pop("metrics.sums", None)
        return difference(*tensors)
    a, b = (dict(numbers_of(path.read_text().splitlines())) for path in (old, new))
    if a.keys() != b.keys():
        return f"other numbers: {sorted(a.keys() ^ b.keys())[:4]}"
    return "".join(
        f"{name}: {a[name]}, now {b[name]}; " for name in a if not math.isclose(a[name], b[name], rel_tol=1e-14)
    )


def numbers_of(lines: Sequence[str]) -> Iterator[tuple[str, float]]:
    """What a metrics.jsonl says, by line and name."""
    from sparc_fast.training.metrics import flat

    for i, line in enumerate(lines):
        yield from ((f"{i}/{name}", float(value)) for name, value in flat({"": json.loads(line)}))


def compare(old: Path, new: Path) -> int:
    """Print a line a case; how many differ."""
    failures = 0
    for path in sorted(old.glob("*.pt")):
        bits = [torch.load(folder / path.name, weights_only=True) for folder in (old, new)]
        differs = difference(*bits)
        failures += bool(differs)
        with_auxk = sum(name.startswith("loss.") and name.endswith((".auxk", ".avg_auxk_loss")) for name in bits[0])
        print(f"{path.stem:24} {len(bits[0]):5} tensors, {with_auxk:2} steps with AuxK: {differs or 'the same'}")
    for path in sorted(old.rglob("*")):
        compared = path.suffix == ".safetensors" or path.name == "metrics.jsonl"
        if path.is_file() and compared and "finished" not in path.parts:
            differs = file_difference(path, new / path.relative_to(old))
            failures += bool(differs)
            print(f"{path.relative_to(old)!s:60} {differs or 'the same'}")
    for name in RUNS:
        for file in ("metrics.jsonl", "model.safetensors"):
            differs = file_difference(old / "finished" / name / file, new / "resumed" / name / file)
            failures += bool(differs)
            print(f"{f'old run, {name}, ended by new: {file}':60} {differs or 'the same'}")
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", help="command that starts the old version's Python")
    parser.add_argument("new", help="command that starts the new version's Python")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)  # what the two processes are asked to do
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.record:
        torch.set_num_threads(1)  # no result depends on it, and the work is tiny
        if asked.read:
            read(asked.record, asked.read)
        else:
            record(asked.record, asked.steps, asked.device, asked.backend)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch, name) for name in ("old", "new")]
        options = ["--steps", str(asked.steps), "--device", asked.device, "--backend", asked.backend]
        for folder in folders:
            folder.mkdir()
        for extra in ([], ["--read", str(folders[0])]):
            for command, folder in zip((asked.old, asked.new), folders, strict=True):
                here = [*shlex.split(command), str(Path(__file__).resolve()), "-", "-", "--record", str(folder)]
                subprocess.run([*here, *options, *extra], check=True, cwd=scratch)
        failures = compare(*folders)
    print(f"{failures} differ" if failures else "all the same")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

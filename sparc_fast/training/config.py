"""All settings of a training run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from typing import Any

from .settings import (
    Sources,
    about,
    below_one,
    choice,
    flag,
    integer,
    not_negative,
    part,
    positive,
    setting,
    sources,
    text,
)

REQUIRED = MISSING


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a run. Each is checked; `help_of` and docs/training.md say what each means.

    Raises:
        ValueError: names the setting, what was expected and what came.
    """

    data: Sources = field(
        default_factory=dict, metadata=about(sources, "the streams' files, in the model's order", free=True)
    )
    validation_data: Sources = field(
        default_factory=dict, metadata=about(sources, "the same streams' held-out files", free=True)
    )
    validation_rows: int = setting(
        0, integer(0), "rows of `data` held out instead, in up to 64 blocks spread evenly over the files"
    )

    n_latents: int = setting(REQUIRED, integer(1), "L, latents of the shared dictionary")
    k: int = setting(REQUIRED, integer(1), "latents kept per sample")
    selection: str = setting("global", choice("global", "local"), "one support for all streams, or one for each")
    auxk: int = setting(64, integer(0), "dead latents that reconstruct the residual; 0 turns AuxK off")
    dead_after: int = setting(256_000, integer(0), "samples without firing after which a latent is dead")
    dtype: str = setting(
        "float32", choice("float32", "bfloat16", "float16"), "of the weights; Adam's master rows stay float32"
    )

    moments: str = setting(
        "float32", choice("float32", "bfloat16"), "of Adam's moments of the weights; bfloat16 is rounded stochastically"
    )

    steps: int = setting(0, integer(0), "optimizer steps; or give `epochs`")
    epochs: float = setting(0.0, not_negative, "passes over the data; or give `steps`")
    batch_size: int = setting(4096, integer(1), "rows of an optimizer step; the rows that an epoch has over wait")
    accumulate: int = setting(1, integer(1), "micro-batches in which the rows of a step pass through the model")
    seed: int = setting(0, integer(0), "of first weights, shuffling, support dropout and rounding")

    lr: float = setting(1e-4, positive, "SparcAdam's learning rate at its peak")
    warmup: float = setting(0.05, part, "the part of the steps in which the learning rate rises to `lr`")
    decay: str = setting("cosine", choice("cosine", "linear", "constant"), "how the learning rate falls after that")
    lr_end: float = setting(0.0, part, "the part of `lr` that is left at the end")
    beta_1: float = setting(0.9, below_one, "Adam's decay of the first moment")
    beta_2: float = setting(0.999, below_one, "Adam's decay of the second moment")
    eps: float = setting(1e-8, not_negative, "Adam's epsilon")
    lazy: bool = setting(False, flag, "update decoder rows when they are next read: the same bits", free=True)

    cross_loss_coef: float = setting(1.0, not_negative, "λ, the weight of the cross-reconstruction loss")
    cross_loss_start: float = setting(0.0, not_negative, "λ at the first step, where `cross_loss_ramp` > 0")
    cross_loss_ramp: float = setting(0.0, part, "the part of the steps in which λ goes from its start to its value")
    k_start: int = setting(0, integer(0), "k at the first step, where `k_ramp` > 0")
    k_ramp: float = setting(0.0, part, "the part of the steps in which k goes from its start to its value")
    auxk_coef: float = setting(1 / 32, not_negative, "the weight of AuxK")
    support_dropout: float = setting(0.0, below_one, "probability that a stream has no say in a batch's support")

    calibrate: bool = setting(True, flag, "measure the streams first, so that none outweighs the others")
    calibration_rows: int = setting(100_000, integer(1), "rows measured, at most one epoch")

    log_every: int = setting(50, integer(1), "steps from one line of metrics to the next, each a mean over them")
    validate_every: int = setting(1000, integer(1), "steps from one validation to the next")
    checkpoint_every: int = setting(1000, integer(1), "steps from one checkpoint to the next", free=True)
    keep: int = setting(2, integer(1), "checkpoints kept, beside the best", free=True)
    best_by: str = setting("loss", choice("loss", "single_loss"), "the validation figure whose lowest is the best")

    memory: int = setting(2**31, integer(1), "bytes the loader may take", free=True)
    reading_threads: int = setting(0, integer(0), "threads that read files; 0: the loader chooses", free=True)
    device: str = setting("auto", text, "auto (a GPU where there is one), cpu, cuda or cuda:1", free=True)
    backend: str = setting("auto", text, "auto, or one of sparc_fast.available_backends()", free=True)
    tensorboard: bool = setting(False, flag, "also write TensorBoard's event files", free=True)
    wandb: str = setting("", text, "also log to this project at Weights & Biases", free=True)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            kind = f.metadata["kind"]
            try:
                object.__setattr__(self, f.name, kind.convert(value))
            except (TypeError, ValueError):
                raise ValueError(f"{f.name} must be {kind.expected}, got {value!r}") from None
        self._check_together()

    @property
    def micro_batch(self) -> int:
        """The most rows that pass through the model at a time."""
        return -(-self.batch_size // self.accumulate)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Config:
        """From a mapping, as a file holds it; ValueError names unknown settings, and what they may have meant."""
        known = {f.name: f for f in fields(cls)}
        for name in settings:
            if name not in known:
                raise ValueError(f"{name} is not a setting{_hint(str(name), list(known))}")
        missing = [name for name, f in known.items() if _is_required(f) and name not in settings]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must be given")
        return cls(**settings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data that JSON can hold."""
        return asdict(self)

    def differences(self, other: Config) -> list[str]:
        """Settings in which the two would give different results."""
        bound = [f.name for f in fields(self) if not f.metadata["free"]]
        return [name for name in bound if getattr(self, name) != getattr(other, name)]

    def _check_together(self) -> None:
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError(f"steps or epochs must be given, and only one, got {self.steps} and {self.epochs}")
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size={self.batch_size}, got {self.accumulate}")
        if self.accumulate > 1 and self.lazy and self.moments == "bfloat16":
            raise ValueError(f"accumulate must be 1 with lazy and bfloat16 moments, got {self.accumulate}")
        if self.k > self.n_latents:
            raise ValueError(f"k must be between 1 and n_latents={self.n_latents}, got {self.k}")
        if (self.k_start > 0) != (self.k_ramp > 0):
            raise ValueError(f"k_start and k_ramp must be given together, got {self.k_start} and {self.k_ramp}")
        if self.k_start > self.n_latents:
            raise ValueError(f"k_start must be at most n_latents={self.n_latents}, got {self.k_start}")
        if self.cross_loss_start > 0 and self.cross_loss_ramp == 0:
            raise ValueError(f"cross_loss_ramp must be > 0 with cross_loss_start={self.cross_loss_start}, got 0")
        if self.support_dropout and self.selection == "local":
            raise ValueError("support_dropout must be 0 under local selection: each stream chooses its own support")
        if self.validation_rows and self.validation_data:
            raise ValueError("validation_rows and validation_data must not both be given: they say the same")
        if self.validation_data and list(self.validation_data) != list(self.data):
            raise ValueError(
                f"validation_data must name the streams of data, {list(self.data)}, got {list(self.validation_data)}"
            )


def help_of(name: str) -> str:
    """What a setting means."""
    return {f.name: str(f.metadata["help"]) for f in fields(Config)}[name]


def _is_required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


ELSEWHERE = {
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "topk_type": "selection",
    "dead_steps_threshold": "dead_after (in samples, not batches)",
    "lambda": "cross_loss_coef",
    "lambda_cross": "cross_loss_coef",
    "scheduler": "decay",
}
"""What other programs call some settings."""


def _hint(name: str, known: list[str]) -> str:
    if "accum" in name or "micro" in name:
        return "; did you mean accumulate, into how many micro-batches the batch_size rows of a step are split?"
    meant = ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, known, 1, 0.5)), None)
    return f"; did you mean {meant}?" if meant else f"; the settings are {', '.join(known)}"

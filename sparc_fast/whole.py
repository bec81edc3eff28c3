"""What a model does that holds all of its latents, where one that shares them between processes exchanges: nothing.

`sparc_fast.distributed.Shards` says it for those that share them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sparc_fast import checkpoint
from sparc_fast.ops.backends import Backend

if TYPE_CHECKING:
    from sparc_fast.batch import BatchSamples, Moments
    from sparc_fast.data import AlignedFiles

T = TypeVar("T")


class Whole:
    """One process with all latents and all samples."""

    is_whole = True
    rank, ranks = 0, 1
    has_replicas = False
    leads = True
    """Whether it is this process that writes files which one writes."""

    def rows(self, n_latents: int) -> slice:
        """Those of all latents whose weights are here."""
        return slice(0, n_latents)

    def draw(self, rows: Tensor, bound: float) -> None:
        """Fill some columns of the rows that are here with their part of what is drawn for all, even in +-bound."""
        rows.uniform_(-bound, bound)

    def backend(self, name: str, device: torch.device) -> str | Backend:
        """The operators whose results depend on latents that are elsewhere, too."""
        return name

    def nested(self, sizes: Sequence[int]) -> Sequence[int]:
        """Of nested dictionaries of these sizes, where the groups of latents end that grad_recons are of, here."""
        return sizes

    def compact(self, indices: Tensor) -> Tensor:
        """A support without the slots that no sample needs here."""
        return indices

    def begin_batch(self, own: Callable[[], BatchSamples]) -> Callable[[], BatchSamples]:
        """The samples of all processes, each process's made by `own`, when it is called; they come meanwhile."""
        return own

    def agreed(self, call: str) -> AbstractContextManager[None]:
        """What fails in one process here fails in all, which must make the same call."""
        return nullcontext()

    def sum(self, part: Tensor) -> Tensor:
        """Of all latents, from those of the latents that are here."""
        return part

    def of_latents(self, numbers: Tensor) -> Tensor:
        """[L, ...] of all latents, from [n, ...] of those that are here."""
        return numbers

    def of_one(self, part: Tensor) -> Tensor:
        """Of all processes' parts, of which at most one is not 0 at a place, what is there."""
        return part

    def total(self, n: int) -> int:
        """The same of a number."""
        return n

    def of_ranks(self, numbers: Tensor) -> Tensor:
        """[rank, ...] the numbers of every process that shares these latents."""
        return numbers[None]

    def samples(self, n: int) -> int:
        """How many all processes have together, of which this one has n."""
        return n

    def of_all_replicas(self, n: int) -> int:
        """How many samples of a batch all replicas have, of which this one has n."""
        return n

    def in_replicas_before(self, n: int, call: int) -> int:
        """The sum of the numbers of the replicas before this one."""
        return 0

    def first_samples(self, rows: Tensor, n: int) -> Tensor:
        """Those rows here that are among the first n of all processes together."""
        return rows[:n]

    def of_replicas(self, *tensors: Tensor) -> Sequence[Tensor]:
        """Samples of all replicas below each other, as `sparc_fast.batch.stack` puts them."""
        return tensors

    def sum_of_replicas(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors

    def moments(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        """Of each stream's samples, with those of all replicas."""
        return moments

    def told_by_replicas(self, mine: T) -> list[T]:
        """What every replica has; tensors in it take long."""
        return [mine]

    def most(self, n: int) -> int:
        """The largest of all processes' numbers."""
        return n

    def codes(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Values and supports of all latents."""
        return values, indices

    def decode(self, decode: Callable[[Tensor, Tensor], Tensor], values: Tensor, indices: Tensor) -> Tensor:
        """Reconstructions from values and supports of all latents, by an operator that knows those here."""
        return decode(values, indices)

    def own(self, rows: Tensor | None) -> Tensor | None:
        """This process's samples of those that all have."""
        return rows

    def each(self, numbers: Tensor) -> Tensor:
        """[process, ...] the numbers of every process."""
        return numbers[None]

    def save(self, path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """One model file, of tensors of which the rows that are here are given."""
        checkpoint.save(path, tensors, config)

    def together(self, model: T) -> T:
        """The model, to which all processes give the same samples and of which all have the same results."""
        return model

    def check_samples(self, inputs: Mapping[str, Tensor] | AlignedFiles) -> None:
        """ValueError where processes were given others."""

    def told_by_leader(self, numbers: list[int]) -> list[int]:
        """The same in all processes, whatever each has seen."""
        return numbers

    def seed(self, seed: int) -> int:
        """Of random numbers for each weight that is here."""
        return seed


WHOLE = Whole()

"""Which row comes when: a function of the seed and the epoch alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["Rows", "Shuffling", "permutation", "uniform"]

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shuffling:
    """N rows in blocks of neighbours; every epoch deals the blocks out to windows, and mixes the rows of a window.

    A row lands in every window with the same probability, whatever the order of the file, and within its window at
    every place with the same probability. Rows of one block stay in one window. One window: a uniform permutation.
    """

    n_rows: int
    block_rows: int
    window_blocks: int
    """Blocks of a window at most; windows differ by one block at most."""
    seed: int
    shuffle: bool = True

    @cached_property
    def n_blocks(self) -> int:
        return -(-self.n_rows // self.block_rows)

    @cached_property
    def n_windows(self) -> int:
        return -(-self.n_blocks // self.window_blocks)

    @property
    def window_rows(self) -> int:
        """Rows of a window at most."""
        return min(self.n_rows, self.window_blocks * self.block_rows)

    def windows(self, epoch: int) -> list[Rows]:
        """The blocks of each window of an epoch, ascending: a file is read in one direction."""
        order = permutation(self.n_blocks, self.seed, epoch, 0) if self.shuffle else np.arange(self.n_blocks)
        return [np.sort(window) for window in np.array_split(order, self.n_windows)]

    def rows(self, block: int) -> tuple[int, int]:
        """(start, stop) of a block in the files."""
        return block * self.block_rows, min((block + 1) * self.block_rows, self.n_rows)

    def n_rows_of(self, window: Rows) -> int:
        """Rows of a window: only the last block can be short, and it is the last of its window."""
        start, stop = self.rows(int(window[-1]))
        return (len(window) - 1) * self.block_rows + stop - start

    def order(self, epoch: int, window: int, n: int) -> Rows:
        """The order in which the n rows of a window come."""
        return permutation(n, self.seed, epoch, window + 1) if self.shuffle else np.arange(n)


def permutation(n: int, *seeds: int) -> Rows:
    """A uniform permutation of n, the same with every version of NumPy: only PCG64's raw numbers are promised."""
    return np.argsort(np.random.PCG64(seeds).random_raw(n), kind="stable")


def uniform(start: int, stop: int, *seeds: int) -> npt.NDArray[np.float64]:
    """Numbers start <= n < stop of a sequence of uniform ones in [0, 1), each computed by itself (SplitMix64)."""
    key = np.random.PCG64(seeds).random_raw(1)
    bits = np.arange(start, stop, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray((bits ^ (bits >> np.uint64(31))) >> np.uint64(11), np.float64) * 2.0**-53

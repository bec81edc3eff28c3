"""What processes tell each other: collectives of torch.distributed on bytes, which every backend has for every dtype.

Sums are made here, in the order of ranks: the same bits in every run, on every number of links. What is begun comes
while a rank works, and is waited for when what that returned is called; all ranks begin, and wait, in the same order.
"""

from __future__ import annotations

import hashlib
import pickle
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, repeat
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparc_fast.ops.huge_pages import lent

from . import shared_memory
from .neighbours import MOST, Neighbours, neighbours
from .watch import watch

T = TypeVar("T")
MEETING, OBJECTS = 6, 9  # calls, as ranks tell them apart
NUMBERS = 8  # that every rank tells of a call, whatever it is: calls that differ are found out


class Room(NamedTuple):
    """Where rows of all ranks come to."""

    rows: Tensor
    is_shared: bool
    """Whether it is memory of all ranks, to which each writes its own."""

    def part(self, first: int, n: int) -> Room:
        return self._replace(rows=self.rows[first : first + n])


class Exchange:
    """The collectives of a process group, and the bytes that they have brought here."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._watch = watch()
        self.received: Counter[str] = Counter()
        """By what they are."""
        by_hosts = "cpu" in dist.get_backend_config(group)
        self._of_numbers = torch.device("cpu") if by_hosts else device  # a host waits for no device then
        self._neighbours: Neighbours | None = None
        self._memory: shared_memory.SharedMemory | None = None
        if self.ranks > 1:
            self._neighbours = neighbours(self.rank, self.ranks, self.objects)
            self._memory = (
                shared_memory.shared_memory(self.rank, self.objects, self.numbers) if device.type == "cpu" else None
            )

    def gather(self, rows: Tensor, counts: Sequence[int], what: str) -> Tensor:
        """The rows of all ranks, of which each has as many as `counts` says, below each other, [sum counts, ...].

        To be read only: ranks of one host have them in one place.
        """
        return self.begin_gather(rows, counts, what)()

    def begin_gather(
        self, rows: Tensor, counts: Sequence[int], what: str, room: Room | None = None
    ) -> Callable[[], Tensor]:
        """`gather`, into `room` where there is some."""
        shape, n = rows.shape[1:], sum(counts)
        if self.ranks == 1:
            return lambda: rows
        if not n or not shape.numel():
            return lambda: rows.new_empty(n, *shape)
        if room is None and (shared := self._shared(rows, n)) is not None:
            room = Room(shared, True)
        if room is None or not room.is_shared:
            return self._begin_by_message(rows, counts, what, None if room is None else room.rows)
        first = sum(counts[: self.rank])
        room.rows[first : first + len(rows)] = rows
        self.received[what] += (n - len(rows)) * shape.numel() * rows.itemsize
        return self._begin_meeting(room.rows)

    def room(self, like: Tensor, n: int) -> Room:
        """For n rows like these."""
        shared = self._shared(like, n)
        return Room(_empty_like(like, n) if shared is None else shared, shared is not None)

    def packed(self, number: int, tensor: Tensor, what: str) -> tuple[list[int], list[Tensor]]:
        """([rank] -> its number, [rank] -> its tensor, of the same shape on all), in one message."""
        told = torch.tensor([number], dtype=torch.int64, device="cpu").to(self.device)
        message = torch.cat([_bytes(told), _bytes(tensor.contiguous())])
        of_all = self.gather(message[None], [1] * self.ranks, what)
        numbers, tensors = torch.split(of_all, [told.nbytes, tensor.nbytes], dim=1)
        # copies: each begins where its type may
        own = [row.clone().view(tensor.dtype).view(tensor.shape) for row in tensors]
        return numbers.reshape(-1).view(torch.int64).tolist(), own

    def deal(
        self, rows: Tensor, counts: Sequence[int], what: str, parts: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of rows [sum counts, ...] that every rank has, all ranks' for this one's share of n.

        Or each rank has several `parts` of every row: of the first rank's share, part below part, then of the next.

        Returns (rows, numbers [sum parts, n]): where among the rows each part, in the order of ranks, of each of the
        share is. To be read only.
        """
        return self.begin_deal(rows, counts, what, parts)()

    def begin_deal(
        self, rows: Tensor, counts: Sequence[int], what: str, parts: Sequence[int] | None = None
    ) -> Callable[[], tuple[Tensor, Tensor]]:
        """`deal`; what `rows` are is not to change until it is there."""
        n, shape, N, P = counts[self.rank], rows.shape[1:], sum(counts), self.ranks
        parts = [1] * P if parts is None else parts
        before = [sum(parts[:rank]) for rank in range(P + 1)]
        if P == 1:
            return lambda: (rows, self._numbers([0], parts, n))
        size = shape.numel() * rows.itemsize
        self.received[what] += n * size * (before[P] - parts[self.rank])
        if (shared := self._shared(rows, before[P] * N, shared_memory.LEAST_DEALT)) is not None:
            shared[before[self.rank] * N : before[self.rank + 1] * N] = rows
            met = self._begin_meeting(shared)
            first = sum(counts[: self.rank])
            begins = [before[rank] * N + parts[rank] * first for rank in range(P)]
            return lambda: (met(), self._numbers(begins, parts, n))
        sent, mine = _bytes(rows.contiguous()), _empty_like(rows, before[P] * n)
        given, taken = [parts[self.rank] * m * size for m in counts], [m * n * size for m in parts]
        with self.with_others():
            work = dist.all_to_all_single(_bytes(mine), sent, taken, given, group=self.group, async_op=True)
        dealt = self._waiting_for(work, sent)

        def wait() -> tuple[Tensor, Tensor]:
            dealt()
            return mine, self._numbers([before[rank] * n for rank in range(P)], parts, n)

        return wait

    def _numbers(self, begins: Sequence[int], parts: Sequence[int], n: int) -> Tensor:
        """[sum parts, n] of rows that begin there, rank by rank, part below part."""
        each = [begin + part * n for begin, m in zip(begins, parts, strict=True) for part in range(m)]
        first = torch.tensor(each, dtype=torch.int64, device="cpu").to(self.device)
        return first[:, None] + torch.arange(n, device=self.device)

    def hand(self, rows: Tensor, counts: Sequence[int], wanted: Sequence[Sequence[int]], what: str) -> Tensor:
        """Of [G, n, ...], groups of this rank's share of n, to each rank those of all shares that it wants.

        Returns those that are `wanted` here, [W, sum counts, ...]. To be read only.
        """
        mine, N, P, (G, n, *shape) = wanted[self.rank], sum(counts), self.ranks, rows.shape
        if P == 1:
            return rows[_slice(mine)]
        size = rows.shape[2:].numel() * rows.itemsize
        self.received[what] += len(mine) * (N - n) * size
        if (shared := self._shared(rows.flatten(0, 1), G * N, shared_memory.LEAST_DEALT)) is not None:
            of_all, first = shared.view(G, N, *shape), sum(counts[: self.rank])
            of_all[:, first : first + n] = rows
            self._begin_meeting(shared)()
            return of_all[_slice(mine)]
        sent = torch.cat([rows[_slice(some)].flatten(0, 1) for some in wanted])
        found = _empty_like(sent, len(mine) * N)
        given, taken = [len(some) * n * size for some in wanted], [len(mine) * m * size for m in counts]
        with self.with_others():
            dist.all_to_all_single(_bytes(found), _bytes(sent), taken, given, group=self.group)
        pieces = torch.split(found, [len(mine) * m for m in counts])
        return torch.cat([piece.view(len(mine), -1, *shape) for piece in pieces], dim=1)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, which are small."""
        return self.begin_sum(part)()

    def begin_sum(self, part: Tensor) -> Callable[[], Tensor]:
        """`sum`."""
        if self.ranks == 1 or not part.numel():
            return lambda: part
        gathered = self.begin_gather(part[None], [1] * self.ranks, "sums")

        def wait() -> Tensor:
            total, *others = gathered().unbind()
            for other in others:
                total = total + other
            return total

        return wait

    def one_of(self, part: Tensor, what: str) -> Tensor:
        """The sum of all ranks' parts where at most one of them is not 0, bit for bit; in place."""
        if self.ranks > 1 and part.numel():
            with self.with_others():
                dist.all_reduce(_bytes(part), group=self.group)
            self.received[what] += 2 * part.nbytes * (self.ranks - 1) // self.ranks
        return part

    def numbers(self, call: int, *numbers: int) -> list[list[int]]:
        """[rank] -> the numbers of this call there.

        Raises:
            RuntimeError: a rank makes another call.
        """
        return self.begin_numbers(call, *numbers)()

    def begin_numbers(self, call: int, *numbers: int) -> Callable[[], list[list[int]]]:
        """`numbers`; with them goes which shared memory a rank holds."""
        number, held = (0, 0) if self._memory is None else self._memory.held()
        told = [call, *numbers, *[0] * (NUMBERS - 2 - len(numbers)), held]
        arrived: Callable[[], list[int]] = lambda: told  # noqa: E731
        if self._neighbours is not None:
            of_numbers = self._begin_by_sockets(array("q", told).tobytes(), [8 * NUMBERS] * self.ranks)
            arrived = lambda: memoryview(of_numbers()).cast("q").tolist()  # noqa: E731
        elif self.ranks > 1:
            own = torch.tensor(told, dtype=torch.int64, device="cpu").to(self._of_numbers)
            of_ranks = self._begin_by_message(own, [NUMBERS] * self.ranks, "numbers")
            arrived = lambda: of_ranks().tolist()  # noqa: E731

        def wait() -> list[list[int]]:
            flat = arrived()
            of_all = [flat[first : first + NUMBERS] for first in range(0, len(flat), NUMBERS)]
            for rank, (other, *_) in enumerate(of_all):
                if other != call:
                    raise RuntimeError(
                        f"ranks must make the same calls in the same order, but rank {rank} made another"
                    )
            if self._memory is not None:
                self._memory.heard(number, (row[-1] for row in of_all))
            return [row[1 : 1 + len(numbers)] for row in of_all]

        return wait

    def objects(self, mine: T) -> list[T]:
        """[rank] -> what it has; tensors in it take long."""
        if self.ranks == 1:
            return [mine]
        own = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8).to(self._of_numbers)
        counts = [n for (n,) in self.numbers(OBJECTS, len(own))]
        of_all = self.gather(own, counts, "objects").cpu()
        return [pickle.loads(part.numpy().tobytes()) for part in torch.split(of_all, counts)]

    @contextmanager
    def with_others(self) -> Iterator[None]:
        """ConnectionError names the ranks that are gone, where what is done with all of them here fails."""
        try:
            with self._watch.waiting():
                yield
        except (RuntimeError, OSError) as error:
            ranks = dist.get_process_group_ranks(self.group)
            if not (gone := [rank for rank in self._watch.lost() if rank in ranks]):
                raise
            which = f"rank {gone[0]} is" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are"
            raise ConnectionError(f"{which} gone, and rank {self._watch.rank} cannot go on without") from error

    @contextmanager
    def agreed(self, call: str) -> Iterator[None]:
        """What fails in one rank here fails in all, and names it."""
        found: Exception | None = None
        try:
            yield
        except ConnectionError:
            raise
        except Exception as error:
            found = error
        if any(failed for (failed,) in self.numbers(number_of(call), found is not None)):
            self.fail(found)

    def fail(self, error: Exception | None) -> NoReturn:
        """Raise this rank's error, or where it has none, the first that another has."""
        kinds: tuple[type[Exception], ...] = (FloatingPointError, FileNotFoundError, OSError, ValueError, RuntimeError)
        mine = [kind.__name__ for kind in kinds if isinstance(error, kind)]
        told = self.objects("" if error is None else f"{(mine or ['RuntimeError'])[0]}:{error}")
        if error is not None:
            raise error
        rank, text = next((rank, text) for rank, text in enumerate(told) if text)
        name, _, words = text.partition(":")
        raise next(kind for kind in kinds if kind.__name__ == name)(f"rank {rank}: {words}")

    def _shared(self, like: Tensor, n: int, least: int | None = None) -> Tensor | None:
        """Memory of all ranks for n such rows; None where they share none, or the rows are not worth it."""
        n_bytes = n * like.shape[1:].numel() * like.itemsize
        if self._memory is None or n_bytes < (shared_memory.LEAST if least is None else least):
            return None
        memory = self._memory.take(n_bytes)
        return None if memory is None else memory.view(like.dtype).view(n, *like.shape[1:])

    def _begin_meeting(self, shared: Tensor) -> Callable[[], Tensor]:
        """With all ranks, which have then written what they had for that memory."""
        met = self.begin_numbers(MEETING)

        def wait() -> Tensor:
            met()
            return shared

        return wait

    def _begin_by_message(
        self, rows: Tensor, counts: Sequence[int], what: str, out: Tensor | None = None
    ) -> Callable[[], Tensor]:
        most, n, shape = max(counts), sum(counts), rows.shape[1:]
        size, own = shape.numel() * rows.itemsize, rows.contiguous()
        if self._neighbours is not None and most * size <= MOST and own.device.type == "cpu":
            self.received[what] += (n - len(own)) * size
            told = self._begin_by_sockets(_bytes(own).numpy().tobytes(), [some * size for some in counts])

            def received() -> Tensor:
                found = torch.frombuffer(told(), dtype=rows.dtype).view(n, *shape)
                return found if out is None else out.copy_(found)

            return received
        if len(own) < most:
            own = torch.cat([own, own.new_zeros(most - len(own), *shape)])
        into = _empty_like(own, n) if out is None else out
        all_rows = into if min(counts) == most else _empty_like(own, self.ranks * most)
        dist_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13
        with self.with_others():
            work = dist_gather(_bytes(all_rows), _bytes(own), group=self.group, async_op=True)
        arrived = self._waiting_for(work, own)
        self.received[what] += own.nbytes * (self.ranks - 1)

        def wait() -> Tensor:
            arrived()
            if all_rows is not into:
                parts = zip(torch.split(all_rows, most), counts, strict=True)
                torch.cat([part[:some] for part, some in parts], out=into)
            return into

        return wait

    def _begin_by_sockets(self, own: bytes, sizes: Sequence[int]) -> Callable[[], bytearray]:
        """The bytes of all ranks, one after another."""
        assert self._neighbours is not None
        with self.with_others():
            arrived = self._neighbours.begin_gather(own, sizes)

        def wait() -> bytearray:
            with self.with_others():
                return arrived()

        return wait

    def _waiting_for(self, work: dist.Work | None, sent: Tensor) -> Callable[[], Tensor]:
        """Until it is done, what is sent stays."""

        def wait() -> Tensor:
            if work is not None:
                with self.with_others():
                    work.wait()
            return sent

        return wait


def _empty_like(rows: Tensor, n: int) -> Tensor:
    """n such rows."""
    shape = rows.shape[1:]
    return lent(n, *shape, dtype=rows.dtype, device=rows.device)


def shares(n: int, ranks: int) -> list[int]:
    """How many of n samples each rank has, as evenly as can be."""
    return [(rank + 1) * n // ranks - rank * n // ranks for rank in range(ranks)]


def in_turn(pieces: Iterable[Iterator[object]]) -> None:
    """Go through pieces of work, each a stage behind the one before it: what one has begun comes while others work."""
    going: list[Iterator[object]] = []
    ended = object()
    for new in chain(([piece] for piece in pieces), repeat([])):
        going = [piece for piece in (*new, *going) if next(piece, ended) is not ended]
        if not new and not going:
            return


def number_of(text: str) -> int:
    """63 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _slice(numbers: Sequence[int]) -> slice | list[int]:
    """Which are neighbours are looked at where they are, others are copied."""
    few = slice(numbers[0], numbers[-1] + 1)
    return few if few.stop - few.start == len(numbers) else list(numbers)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)

"""A rank's latents among those of all: what it takes from the other ranks, and what it tells them.

Latents are shared out, samples are known to all: every rank has the inputs of the whole batch, and does for it what its
own latents have to do.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from sparc_fast.batch import BatchSamples, Moments
from sparc_fast.ops import backends
from sparc_fast.ops.backends import Backend
from sparc_fast.ops.layout import gradient_dtype, stream_slices, wide, wide_type
from sparc_fast.whole import T, Whole

from .batch_topk import batch_topk, latents_above
from .exchange import Exchange, in_turn, number_of, shares
from .layout import piece_size, rows_of, sizes_here
from .model_file import save_model
from .nested import nested_decode_loss
from .together import Together, fingerprint

if TYPE_CHECKING:
    from sparc_fast.data import AlignedFiles
    from sparc_fast.model import SPARC

BATCH, ROWS, NUMBER = 2, 3, 4  # calls, as ranks tell them apart
DRAWN_TOGETHER = 4096  # rows


class Shards(Whole):
    """Latents [first, last) of L, in equal shares of ceil(L / P); the last rank may have fewer."""

    is_whole = False

    @property
    def received(self) -> Counter[str]:
        """Bytes that came here, by what they are."""
        exchanges = {id(one): one for one in (self.exchange, self.all, self.replicas) if one is not None}
        return sum((one.received for one in exchanges.values()), Counter())

    def __init__(self, mesh: DeviceMesh, n_latents: int, device: torch.device) -> None:
        self.mesh, self.n_latents = mesh, n_latents
        self.exchange = Exchange(mesh.get_group(mesh.ndim - 1), device)
        self.replicas = Exchange(mesh.get_group(0), device) if mesh.ndim == 2 else None
        everybody = distributed.group.WORLD
        assert everybody is not None
        self.all = Exchange(everybody, device) if mesh.ndim == 2 else self.exchange
        self.has_replicas = self.replicas is not None
        self.rank, self.ranks, self.leads = self.all.rank, self.all.ranks, self.all.rank == 0
        among, parts = self.exchange.rank, self.exchange.ranks
        share = -(-n_latents // parts)
        if share * (parts - 1) >= n_latents:
            raise ValueError(
                f"n_latents must be enough for {parts} ranks of {share} each, the last of at least one, got {n_latents}"
            )
        own = rows_of(n_latents, among, parts)
        self.first, self.last = own.start, own.stop
        self._backends: dict[tuple[str, torch.device], Backend] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Shards:
        return self  # a process group has no copy

    def rows(self, n_latents: int) -> slice:
        return slice(self.first, self.last)

    def draw(self, rows: Tensor, bound: float) -> None:
        """On the CPU, so that every device and number of ranks begins with the same weights."""
        for start in range(0, self.n_latents, DRAWN_TOGETHER):
            n = min(DRAWN_TOGETHER, self.n_latents - start)
            drawn = torch.empty(n, rows.shape[1], dtype=rows.dtype, device="cpu").uniform_(-bound, bound)
            here = slice(max(start, self.first), min(start + n, self.last))
            if here.start < here.stop:
                own = slice(here.start - self.first, here.stop - self.first)
                rows[own] = drawn[here.start - start : here.stop - start].to(rows.device)

    def backend(self, name: str, device: torch.device) -> Backend:
        if (name, device) not in self._backends:
            of_rows = _OfRows(backends.resolve(name, device), self.exchange)
            operators: dict[str, Callable[..., Any]] = {
                "global_topk": of_rows.global_topk, "decode_loss": of_rows.decode_loss,
                "batch_topk": partial(batch_topk, of_rows.backend, self.exchange, self.all, self),
                "latents_above": partial(latents_above, of_rows.backend, self.exchange),
                "nested_decode_loss": partial(nested_decode_loss, of_rows.backend, self.exchange),
            }  # fmt: skip
            self._backends[name, device] = backends.replaced(of_rows.backend, operators)
        return self._backends[name, device]

    def nested(self, sizes: Sequence[int]) -> Sequence[int]:
        return sizes_here(sizes, self.exchange.rank, self.exchange.ranks) if sizes else sizes

    def compact(self, indices: Tensor) -> Tensor:
        """A sample's own latents go to the left, in their order."""
        if indices.device.type != "cpu":  # how many there are is not waited for
            return indices
        own = indices >= 0
        counts = own.sum(-1)
        width = max(1, int(counts.max())) if counts.numel() else 1
        if width == indices.shape[-1]:
            return indices
        places = torch.where(own, own.cumsum(-1) - 1, width)  # others go behind the last, which is cut off
        moved = indices.new_full((*indices.shape[:-1], width + 1), -1)
        return moved.scatter_(-1, places, indices).narrow_copy(-1, 0, width)

    def begin_batch(self, own: Callable[[], BatchSamples]) -> Callable[[], BatchSamples]:
        exchange, failed = self.exchange, None
        try:
            mine = own()
        except Exception as error:
            failed = error
        if failed is not None:
            of_all = self.all.numbers(BATCH, 0, 0, 0, 0, 1)
        else:
            flags = mine.present is not None, mine.zero_rows is not None, 0
            of_all = self.all.numbers(BATCH, len(mine.x), number_of("\0".join(mine.streams)), *flags)
        if any(has_failed for *_, has_failed in of_all):
            return partial(self.all.fail, failed)
        for rank, (_, others, *_rest) in enumerate(of_all):
            if others != of_all[0][1]:
                raise ValueError(f"inputs must be of the streams that rank 0 has on every rank, got others on {rank}")
        counts = [n for n, *_ in of_all[self.rank - exchange.rank :][: exchange.ranks]]
        x = exchange.begin_gather(mine.x.detach(), counts, "x")
        return lambda: self._of_all(mine, x(), of_all, counts)

    def _of_all(
        self, mine: BatchSamples, x: Tensor, of_all: Sequence[Sequence[int]], counts: Sequence[int]
    ) -> BatchSamples:
        """The samples x of this replica, by what was told of those of each rank."""
        exchange, present, zero_rows, sets = self.exchange, mine.present, mine.zero_rows, None
        if any(has for _, _, has, *_ in of_all):
            if present is None:
                present = torch.ones(len(mine.x), len(mine.streams), dtype=torch.bool, device=x.device)
            present = exchange.gather(present, counts, "present")
            sets = self._sets(present)
        if any(has for _, _, _, has, _ in of_all):
            none = torch.zeros(len(mine.streams), dtype=torch.int64, device=x.device)
            zero_rows = self.all.sum(none if zero_rows is None else zero_rows)
        first = sum(counts[: exchange.rank])
        given, n = slice(first, first + len(mine.x)), sum(n for n, *_ in of_all)
        return mine._replace(x=x, present=present, sets=sets, zero_rows=zero_rows, given=given, of_batch=n)

    def _sets(self, present: Tensor) -> Tensor | None:
        """Of the streams that a sample has, of all replicas, which must go through their parts of a batch together."""
        if self.replicas is None:
            return None
        own = torch.unique(present, dim=0) if len(present) else present
        counts = [n for (n,) in self.replicas.numbers(ROWS, len(own))]
        found: Tensor = torch.unique(self.replicas.gather(own, counts, "present"), dim=0)
        return found

    def of_all_replicas(self, n: int) -> int:
        """How many samples all replicas have, of which this one has n."""
        return n if self.replicas is None else sum(other for (other,) in self.replicas.numbers(NUMBER, n))

    def in_replicas_before(self, n: int, call: int) -> int:
        if self.replicas is None:
            return 0
        return sum(other for (other,) in self.replicas.numbers(call, n)[: self.replicas.rank])

    def first_samples(self, rows: Tensor, n: int) -> Tensor:
        before = self.in_replicas_before(len(rows), ROWS)
        return rows[: max(0, n - before)]

    def agreed(self, call: str) -> AbstractContextManager[None]:
        return self.all.agreed(call)

    def sum(self, part: Tensor) -> Tensor:
        return self.exchange.sum(part.to(self.exchange.device)).to(part.device)

    def of_latents(self, numbers: Tensor) -> Tensor:
        exchange = self.exchange
        counts = [n for (n,) in exchange.numbers(ROWS, len(numbers))]
        return exchange.gather(numbers.to(exchange.device), counts, "results").to(numbers.device)

    def of_one(self, part: Tensor) -> Tensor:
        return self.exchange.one_of(part.to(self.exchange.device).contiguous(), "results").to(part.device)

    def total(self, n: int) -> int:
        return sum(number for (number,) in self.exchange.numbers(NUMBER, n))

    def of_ranks(self, numbers: Tensor) -> Tensor:
        exchange = self.exchange
        return exchange.gather(numbers[None].to(exchange.device), [1] * exchange.ranks, "sums").to(numbers.device)

    def samples(self, n: int) -> int:
        return sum(number for (number,) in self.all.numbers(NUMBER, n))

    def of_replicas(self, *tensors: Tensor) -> Sequence[Tensor]:
        if self.replicas is None:
            return tensors
        told = self.replicas.numbers(ROWS, len(tensors[0]), *(tensor.shape[-1] for tensor in tensors))
        counts = [n for n, *_ in told]
        widths = [max(each) for each in zip(*(of_rank for _, *of_rank in told), strict=True)]
        nothing = [0 if tensor.is_floating_point() else -1 for tensor in tensors]
        filled = [
            pad(tensor, (0, width - tensor.shape[-1]), value=empty)
            for tensor, width, empty in zip(tensors, widths, nothing, strict=True)
        ]
        return [self.replicas.gather(tensor, counts, "replicas") for tensor in filled]

    def sum_of_replicas(self, *tensors: Tensor) -> Sequence[Tensor]:
        return tensors if self.replicas is None else [self.replicas.sum(tensor) for tensor in tensors]

    def moments(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        if self.replicas is None:
            return moments
        merged = {name: Moments() for name in moments}
        here = {name: (one.n, one.mean.cpu().numpy(), one.spread.cpu().numpy()) for name, one in moments.items()}
        for of_replica in self.replicas.objects(here):
            for name, (n, mean, spread) in of_replica.items():
                if n:
                    merged[name].add_moments(n, torch.from_numpy(mean), torch.from_numpy(spread))
        return merged

    def told_by_replicas(self, mine: T) -> list[T]:
        return [mine] if self.replicas is None else self.replicas.objects(mine)

    def most(self, n: int) -> int:
        return max(number for (number,) in self.all.numbers(NUMBER, n))

    def codes(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        numbers = torch.where(indices < 0, 0, indices + (self.first + 1))  # a slot is of one rank, 0 in all others
        values = self.exchange.one_of(values.contiguous(), "codes")
        return values, self.exchange.one_of(numbers, "codes") - 1

    def decode(self, decode: Callable[..., Tensor], values: Tensor, indices: Tensor) -> Tensor:
        exchange = self.exchange
        counts = [n for (n,) in exchange.numbers(ROWS, len(values))]
        dtype = values.dtype
        values = exchange.gather(values.detach(), counts, "codes")
        indices = exchange.gather(indices, counts, "codes")
        own = (indices >= self.first) & (indices < self.last)
        indices = torch.where(own, indices - self.first, -1)
        values = torch.where(own[:, None], wide(values), 0)
        with torch.no_grad():
            bias: Tensor = decode.keywords["pre_bias"]  # type: ignore[attr-defined]
            own_rows = decode(values, indices, pre_bias=torch.zeros_like(bias))
            rows, numbers = exchange.deal(own_rows, counts, "reconstructions")
            total = rows[numbers[0]]
            for of_rank in numbers[1:]:
                total = total + rows[of_rank]
            return (total + wide(bias)).to(dtype)

    def own(self, rows: Tensor | None) -> Tensor | None:
        return None if rows is None else torch.split(rows, shares(len(rows), self.ranks))[self.rank]

    def each(self, numbers: Tensor) -> Tensor:
        return self.all.gather(numbers[None].to(self.all.device), [1] * self.ranks, "numbers")

    def together(self, model: T) -> T:
        return cast("T", Together(cast("SPARC", model), self, self.all))

    def check_samples(self, inputs: Mapping[str, Tensor] | AlignedFiles) -> None:
        told = self.all.objects(fingerprint(inputs))
        for rank, other in enumerate(told):
            if other != told[0]:
                raise ValueError(f"inputs must be the same on every rank, but rank {rank} has others than rank 0")

    def told_by_leader(self, numbers: list[int]) -> list[int]:
        told: list[int] = json.loads(self.all.objects(json.dumps(numbers))[0])
        return told

    def save(self, path: str | Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        with self.agreed("save"):
            if self.replicas is None or self.replicas.rank == 0:
                save_model(path, tensors, config, self.exchange)

    def seed(self, seed: int) -> int:
        return seed + (self.exchange.rank << 48)


class _OfRows:
    """Operators on the rows of a rank, by those of a backend on rows that are all there are."""

    def __init__(self, backend: Backend, exchange: Exchange) -> None:
        self.backend, self.exchange = backend, exchange

    def global_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        pre_bias: Tensor,
        latent_bias: Tensor,
        k: int,
        screening: str = "auto",
        among: None = None,
    ) -> Tensor:
        """The support among the rows of all ranks, below each other: -1 where a row is not here.

        Every rank gives the scores of its k best rows, if it has so many, which are the same bits whoever computes
        them; the k best of those, ties to the lower row, are the k best of all. They are beside each other in the order
        of rows, since a rank's rows come before those of the next one.
        """
        backend, exchange = self.backend, self.exchange
        rows, scores = self._best_rows(x, W_enc, pre_bias, latent_bias, k, screening)
        counts, of_ranks = exchange.packed(len(W_enc), scores, "candidates")
        given = [min(k, n) for n in counts]
        beside = torch.cat([part[:, :n] for part, n in zip(of_ranks, given, strict=True)], dim=1)
        best = backend.topk_rows(beside, min(k, sum(given))).long() - sum(given[: exchange.rank])
        is_here = (best >= 0) & (best < given[exchange.rank])
        return torch.where(is_here, rows.gather(1, best.clamp(0, k - 1)), -1)

    def _best_rows(
        self, x: Tensor, W_enc: Tensor, pre_bias: Tensor, latent_bias: Tensor, k: int, screening: str
    ) -> tuple[Tensor, Tensor]:
        """Rows here among which those of the support are, ascending, and their scores; there is room for k."""
        backend, exchange, N, own = self.backend, self.exchange, len(x), min(k, len(W_enc))
        if best_rows := getattr(backend, "best_rows", None):

            def among(ends: Tensor) -> Tensor:
                of_all = exchange.gather(ends[None], [1] * exchange.ranks, "candidates")
                return of_all.movedim(0, 1).reshape(len(ends), -1).contiguous()

            found: tuple[Tensor, Tensor] = best_rows(x, W_enc, pre_bias, latent_bias, k, among, screening)
            return found
        rows = torch.zeros(N, k, dtype=torch.int32, device=x.device)
        scores = torch.zeros(N, k, dtype=wide_type(x.dtype), device=x.device)
        if own and N:
            best = backend.global_topk(x, W_enc, pre_bias, latent_bias, own, screening)
            rows[:, :own], scores[:, :own] = best, backend.support_scores(x, W_enc, pre_bias, latent_bias, best)
        return rows, scores

    def decode_loss(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        pre_bias: Tensor,
        target: Tensor,
        scale: Tensor,
        weights: Sequence[float],
        d_streams: Sequence[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Every rank reconstructs all samples from its own rows, adds up its share of the samples, and compares them.

        The P parts of a reconstruction are rows of a dictionary, each used once with a value of 1: what adds them up,
        in the order of ranks, and compares them is the backend's own decode_loss. Where streams are reconstructed from
        themselves alone, as for AuxK, nothing else is exchanged. Samples go through it in pieces, not streams, which
        read the same rows of the decoder: what is exchanged of one piece comes while others are worked on.
        """
        backend, exchange, P = self.backend, self.exchange, self.exchange.ranks
        (N, S, _), D = values.shape, W_dec.shape[1]
        alone = S > 1 and not any(weight for i, weight in enumerate(weights) if i % (S + 1))
        no_bias = torch.zeros(D, dtype=pre_bias.dtype, device=pre_bias.device)
        pieces, dtype = _pieces(N, P), gradient_dtype(values)
        like = torch.empty(0, *((D,) if alone else (S, D)), dtype=dtype, device=values.device)
        room = exchange.room(like, N) if len(pieces) > 1 else None
        sums: list[Tensor] = []
        totals: list[Callable[[], Tensor]] = []
        of_pieces: list[tuple[Tensor, Tensor]] = []

        def stages(piece: slice) -> Iterator[None]:
            counts = shares(piece.stop - piece.start, P)
            first, n = piece.start + sum(counts[: exchange.rank]), counts[exchange.rank]
            own = slice(first, first + n)
            recons = backend.sparse_decode(wide(values[piece]), indices[piece], W_dec, no_bias)
            recons = _from_itself(recons, d_streams) if alone else recons
            dealt = exchange.begin_deal(recons, counts, "reconstructions")
            del recons
            yield
            parts, numbers = dealt()
            if n:
                rows = numbers.T[:, None].int().expand(n, S, P)
                if not alone:
                    rows = rows * S + torch.arange(S, dtype=torch.int32, device=values.device)[:, None]
                ones = torch.ones(n, S, P, dtype=parts.dtype, device=values.device)
                operands = ones, rows.contiguous(), parts.view(-1, D), wide(pre_bias), wide(target[own]), scale[own]
                nmse, grad_recons, _, grad_pre_bias = backend.decode_loss(*operands, weights, d_streams)
                del operands
            else:
                nmse, grad_recons, grad_pre_bias = parts.new_zeros(S, S), parts.new_zeros(0, S, D), parts.new_zeros(D)
            del parts, dealt  # their memory is what the next of them take
            sums.append(torch.cat([nmse.reshape(-1), grad_pre_bias]))
            grad_recons = grad_recons.to(dtype)
            grad_recons = _from_itself(grad_recons, d_streams) if alone else grad_recons
            into = None if room is None else room.part(piece.start, piece.stop - piece.start)
            gathered = exchange.begin_gather(grad_recons, counts, "G", into)
            if len(sums) == len(pieces):
                totals.append(exchange.begin_sum(sum(sums[1:], sums[0])))
            del grad_recons
            yield
            grad_recons = gathered()
            grad_recons = _of_streams(grad_recons, d_streams) if alone else grad_recons
            grad_values = backend.sparse_decode_grad_values(grad_recons, indices[piece], W_dec)
            of_pieces.append((grad_recons if room is None else grad_recons[:0], grad_values))

        in_turn(stages(piece) for piece in pieces)
        (grad_recons, grad_values), total = of_pieces[0], totals[0]()
        if room is not None:
            grad_recons = _of_streams(room.rows, d_streams) if alone else room.rows
            grad_values = torch.cat([of_piece for _, of_piece in of_pieces])
        return total[: S * S].view(S, S), grad_recons, grad_values, total[S * S :]


def _pieces(n: int, ranks: int) -> list[slice]:
    """Of n samples, each but the last of as many for every rank."""
    size = piece_size(n) if ranks > 1 else max(n, 1)
    step = -(-size // ranks) * ranks
    return [slice(start, min(start + step, n)) for start in range(0, max(n, 1), step)]


def _from_itself(recons: Tensor, d_streams: Sequence[int]) -> Tensor:
    """[N, D] of [N, S, D]: of each stream, what is reconstructed from itself."""
    return torch.cat([recons[:, s, cols] for s, cols in enumerate(stream_slices(d_streams))], dim=1)


def _of_streams(itself: Tensor, d_streams: Sequence[int]) -> Tensor:
    """[N, S, D] of [N, D], 0 for other streams."""
    of_all = itself.new_zeros(len(itself), len(d_streams), itself.shape[1])
    for s, cols in enumerate(stream_slices(d_streams)):
        of_all[:, s, cols] = itself[:, cols]
    return of_all

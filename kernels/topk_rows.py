"""indices[n] = the k columns of largest scores[n, l], ascending; ties to the lower column, NaN ranks with +inf.

One pass over the row. Numbers are compared as keys, integers in the same order. A program holds the candidates seen so
far and a threshold t that k of them reach: a later column is a candidate only above t, as at t it would lose the tie to
those k. When the room for candidates is used up, t rises to a key that still k candidates reach, found by bisection,
and what cannot be among the k largest is dropped; that always fits. Few rows are cut in parts, merged at the end.

The same selection serves global_topk, where a score is known to lie in an interval: what has to reach t are lower ends,
what has to pass it are upper ends. There the candidates may not fit, and the row is given up: its count becomes -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparc_fast.kernels.launching import launch, next_power_of_2

ROOM, SPARE = 2, 256  # a program holds up to ROOM k + SPARE candidates
REGISTERS = 128  # of a thread: left alone, the compiler spills some to make room for one more program
TOP = {torch.float32: 2**31 - 1, torch.float64: 2**63 - 1}  # above every key; -TOP is below


def choice(columns: int) -> dict[str, int]:
    # estimated, not measured: 4 scores and 4 candidates a thread; 4 programs fit a multiprocessor, as `programs` starts
    block = min(512, max(16, next_power_of_2(columns)))
    return {"COLUMNS": block, "BLOCK": block, "num_warps": 4 if block > 256 else 2, "maxnreg": REGISTERS}


def merge_choice(block: int) -> dict[str, int]:
    # estimated, not measured: 4 candidates a thread
    return {"BLOCK": block, "num_warps": 4, "maxnreg": REGISTERS}


def programs(device: torch.device) -> int:
    """How many programs of a streaming kernel are started: enough to fill the device."""
    # estimated, not measured: 4 a multiprocessor hide the latency of each other
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@triton.jit
def sortable(value):
    """float32 or float64 as integers in the same order; NaN is +inf, the zeros are equal."""
    if value.dtype == tl.float64:
        bits = value.to(tl.int64, bitcast=True)
        infinity = tl.full(bits.shape, 0x7FF0000000000000, tl.int64)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
    else:
        bits = value.to(tl.int32, bitcast=True)
        infinity = tl.full(bits.shape, 0x7F800000, tl.int32)
        magnitude = bits & 0x7FFFFFFF
    positive = (bits >= 0) | (magnitude > infinity)
    return tl.where(positive, tl.minimum(magnitude, infinity), -magnitude)


@triton.jit
def number_of(key):
    """The float32 of a key of `sortable`; NaN of those beyond the keys of numbers."""
    return tl.where(key < 0, -key | -(2**31), key).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(keys, count, k, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest of keys[:count], the least if there are fewer."""
    lanes = tl.arange(0, BLOCK)
    first = tl.load(keys + lanes, mask=lanes < count, other=-TOP)
    low = tl.min(tl.where(lanes < count, first, TOP), axis=0)
    high = tl.max(first, axis=0)
    for start in range(BLOCK, count, BLOCK):
        more = tl.load(keys + start + lanes, mask=start + lanes < count, other=-TOP)
        low = tl.minimum(low, tl.min(tl.where(start + lanes < count, more, TOP), axis=0))
        high = tl.maximum(high, tl.max(more, axis=0))
    high += 1
    while low < high - 1:  # low + 1 would overflow where there are no keys
        guess = (low >> 1) + (high >> 1) + (low & high & 1)
        reaching = tl.sum((first >= guess).to(tl.int32), axis=0)
        for start in range(BLOCK, count, BLOCK):
            more = tl.load(keys + start + lanes, mask=start + lanes < count, other=-TOP)
            reaching += tl.sum((more >= guess).to(tl.int32), axis=0)
        if reaching >= k:
            low = guess
        if reaching <= k:
            high = guess
    # at least min(k, count) keys reach `low`, and where that is more than k, it is their k-th itself
    least = tl.min(tl.where((first >= low) & (lanes < count), first, TOP), axis=0)
    for start in range(BLOCK, count, BLOCK):
        more = tl.load(keys + start + lanes, mask=start + lanes < count, other=-TOP)
        least = tl.minimum(least, tl.min(tl.where((more >= low) & (start + lanes < count), more, TOP), axis=0))
    return least


@triton.jit
def raised(
    threshold, lower, upper, valid, lows, highs, count, k, capacity, POINTS: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A higher threshold that at least k lower ends of candidates and newcomers reach, and few upper ends."""
    lanes = tl.arange(0, BLOCK)
    goal = k + (capacity - k) // 8  # so that it is long until the next time
    low, high = threshold, tl.full((), TOP, lower.dtype)
    while low < high - 1:
        guess = (low >> 1) + (high >> 1) + (low & high & 1)
        reaching = tl.sum((valid & (lower >= guess)).to(tl.int32), axis=0)
        passing = tl.sum((valid & (upper >= guess)).to(tl.int32), axis=0)
        for start in range(0, count, BLOCK):
            inside = start + lanes < count
            ends = tl.load(lows + start + lanes, mask=inside, other=-TOP)
            reaching += tl.sum((ends >= guess).to(tl.int32), axis=0)
            if not POINTS:
                ends = tl.load(highs + start + lanes, mask=inside, other=-TOP)
            passing += tl.sum((ends >= guess).to(tl.int32), axis=0)
        if reaching >= k:
            low = guess
        if (reaching < k) | (passing <= goal):
            high = guess
    return low


@triton.jit
def take(
    lower, upper, latent, valid, count, threshold, lows, highs, latents, k, capacity, POINTS: tl.constexpr,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Appends what may be among the k largest; newcomers follow all candidates in latent order. (count, threshold)"""
    passes = valid & (upper > tl.where(count >= 0, threshold, TOP))
    if count + tl.sum(passes.to(tl.int32), axis=0) > capacity:
        tl.debug_barrier()  # the candidates are read by other threads than wrote them
        threshold = raised(threshold, lower, upper, valid, lows, highs, count, k, capacity, POINTS, TOP, BLOCK)
        kept, rank = 0, 0
        for start in range(0, count, BLOCK):
            place = start + tl.arange(0, BLOCK)
            inside = place < count
            low = tl.load(lows + place, mask=inside, other=-TOP)
            high = low if POINTS else tl.load(highs + place, mask=inside, other=-TOP)
            name = tl.load(latents + place, mask=inside, other=0)
            reaches = (low >= threshold).to(tl.int32)
            # at the threshold itself, the first k that reach it win the tie
            earlier = rank + tl.cumsum(reaches, axis=0) - reaches
            keep = inside & ((high > threshold) | ((high == threshold) & (earlier < k)))
            slot = kept + tl.cumsum(keep.to(tl.int32), axis=0) - 1
            tl.debug_barrier()  # all of the block is read before it is written over
            tl.store(lows + slot, low, mask=keep)
            if not POINTS:
                tl.store(highs + slot, high, mask=keep)
            tl.store(latents + slot, name, mask=keep)
            kept += tl.sum(keep.to(tl.int32), axis=0)
            rank += tl.sum(reaches, axis=0)
            tl.debug_barrier()
        reaches = (valid & (lower >= threshold)).to(tl.int32)
        earlier = rank + tl.cumsum(reaches, axis=0) - reaches
        passes = valid & ((upper > threshold) | ((upper == threshold) & (earlier < k)))
        fits = kept + tl.sum(passes.to(tl.int32), axis=0) <= capacity
        count = tl.where(fits, kept, -1)
        passes = passes & (upper >= tl.where(fits, threshold, TOP))
    slot = count + tl.cumsum(passes.to(tl.int32), axis=0) - 1
    tl.store(lows + slot, lower, mask=passes)
    if not POINTS:
        tl.store(highs + slot, upper, mask=passes)
    tl.store(latents + slot, latent, mask=passes)
    return count + tl.sum(passes.to(tl.int32), axis=0), threshold


@triton.jit
def choose(keys, latents, count, k, chosen, chosen_keys, KEYS: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the latents of the k largest of keys[:count] in the order they are in, and how many these are."""
    tl.debug_barrier()
    kth = kth_largest(keys, count, k, TOP, BLOCK)
    above = 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        above += tl.sum((tl.load(keys + place, mask=place < count, other=-TOP) > kth).to(tl.int32), axis=0)
    written, equals = 0, 0
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < count
        key = tl.load(keys + place, mask=inside, other=-TOP)
        name = tl.load(latents + place, mask=inside, other=0)
        equal = (inside & (key == kth)).to(tl.int32)
        first = equals + tl.cumsum(equal, axis=0) <= k - above
        keep = (key > kth) | ((equal > 0) & first)
        slot = written + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(chosen + slot, name, mask=keep)
        if KEYS:
            tl.store(chosen_keys + slot, key, mask=keep)
        written += tl.sum(keep.to(tl.int32), axis=0)
        equals += tl.sum(equal, axis=0)
    return written


@triton.jit(do_not_specialize=["N", "k", "capacity", "parts"])
def _parts(
    scores, stride, N, L, k, capacity, parts, keys, latents, chosen, chosen_keys, counts,
    TOP: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    keys += program.to(tl.int64) * capacity
    latents += program.to(tl.int64) * capacity
    span = tl.cdiv(L, parts * 16) * 16  # so that scores are loaded 16 bytes at once where 16 divides L
    for task in range(program, N * parts, tl.num_programs(0)):
        row, begin = task // parts, task % parts * span
        end = tl.minimum(begin + span, L)
        count, threshold = tl.full((), 0, tl.int32), tl.full((), -TOP, keys.dtype.element_ty)
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            score = tl.load(scores + row.to(tl.int64) * stride + column, mask=column < end, other=0)
            if score.dtype == tl.bfloat16:  # by bits: Triton's interpreter misreads what is denormal
                score = (score.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
            elif score.dtype == tl.float16:
                score = score.to(tl.float32)
            key = sortable(score)
            count, threshold = take(
                key, key, column, column < end, count, threshold, keys, keys, latents, k, capacity, True, TOP, BLOCK
            )
        place = tl.cast(task, tl.int64) * k
        written = choose(keys, latents, count, k, chosen + place, chosen_keys + place, KEYS, TOP, BLOCK)
        if KEYS:
            tl.store(counts + task, written)
        tl.debug_barrier()


@triton.jit
def merge_parts(
    group, parts, row, part_keys, part_latents, part_counts, k, capacity, keys, latents, indices,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """indices[row] from parts group * parts ... group * parts + parts - 1, of which each has counted its own."""
    count, threshold = tl.full((), 0, tl.int32), tl.full((), -TOP, keys.dtype.element_ty)
    for start in range(0, parts * k, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        part = group * parts + entry // k
        inside = entry < parts * k
        inside = inside & (entry % k < tl.load(part_counts + part, mask=inside, other=0))
        place = tl.cast(group, tl.int64) * parts * k + entry
        key = tl.load(part_keys + place, mask=inside, other=-TOP)
        name = tl.load(part_latents + place, mask=inside, other=0)
        count, threshold = take(
            key, key, name, inside, count, threshold, keys, keys, latents, k, capacity, True, TOP, BLOCK
        )
    choose(keys, latents, count, k, indices + row * k, keys, False, TOP, BLOCK)


@triton.jit(do_not_specialize=["k", "capacity", "parts"])
def _merge_parts(
    part_keys, part_latents, part_counts, k, capacity, parts, keys, latents, indices,
    TOP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    merge_parts(
        tl.program_id(0), parts, row, part_keys, part_latents, part_counts, k, capacity, keys + row * capacity,
        latents + row * capacity, indices, TOP, BLOCK,
    )  # fmt: skip


def candidate_room(k: int, columns: int) -> int:
    return min(ROOM * k + SPARE, max(columns, k))


def topk_rows(scores: Tensor, k: int) -> Tensor:
    """Columns of the k largest of each row, int32 [N, k], ascending; ties to the lower column, NaN ranks with +inf.

    Scratch: 8 to 12 bytes for each of 2 k + 256 candidates and k results of each program, not of each row.
    """
    N, L = scores.shape
    scores = scores if scores.stride(1) == 1 or L == 1 else scores.contiguous()
    indices = torch.empty(N, k, dtype=torch.int32, device=scores.device)
    if N == 0:
        return indices
    most = programs(scores.device)
    launched = choice(L)
    parts = max(1, min(most // N, L // (4 * launched["COLUMNS"]), L // (4 * k)))
    started, capacity = min(most, N * parts), candidate_room(k, L)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    top, key_dtype = TOP[wide], torch.int64 if wide == torch.float64 else torch.int32
    keys = torch.empty(started, capacity, dtype=key_dtype, device=scores.device)
    latents = torch.empty(started, capacity, dtype=torch.int32, device=scores.device)
    part_latents, part_keys, part_counts = indices, keys, latents  # of a row's only part, whose keys nobody reads
    if parts > 1:
        part_latents, part_keys = (one.new_empty(N * parts, k) for one in (indices, keys))
        part_counts = indices.new_empty(N * parts)
    launch(
        _parts, (started,), scores, scores.stride(0), N, L, k, capacity, parts, keys, latents, part_latents, part_keys,
        part_counts, TOP=top, KEYS=parts > 1, **launched,
    )  # fmt: skip
    if parts > 1:
        launch(
            _merge_parts, (N,), part_keys, part_latents, part_counts, k, capacity, parts, keys, latents, indices,
            TOP=top, **merge_choice(launched["BLOCK"]),
        )  # fmt: skip
    return indices

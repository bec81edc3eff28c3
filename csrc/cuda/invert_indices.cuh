// A counting sort: where each latent occurs, from which latent occurs where.
//
// Every position draws a number from its latent's counter, which counts the latent at the same time; sums of the counts
// are the offsets; a position is put at its latent's offset plus its number. Numbers were drawn in whatever order the
// threads came, so that at last every segment is sorted: up to 32 entries by a warp, up to `segment_room` by a block in
// shared memory. A segment longer than that, of a latent which nearly every sample uses, is written once more by a
// block that reads all indices in order: there are few such latents, since their entries add up to n.
//
// Few positions are read by every block, each for 256 latents, and all of that is one kernel.
#pragma once
#include "block.cuh"
#include "operators.h"

constexpr int segment_room = 2048;
constexpr int counts_each = 8;  // of a thread that sums them
constexpr int rounds = 16;      // positions of a thread between two barriers, when all indices are read

// Latents outside 0 ... L - 1 are counted as L.
__device__ inline int bucket(int32_t latent, int L) { return uint32_t(latent) < uint32_t(L) ? latent : L; }

__global__ void __launch_bounds__(256) clear_counts_kernel(int* counts, int buckets) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < buckets) counts[i] = 0;
}

__global__ void __launch_bounds__(256) draw_numbers_kernel(
    int* counts, int* numbers, const int32_t* __restrict__ indices, int n, int L) {
    const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (p < n) numbers[p] = atomicAdd(&counts[bucket(indices[p], L)], 1);
}

// A thread's counts, counts_each of them side by side, and their sum.
struct Counts {
    int64_t first, sum = 0;
    int counts[counts_each];

    __device__ Counts(const int* all, int buckets)
        : first((int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * counts_each) {
#pragma unroll
        for (int i = 0; i < counts_each; ++i) {
            counts[i] = first + i < buckets ? all[first + i] : 0;
            sum += counts[i];
        }
    }
};

__global__ void __launch_bounds__(256, 4) sum_counts_kernel(int64_t* sums, const int* counts, int buckets) {
    SharedMemory memory(shared_memory());
    int64_t all;
    sum_before(Counts(counts, buckets).sum, memory.take<int64_t>(32), all);
    if (threadIdx.x == 0) sums[blockIdx.x] = all;
}

// offsets[l] for all l up to L, from the counts and the sums of each block's counts.
__global__ void __launch_bounds__(256, 4) offsets_kernel(
    int64_t* offsets, const int64_t* sums, const int* counts, int buckets) {
    SharedMemory memory(shared_memory());
    int64_t* const of_warps = memory.take<int64_t>(32);
    const Counts mine(counts, buckets);
    int64_t earlier = 0, before, all;
    for (int64_t b = threadIdx.x; b < blockIdx.x; b += blockDim.x) earlier += sums[b];
    sum_before(earlier, of_warps, before);
    __syncthreads();
    int64_t offset = before + sum_before(mine.sum, of_warps, all);
#pragma unroll
    for (int i = 0; i < counts_each; ++i) {
        if (mine.first + i < buckets) offsets[mine.first + i] = offset;
        offset += mine.counts[i];
    }
}

__global__ void __launch_bounds__(256) place_entries_kernel(
    int64_t* entries, const int64_t* offsets, const int* numbers, const int32_t* __restrict__ indices, int n, int L) {
    const int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (p < n) entries[offsets[bucket(indices[p], L)] + numbers[p]] = p;
}

// Sorts a segment of up to 32 entries; called by a whole warp.
__device__ inline void sort_in_warp(int64_t* segment, int length) {
    const int lane = threadIdx.x % 32;
    const int mine = lane < length ? int(segment[lane]) : 0;
    int rank = 0;
    for (int i = 0; i < length; ++i) rank += __shfl_sync(all_lanes, mine, i) < mine;
    __syncwarp();
    if (lane < length) segment[rank] = mine;
}

__device__ inline void sort_segment(int64_t* segment, int length, int* room) {
    int size = 1;
    while (size < length) size *= 2;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x) room[i] = i < length ? int(segment[i]) : INT32_MAX;
    sort_in_block(room, size);
    for (int i = threadIdx.x; i < length; i += blockDim.x) segment[i] = room[i];
}

// Writes the positions of latent l, in order.
__device__ inline void write_segment(
    int64_t* segment, int l, const int32_t* __restrict__ indices, int n, int L, int* of_warps) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int64_t begin = 0; begin < n; begin += int64_t(blockDim.x) * rounds) {
        const int64_t first = begin + warp * 32 * rounds + lane;
        unsigned found[rounds];
        int many = 0;
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            const int64_t p = first + r * 32;
            found[r] = __ballot_sync(all_lanes, p < n && bucket(indices[p], L) == l);
            many += __popc(found[r]);
        }
        __syncthreads();
        if (lane == 0) of_warps[warp] = many;
        __syncthreads();
        int before = 0, all = 0;
        for (int w = 0; w < warps; ++w) {
            if (w == warp) before = all;
            all += of_warps[w];
        }
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
            if (found[r] >> lane & 1) segment[before + __popc(found[r] & ((1u << lane) - 1))] = first + r * 32;
            before += __popc(found[r]);
        }
        segment += all;
    }
}

struct Segment {
    int64_t begin;
    int length;
};

// The shared memory of a block that sorts segments.
struct SegmentsShared {
    int* room;      // [segment_room]
    int* longer;    // [256]: latents that are too much for a warp
    int* many;      // of these
    int* of_warps;  // [32]

    __host__ __device__ explicit SegmentsShared(SharedMemory& memory) {
        room = memory.take<int>(segment_room);
        longer = memory.take<int>(256);
        many = memory.take<int>(1);
        of_warps = memory.take<int>(32);
    }
};

// Sorts the segments that the block's threads have, of latents l: segment_of(l) is where one begins and how long it is.
template <class SegmentOf>
__device__ void sort_segments(
    int64_t* entries, int l, SegmentOf segment_of, const int32_t* __restrict__ indices, int n, int L,
    const SegmentsShared& shared) {
    if (threadIdx.x == 0) *shared.many = 0;
    __syncthreads();
    const auto [begin, length] = l <= L ? segment_of(l) : Segment{0, 0};
    if (length > 32) shared.longer[atomicAdd(shared.many, 1)] = l;
    for (unsigned left = __ballot_sync(all_lanes, length > 1 && length <= 32); left; left &= left - 1) {
        const int owner = __ffs(left) - 1;
        sort_in_warp(entries + __shfl_sync(all_lanes, begin, owner), __shfl_sync(all_lanes, length, owner));
    }
    __syncthreads();
    for (int i = 0; i < *shared.many; ++i) {
        const int latent = shared.longer[i];
        const Segment segment = segment_of(latent);
        if (segment.length <= segment_room)
            sort_segment(entries + segment.begin, segment.length, shared.room);
        else
            write_segment(entries + segment.begin, latent, indices, n, L, shared.of_warps);
    }
}

// A warp has 32 latents side by side, and the warps of a block have latents far apart, as those in frequent use may
// stand together.
__global__ void __launch_bounds__(256) sort_segments_kernel(
    int64_t* entries, const int64_t* offsets, const int32_t* __restrict__ indices, int n, int L) {
    SharedMemory memory(shared_memory());
    const SegmentsShared shared(memory);
    const int64_t l = (int64_t(threadIdx.x / 32) * gridDim.x + blockIdx.x) * 32 + threadIdx.x % 32;
    const auto segment_of = [=](int l) {
        const int64_t begin = offsets[l];
        return Segment{begin, int((l == L ? int64_t(n) : offsets[l + 1]) - begin)};
    };
    sort_segments(entries, int(smaller<int64_t>(l, L + 1)), segment_of, indices, n, L, shared);
}

// The shared memory of a block that does all.
struct InvertShared : SegmentsShared {
    int *counts, *ends;  // [256], of the latents
    int64_t* sums;       // [32]
    size_t bytes;

    __host__ __device__ explicit InvertShared(SharedMemory memory) : SegmentsShared(memory) {
        counts = memory.take<int>(256);
        ends = memory.take<int>(256);
        sums = memory.take<int64_t>(32);
        bytes = memory.bytes();
    }
};

// A thread has a latent, of which it writes the offset: how many positions are of latents before the block's is counted
// along with the block's own.
__global__ void __launch_bounds__(256) invert_few_kernel(
    int64_t* offsets, int64_t* entries, const int32_t* __restrict__ indices, int n, int L) {
    const InvertShared shared{SharedMemory(shared_memory())};
    const int me = threadIdx.x, first = blockIdx.x * 256, l = first + me;
    shared.counts[me] = 0;
    __syncthreads();
    int64_t below = 0, earlier, all;
    for (int p = me; p < n; p += 256) {
        const int among = bucket(indices[p], L) - first;
        if (among < 0) ++below;
        if (uint32_t(among) < 256) atomicAdd(&shared.counts[among], 1);
    }
    sum_before(below, shared.sums, earlier);
    __syncthreads();
    const int64_t begin = earlier + sum_before<int64_t>(shared.counts[me], shared.sums, all);
    if (l <= L) offsets[l] = begin;
    shared.ends[me] = int(begin);
    __syncthreads();
    for (int p = me; p < n; p += 256) {
        const int among = bucket(indices[p], L) - first;
        if (uint32_t(among) < 256) entries[atomicAdd(&shared.ends[among], 1)] = p;
    }
    __syncthreads();
    const auto segment_of = [=](int l) {
        const int count = shared.counts[l - first];
        return Segment{shared.ends[l - first] - count, count};
    };
    sort_segments(entries, l, segment_of, indices, n, L, shared);
}

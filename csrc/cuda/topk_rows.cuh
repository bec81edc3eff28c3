// The k largest of each row: a threshold from a sample, one pass over the row, and an exact choice among the few scores
// that reach it.
//
// A block does a row, or a part of one. It takes a sample, spread over the row, and makes its rank-th largest the
// threshold: then a few times k scores are expected to reach it. They are gathered in shared memory. If at least k came
// and all found room, the k largest are among them and are chosen exactly. If fewer came, the threshold was too high,
// and the row is read again without one. If the room was too small (many equals), the k-th largest of those that found
// room is a threshold that k scores do reach; with it the row is read again. To read again is to read in steps:
// whenever the room may not do for the next step, all but the k largest are dropped, and the threshold rises above the
// least of these; who comes later stands further right, and loses ties. So no row is too hard, and none is cut short.
//
// A candidate is a number, key << 32 | ~column: larger scores are larger, and of equal scores the lower column is. No
// two are equal, so the order in which they were gathered does not show in the result.
#pragma once
#include "formats.cuh"
#include "operators.h"
#include "row_part.cuh"
#include "selection.cuh"

// The shared memory of a block.
struct TopkShared : SelectionShared {
    Candidate* candidates;  // [capacity], or a power of two not below k; and in the same place
    uint32_t* sample;       // [2 capacity]
    size_t bytes;

    __host__ __device__ TopkShared(SharedMemory memory, int capacity, int k) : SelectionShared(memory) {
        candidates = memory.take<Candidate>(larger(capacity, power_of_two(k)));
        sample = reinterpret_cast<uint32_t*>(candidates);
        bytes = memory.bytes();
    }
    __device__ auto candidate_at() const {
        return [all = candidates](int i) { return all[i]; };
    }
};

// Drops all but the k largest of n > k candidates. Ends with a barrier.
__device__ inline void keep_largest(int n, int k, const TopkShared& shared) {
    const Candidate least = kth_largest(shared.candidate_at(), n, k, shared);
    if (threadIdx.x == 0) *shared.kept = 0;
    __syncthreads();
    for (int begin = 0; begin < n; begin += blockDim.x) {
        const int i = begin + threadIdx.x;
        const Candidate candidate = i < n ? shared.candidates[i] : 0;
        __syncthreads();  // where candidates are put now, all have been read
        if (candidate >= least) shared.candidates[atomicAdd(shared.kept, 1)] = candidate;
    }
    __syncthreads();
}

// Gathers candidates with a score of at least `least`; false when there was no room for all.
template <class Format>
__device__ bool gather(const RowPart<Format>& row, uint32_t least, int capacity, const TopkShared& shared) {
    using Part = RowPart<Format>;
    if (threadIdx.x == 0) *shared.count = 0;
    __syncthreads();
    const float threshold = float_of(least);
    const auto take = [&](float value, int column, int& slot) {
        if (value < threshold) return;  // not so of NaN
        if (slot < capacity) shared.candidates[slot] = candidate(key_of(value), column);
        ++slot;
    };
    const auto take_one = [&](int column) {
        const float value = row[column];
        if (value < threshold) return;
        int slot = atomicAdd(shared.count, 1);
        take(value, column, slot);
    };
    // false when the room is used up
    const auto take_vector = [&](const uint4& vector, int v) {
        int passing = 0;
#pragma unroll
        for (int i = 0; i < Part::width; ++i) passing += !(Part::in(vector, i) < threshold);
        if (passing == 0) return true;
        int slot = atomicAdd(shared.count, passing);
#pragma unroll
        for (int i = 0; i < Part::width; ++i) take(Part::in(vector, i), row.head + v * Part::width + i, slot);
        return slot <= capacity;
    };
    if (int(threadIdx.x) < row.head) take_one(threadIdx.x);
    bool room = true;
    int v = threadIdx.x;
    for (; room && v + 3 * int(blockDim.x) < row.vectors; v += 4 * blockDim.x) {
        uint4 vector[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) vector[u] = row.vector(v + u * blockDim.x);
#pragma unroll
        for (int u = 0; u < 4; ++u) room &= take_vector(vector[u], v + u * blockDim.x);
    }
    for (; room && v < row.vectors; v += blockDim.x) room = take_vector(row.vector(v), v);
    const int tail = row.head + row.vectors * Part::width + threadIdx.x;
    if (tail < row.length) take_one(tail);
    __syncthreads();
    return *shared.count <= capacity;
}

// The same with any number of such scores, and only the k largest kept. Leaves k candidates, or as many as there are.
template <class Format>
__device__ int gather_in_steps(
    const RowPart<Format>& row, uint32_t least, int k, int capacity, const TopkShared& shared) {
    __syncthreads();
    if (threadIdx.x == 0) *shared.count = 0;
    for (int begin = 0; begin < row.length; begin += blockDim.x) {
        __syncthreads();
        const int n = *shared.count;
        __syncthreads();
        if (n + int(blockDim.x) > capacity) {
            keep_largest(n, k, shared);
            if (threadIdx.x == 0) *shared.count = k;
            uint32_t lowest = ~0u;
            for (int i = threadIdx.x; i < k; i += blockDim.x)
                lowest = smaller(lowest, key_in(shared.candidates[i]));
            least = least_in_block(lowest, reinterpret_cast<unsigned*>(shared.of_warps)) + 1;
            __syncthreads();
        }
        const int column = begin + threadIdx.x;
        if (column < row.length) {
            const uint32_t key = key_of(row[column]);
            if (key >= least) shared.candidates[atomicAdd(shared.count, 1)] = candidate(key, column);
        }
    }
    __syncthreads();
    const int n = *shared.count;
    if (n > k) keep_largest(n, k, shared);
    return smaller(n, k);
}

// The threshold: the rank-th largest of a sample, runs of 32 columns that are evenly spread.
template <class Format>
__device__ uint32_t guess_threshold(const RowPart<Format>& row, int sample, int rank, const TopkShared& shared) {
    const int apart = row.length / (sample / 32);
    for (int i = threadIdx.x; i < sample; i += blockDim.x) shared.sample[i] = key_of(row[i / 32 * apart + i % 32]);
    __syncthreads();
    return kth_largest([all = shared.sample](int i) { return all[i]; }, sample, rank, shared);
}

// Leaves the k largest among the candidates, or all where the row has fewer, and returns how many.
template <class Format>
__device__ int select(const RowPart<Format>& row, const TopkPlan& plan, int k, const TopkShared& shared) {
    const bool sampled = plan.sample > 0 && row.length > plan.capacity;
    uint32_t least = sampled ? guess_threshold(row, plan.sample, plan.rank, shared) : 0;
    if (gather(row, least, plan.capacity, shared)) {
        const int n = *shared.count;
        if (n >= k || !sampled) {
            if (n > k) keep_largest(n, k, shared);
            return smaller(n, k);
        }
        least = 0;
    } else {
        least = key_in(kth_largest(shared.candidate_at(), plan.capacity, k, shared));
    }
    return gather_in_steps(row, least, k, plan.capacity, shared);
}

// Block b does part b % plan.parts of row b / plan.parts, and writes its k results at indices + b k; where there are
// values, their scores at values + b k. The last parts of a row may have fewer than k columns, and are filled up with
// -inf. `names`, in rows of L, are what to write for columns.
template <class Format>
__global__ void __launch_bounds__(512, 2) topk_rows_kernel(
    TopkPlan plan, int32_t* indices, float* values, const typename Format::Word* scores, int64_t stride, int64_t L,
    int64_t span, int k, const int32_t* names) {
    const TopkShared shared(SharedMemory(shared_memory()), plan.capacity, k);
    const int64_t n = blockIdx.x / plan.parts, begin = blockIdx.x % plan.parts * span;
    const RowPart<Format> row(scores + n * stride + begin, int(larger<int64_t>(smaller(span, L - begin), 0)));
    const int count = select(row, plan, k, shared);
    const int size = power_of_two(k);
    // to be sorted by column
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const Candidate chosen = i < count ? shared.candidates[i] : 0;
        shared.candidates[i] = i < count ? Candidate(column_in(chosen)) << 32 | key_in(chosen) : ~Candidate(0);
    }
    sort_in_block(shared.candidates, size);
    indices += int64_t(blockIdx.x) * k;
    for (int i = threadIdx.x; i < k; i += blockDim.x) {
        const Candidate chosen = shared.candidates[i];
        const int64_t column = begin + int64_t(chosen >> 32);
        indices[i] = i >= count ? 0 : names ? names[n * L + column] : int32_t(column);
        if (values) values[int64_t(blockIdx.x) * k + i] = float_of(i < count ? uint32_t(chosen) : 0);
    }
}

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
#include "block.cuh"
#include "formats.cuh"
#include "topk_rows.h"

using Candidate = unsigned long long;

// Unsigned numbers in the order of the floats: NaN is +inf, the zeros are equal. All are above 0, which is no float.
__device__ inline uint32_t key_of(float value) {
    constexpr uint32_t infinity = 0x7f800000, sign = 0x80000000;
    const uint32_t bits = __float_as_uint(value), magnitude = bits & ~sign;
    const bool positive = !(bits & sign) || magnitude > infinity;
    return positive ? sign + smaller(magnitude, infinity) : sign - magnitude;
}

// The least float of this key; -inf for 0.
__device__ inline float float_of(uint32_t key) {
    constexpr uint32_t infinity = 0x7f800000, sign = 0x80000000;
    if (key >= sign) return __uint_as_float(key - sign);
    return __uint_as_float(sign | smaller(sign - key, infinity));
}

__device__ inline Candidate candidate(uint32_t key, uint32_t column) { return Candidate(key) << 32 | ~column; }
__device__ inline uint32_t key_in(Candidate candidate) { return uint32_t(candidate >> 32); }
__device__ inline uint32_t column_in(Candidate candidate) { return ~uint32_t(candidate); }

constexpr int digit_bits = 11, digits = 1 << digit_bits;

// The shared memory of a block.
struct TopkShared {
    Candidate* candidates;  // [capacity], and in the same place
    uint32_t* sample;       // [2 capacity]
    int* histogram;         // [digits]
    int* of_warps;          // [32]
    int* count;             // of candidates that came, with or without room
    int* kept;
    int* digit;   // where the k-th largest lies,
    int* within;  // which of that digit it is,
    int* many;    // and how many have that digit
    size_t bytes;

    __host__ __device__ TopkShared(uintptr_t begin, int capacity) : bytes(0) {
        SharedMemory memory(begin);
        candidates = memory.take<Candidate>(capacity);
        sample = reinterpret_cast<uint32_t*>(candidates);
        histogram = memory.take<int>(digits);
        of_warps = memory.take<int>(32);
        count = memory.take<int>(1);
        kept = memory.take<int>(1);
        digit = memory.take<int>(1);
        within = memory.take<int>(1);
        many = memory.take<int>(1);
        bytes = memory.bytes();
    }
};

// The largest number that at least k of items[0 ... n) reach. By digits, the highest first; as soon as all items of a
// digit are among the k largest, a number with zeros behind that digit, which no more than these reach. When a thread
// returns, all have read the items for the last time.
template <class Item>
__device__ Item kth_largest(const Item* items, int n, int k, const TopkShared& shared) {
    constexpr int bits = 8 * sizeof(Item);
    Item known = 0;
    for (int low = bits - digit_bits;; low -= digit_bits) {
        const int shift = larger(low, 0), width = digit_bits + smaller(low, 0);
        for (int d = threadIdx.x; d < digits; d += blockDim.x) shared.histogram[d] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const Item item = items[i];
            // two shifts: one by all bits would be none
            if (((item ^ known) >> (shift + width - 1)) >> 1 == 0)
                atomicAdd(&shared.histogram[int(item >> shift) & ((1 << width) - 1)], 1);
        }
        __syncthreads();
        // a thread has some digits side by side; the first thread has the highest
        const int each = ceil_div<int>(digits, blockDim.x), highest = digits - 1 - int(threadIdx.x) * each;
        const int lowest = larger(highest - each + 1, 0);
        int mine = 0, all;
        for (int d = highest; d >= lowest; --d) mine += shared.histogram[d];
        int above = sum_before(mine, shared.of_warps, all);
        if (above < k && above + mine >= k) {
            int d = highest;
            while (above + shared.histogram[d] < k) above += shared.histogram[d--];
            *shared.digit = d;
            *shared.within = k - above;
            *shared.many = shared.histogram[d];
        }
        __syncthreads();
        known |= Item(*shared.digit) << shift;
        k = *shared.within;
        if (shift == 0 || k == *shared.many) return known;
    }
}

// Drops all but the k largest of n > k candidates. Ends with a barrier.
__device__ inline void keep_largest(int n, int k, const TopkShared& shared) {
    const Candidate least = kth_largest(shared.candidates, n, k, shared);
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

// A run of a row's columns, read 16 bytes at a time where they are aligned.
template <class Format>
struct RowPart {
    using Word = typename Format::Word;
    static constexpr int width = 16 / sizeof(Word);

    const Word* words;
    int length, head, vectors;  // head: words before the first whole 16 bytes

    __device__ RowPart(const Word* words_, int length_) : words(words_), length(length_) {
        head = smaller(length, int((16 - reinterpret_cast<uintptr_t>(words) % 16) % 16 / sizeof(Word)));
        vectors = (length - head) / width;
    }
    __device__ float operator[](int i) const { return Format::value(words[i]); }
    __device__ uint4 vector(int v) const { return __ldcs(reinterpret_cast<const uint4*>(words + head) + v); }
    __device__ static float in(const uint4& vector, int i) {
        const uint32_t word = i * 4 / width == 0   ? vector.x
                              : i * 4 / width == 1 ? vector.y
                              : i * 4 / width == 2 ? vector.z
                                                   : vector.w;
        return Format::value(Word(width == 8 && i % 2 ? word >> 16 : word));
    }
};

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
    return kth_largest(shared.sample, sample, rank, shared);
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
        least = key_in(kth_largest(shared.candidates, plan.capacity, k, shared));
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
    const TopkShared shared(reinterpret_cast<uintptr_t>(shared_memory()), plan.capacity);
    const int64_t n = blockIdx.x / plan.parts, begin = blockIdx.x % plan.parts * span;
    const RowPart<Format> row(scores + n * stride + begin, int(larger<int64_t>(smaller(span, L - begin), 0)));
    const int count = select(row, plan, k, shared);
    int size = 1;
    while (size < k) size *= 2;
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

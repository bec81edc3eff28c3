// Numbers in the order of scores, and the k-th largest of many of them, by a block.
#pragma once
#include "block.cuh"

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

constexpr int most_digit_bits = 11, digits = 1 << most_digit_bits;

// What a block shares to find the k-th largest.
struct SelectionShared {
    int* histogram;  // [digits]
    int* of_warps;   // [32]
    int* count;      // of candidates that came, with or without room
    int* kept;
    int* digit;   // where the k-th largest lies,
    int* within;  // which of that digit it is,
    int* many;    // and how many have that digit

    __host__ __device__ explicit SelectionShared(SharedMemory& memory) {
        histogram = memory.take<int>(digits);
        of_warps = memory.take<int>(32);
        count = memory.take<int>(1);
        kept = memory.take<int>(1);
        digit = memory.take<int>(1);
        within = memory.take<int>(1);
        many = memory.take<int>(1);
    }
};

// The largest number that at least k of the items at(0) ... at(n - 1) reach. By digits, the highest first; as soon as
// all items of a digit but `spare` are among the k largest, a number with zeros behind that digit, which no more than
// k + spare reach, unless it must be the k-th `itself`, or have `least_bits`. When a thread returns, all have read the
// items for the last time. Short digits are faster where the items are few.
template <bool itself = false, int digit_bits = most_digit_bits, int least_bits = digit_bits, class At>
__device__ auto kth_largest(At at, int n, int k, const SelectionShared& shared, int spare = 0) {
    using Item = decltype(at(0));
    constexpr int bits = 8 * sizeof(Item), of_digit = 1 << digit_bits;
    Item known = 0;
    for (int low = bits - digit_bits;; low -= digit_bits) {
        const int shift = larger(low, 0), width = digit_bits + smaller(low, 0);
        for (int d = threadIdx.x; d < of_digit; d += blockDim.x) shared.histogram[d] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < n; i += blockDim.x) {
            const Item item = at(i);
            // two shifts: one by all bits would be none
            if (((item ^ known) >> (shift + width - 1)) >> 1 == 0)
                atomicAdd(&shared.histogram[int(item >> shift) & ((1 << width) - 1)], 1);
        }
        __syncthreads();
        // a thread has some digits side by side; the first thread has the highest
        const int each = ceil_div<int>(of_digit, blockDim.x), highest = of_digit - 1 - int(threadIdx.x) * each;
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
        if (shift == 0 || (!itself && shift <= bits - least_bits && *shared.many - k <= spare)) return known;
    }
}

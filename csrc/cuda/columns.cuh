// The columns of a row that are a thread's own.
//
// A block does a row of one stream, each thread `held` columns side by side; where the block is not wide enough, it
// goes through the row in steps. Where rows are aligned, columns are read and written 16 bytes at a time.
#pragma once
#include "formats.cuh"
#include "matrix.h"

constexpr int held = 8;
constexpr int most_threads = 512;  // of a block: 4096 columns are in registers at once

// As many as hold the widest stream, or all there may be.
inline int threads_for(const Streams& streams) {
    return smaller(ceil_div(streams.widest(), 32 * held) * 32, most_threads);
}

// One stream of a row.
struct Stream {
    int begin, end;
    bool aligned;

    __device__ Stream(const Streams& streams, int s, bool rows_aligned)
        : begin(streams.begin[s]), end(streams.begin[s + 1]), aligned(rows_aligned && begin % held == 0) {}

    __device__ int step() const { return int(blockDim.x) * held; }
    __device__ bool in_registers() const { return end - begin <= step(); }
};

// A thread's columns in the step that begins at column `first`.
struct Columns {
    int begin, count;
    bool vectors;  // all are there, and aligned
    bool of_warp;  // some thread of this warp has columns

    __device__ Columns(const Stream& stream, int first) : begin(first + int(threadIdx.x) * held) {
        count = larger(smaller(stream.end - begin, held), 0);
        vectors = stream.aligned && count == held;
        of_warp = begin - int(threadIdx.x % 32) * held < stream.end;
    }
};

__device__ inline float value_at(const Matrix& matrix, int64_t i) {
    if (matrix.type == Floats::float32) return static_cast<const float*>(matrix.data)[i];
    const uint16_t word = static_cast<const uint16_t*>(matrix.data)[i];
    return matrix.type == Floats::bfloat16 ? BFloat16::value(word) : Float16::value(word);
}

// Zeros beside the row.
__device__ inline void load(float (&values)[held], const Matrix& matrix, int64_t row, const Columns& columns) {
    const float* const at = static_cast<const float*>(matrix.data) + row * matrix.stride + columns.begin;
    if (columns.vectors) {
#pragma unroll
        for (int i = 0; i < held; i += 4) {
            const float4 four = __ldcs(reinterpret_cast<const float4*>(at + i));
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < held; ++i) values[i] = i < columns.count ? __ldcs(at + i) : 0;
    }
}

// Brings the columns into the L2 cache, a thread for what a cache line holds.
__device__ inline void prefetch(const Matrix& matrix, int64_t row, const Columns& columns) {
    if (threadIdx.x % (128 / sizeof(float) / held) == 0 && columns.count)
        prefetch(static_cast<const float*>(matrix.data) + row * matrix.stride + columns.begin);
}

__device__ inline void store(const float (&values)[held], const Matrix& matrix, int64_t row, const Columns& columns) {
    float* const at = static_cast<float*>(matrix.data) + row * matrix.stride + columns.begin;
    if (columns.vectors) {
#pragma unroll
        for (int i = 0; i < held; i += 4)
            __stcs(reinterpret_cast<float4*>(at + i), float4{values[i], values[i + 1], values[i + 2], values[i + 3]});
    } else {
#pragma unroll
        for (int i = 0; i < held; ++i)
            if (i < columns.count) __stcs(at + i, values[i]);
    }
}

template <class Format>
__device__ void store_narrow(
    const float (&values)[held], const Matrix& matrix, int64_t row, const Columns& columns) {
    uint16_t* const at = static_cast<uint16_t*>(matrix.data) + row * matrix.stride + columns.begin;
    if (columns.vectors) {
        unsigned pairs[held / 2];
#pragma unroll
        for (int i = 0; i < held; i += 2)
            pairs[i / 2] = Format::word(values[i]) | unsigned(Format::word(values[i + 1])) << 16;
        __stcs(reinterpret_cast<uint4*>(at), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    } else {
#pragma unroll
        for (int i = 0; i < held; ++i)
            if (i < columns.count) at[i] = Format::word(values[i]);
    }
}

// Rounds into a narrower matrix, if there is one.
__device__ inline void store_copy(
    const float (&values)[held], const Matrix& copy, int64_t row, const Columns& columns) {
    if (!copy.data) return;
    if (copy.type == Floats::bfloat16)
        store_narrow<BFloat16>(values, copy, row, columns);
    else
        store_narrow<Float16>(values, copy, row, columns);
}

// Columns of a row that other blocks read too, as they lie in memory; zeros beside the row.
template <class Format>
struct KeptColumns {
    using Word = typename Format::Word;
    static constexpr int bits = 8 * sizeof(Word), each = 32 / bits;  // words in 32 bits

    uint32_t words[held / each] = {};

    __device__ void load(const Kept& kept, const Matrix& matrix, unsigned row, const Columns& columns) {
        const Word* const at = static_cast<const Word*>(matrix.data) + int64_t(row) * matrix.stride + columns.begin;
        if (columns.vectors) {
#pragma unroll
            for (int i = 0; i < held / each; i += 4) {
                const uint4 four = kept(reinterpret_cast<const uint4*>(at) + i / 4);
                words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (int i = 0; i < held; ++i)
                if (i < columns.count) words[i / each] |= uint32_t(__ldg(at + i)) << i % each * bits;
        }
    }
    __device__ float operator[](int i) const { return Format::value(Word(words[i / each] >> i % each * bits)); }
};

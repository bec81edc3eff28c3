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

// Whether in every stream each thread has `held` aligned columns, or none.
inline bool all_whole(const Streams& streams, bool rows_aligned) {
    for (int s = 0; s < streams.count; ++s) rows_aligned = rows_aligned && streams.begin[s + 1] % held == 0;
    return rows_aligned;
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

// A thread's columns in the step that begins at column `first`. Where all streams are whole nothing else is looked
// at before an access but whether there are any.
template <bool whole>
struct Columns {
    int begin, count;
    bool full;     // all are there, and aligned
    bool of_warp;  // some thread of this warp has columns

    __device__ Columns(const Stream& stream, int first) : begin(first + int(threadIdx.x) * held) {
        count = whole ? begin < stream.end ? held : 0 : larger(smaller(stream.end - begin, held), 0);
        full = whole ? count > 0 : stream.aligned && count == held;
        of_warp = begin - int(threadIdx.x % 32) * held < stream.end;
    }

    // The first of them in a row.
    template <class T>
    __device__ T* in(const Matrix& matrix, int64_t row) const {
        T* const data = static_cast<T*>(matrix.data) + begin;
        if (!whole) return data + row * matrix.stride;
        const uint64_t apart = uint64_t(uint32_t(row)) * uint32_t(matrix.stride * sizeof(T));
        return const_cast<T*>(reinterpret_cast<const T*>(reinterpret_cast<const char*>(data) + apart));
    }
};

__device__ inline float value_at(const Matrix& matrix, int64_t i) {
    if (matrix.type == Floats::float32) return static_cast<const float*>(matrix.data)[i];
    const uint16_t word = static_cast<const uint16_t*>(matrix.data)[i];
    return matrix.type == Floats::bfloat16 ? BFloat16::value(word) : Float16::value(word);
}

// Zeros beside the row.
template <bool whole>
__device__ void load(float (&values)[held], const Matrix& matrix, int64_t row, const Columns<whole>& columns) {
    const float* const at = columns.template in<const float>(matrix, row);
    if (columns.full) {
#pragma unroll
        for (int i = 0; i < held; i += 4) {
            const float4 four = __ldcs(reinterpret_cast<const float4*>(at + i));
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < held; ++i) values[i] = !whole && i < columns.count ? __ldcs(at + i) : 0;
    }
}

// Brings the columns into the L2 cache, a thread for what a cache line holds.
template <bool whole>
__device__ void prefetch(const Matrix& matrix, int64_t row, const Columns<whole>& columns) {
    if (threadIdx.x % (128 / sizeof(float) / held) == 0 && columns.count)
        prefetch(columns.template in<const float>(matrix, row));
}

template <bool whole>
__device__ void store(const float (&values)[held], const Matrix& matrix, int64_t row, const Columns<whole>& columns) {
    float* const at = columns.template in<float>(matrix, row);
    if (columns.full) {
#pragma unroll
        for (int i = 0; i < held; i += 4)
            __stcs(reinterpret_cast<float4*>(at + i), float4{values[i], values[i + 1], values[i + 2], values[i + 3]});
    } else if (!whole) {
#pragma unroll
        for (int i = 0; i < held; ++i)
            if (i < columns.count) __stcs(at + i, values[i]);
    }
}

template <class Format, bool whole>
__device__ void store_narrow(
    const float (&values)[held], const Matrix& matrix, int64_t row, const Columns<whole>& columns) {
    uint16_t* const at = columns.template in<uint16_t>(matrix, row);
    if (columns.full) {
        unsigned pairs[held / 2];
#pragma unroll
        for (int i = 0; i < held; i += 2) pairs[i / 2] = Format::pair(values[i], values[i + 1]);
        __stcs(reinterpret_cast<uint4*>(at), uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
    } else if (!whole) {
#pragma unroll
        for (int i = 0; i < held; ++i)
            if (i < columns.count) at[i] = Format::word(values[i]);
    }
}

// Rounds into a narrower matrix, if there is one.
template <bool whole>
__device__ void store_copy(
    const float (&values)[held], const Matrix& copy, int64_t row, const Columns<whole>& columns) {
    if (!copy.data) return;
    if (copy.type == Floats::bfloat16)
        store_narrow<BFloat16>(values, copy, row, columns);
    else
        store_narrow<Float16>(values, copy, row, columns);
}

// Columns of a row that other blocks read too, as they lie in memory; zeros beside the row. Where all streams are
// whole only threads with columns may read.
template <class Format>
struct KeptColumns {
    using Word = typename Format::Word;
    static constexpr int bits = 8 * sizeof(Word), each = 32 / bits;  // words in 32 bits

    uint32_t words[held / each];

    template <bool whole>
    __device__ void load(const Kept& kept, const Matrix& matrix, unsigned row, const Columns<whole>& columns) {
        const Word* const at = columns.template in<const Word>(matrix, row);
        if (whole || columns.full) {
#pragma unroll
            for (int i = 0; i < held / each; i += 4) {
                const uint4 four = kept(reinterpret_cast<const uint4*>(at) + i / 4);
                words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
            }
        } else {
#pragma unroll
            for (uint32_t& word : words) word = 0;
#pragma unroll
            for (int i = 0; i < held; ++i)
                if (i < columns.count) words[i / each] |= uint32_t(__ldg(at + i)) << i % each * bits;
        }
    }
    __device__ float operator[](int i) const { return Format::value(Word(words[i / each] >> i % each * bits)); }
};

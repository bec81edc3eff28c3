// Rows of a window at random places, side by side into a batch. While a row is copied the next but one is fetched: the
// hardware learns where a row goes on only after it has begun.
#ifndef SIMD_LEVEL
#include <algorithm>
#include <stdexcept>
#include <string>

#include "level.h"
#include "loader.h"
#include "parallel.h"
#define OPERATOR "gather_rows.cpp"
#include "every_level.h"

constexpr int64_t rows_together = 128;

template <class Move>
static void gather(const Tensor& buffer, const Tensor& rows_, int threads, Move move) {
    const int64_t* const rows = rows_.at<const int64_t>(0);
    const int64_t n = rows_.size[0], bytes = buffer.stride[0] * buffer.item_size;
    parallel_for((n + rows_together - 1) / rows_together, threads, [&](int64_t task) {
        const int64_t last = std::min(n, (task + 1) * rows_together);
        for (int64_t i = task * rows_together; i < last; ++i) {
            const char* const begin = buffer.at<const char>(0);
            move(i, begin + rows[i] * bytes, begin + rows[std::min(i + 2, last - 1)] * bytes);
        }
    });
}

void gather_rows(Tensor out, Tensor buffer, Tensor rows, int widening, int threads) {
    const int64_t width = buffer.size[1];
    const Type narrow = widening == from_bfloat16 ? Type::bfloat16 : Type::float16;
    if (widening == as_it_is ? out.type != buffer.type : out.type != Type::float32 || buffer.type != narrow)
        throw std::invalid_argument("gather_rows: out must be of the type that rows of buffer become");
    for (int64_t i = 0; i < rows.size[0]; ++i)
        if (const int64_t row = *rows.at<const int64_t>(i); row < 0 || row >= buffer.size[0])
            throw std::out_of_range("gather_rows: rows must be of buffer, got " + std::to_string(row));
    const auto row = [&](int64_t i) { return out.at<char>(0) + i * out.stride[0] * out.item_size; };
    if (widening == as_it_is)
        gather(buffer, rows, threads, [&](int64_t i, const char* from, const char* later) {
            AT_SIMD_LEVEL(copy_row(row(i), from, later, width * buffer.item_size))
        });
    else
        gather(buffer, rows, threads, [&](int64_t i, const char* from, const char* later) {
            float* const to = (float*)row(i);
            if (widening == from_bfloat16) AT_SIMD_LEVEL(widen_row(to, (const bf16*)from, later, width))
            AT_SIMD_LEVEL(widen_row(to, (const f16*)from, later, width))
        });
}
#else

namespace SIMD_LEVEL {

inline void copy_row(char* to, const char* from, const char* later, int64_t bytes) {
    constexpr int64_t line = 64;
    int64_t b = 0;
    for (; b + line <= bytes; b += line) {
        __builtin_prefetch(later + b);
        char piece[line];
        std::memcpy(piece, from + b, line);
        std::memcpy(to + b, piece, line);
    }
    std::memcpy(to + b, from + b, bytes - b);
}

template <class T>
void widen_row(float* to, const T* from, const char* later, int64_t width) {
    for (int64_t d = 0; d < width; d += lanes<float>) {
        __builtin_prefetch(later + d * sizeof(T));
        store(to + d, load(from + d, width - d), width - d);
    }
}

}  // namespace SIMD_LEVEL
#endif

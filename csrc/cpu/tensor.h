// What the operators of the CPU make of tensors.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../arguments/arguments.h"

struct bf16 {
    uint16_t bits;
};

struct f16 {
    uint16_t bits;
};

// The type sums are taken in.
template <class T>
struct sum_type {
    using type = float;
};
template <>
struct sum_type<double> {
    using type = double;
};
template <class T>
using sum_t = typename sum_type<T>::type;

// The integer as wide as a float or a double.
template <class T>
using integer_t = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

// Calls f with a value of the floating-point type that has this size.
template <class F>
void with_type(int64_t item_size, F f) {
#ifndef SPARC_FAST_FLOAT32_ONLY  // to look at threads, which do the same in every type
    if (item_size == 8) f(double{});
    if (item_size == 2) f(bf16{});
#endif
    if (item_size == 4) f(float{});
}

// Calls f with a value of the type of the tensors there are: bfloat16, or A, in which sums are taken.
template <class A, size_t n, class F>
void with_either(const Tensors<n>& tensors, F f) {
    if constexpr (sizeof(A) == sizeof(float)) {
        for (const Tensor& tensor : tensors)
            if (tensor.item_size == 2) return f(bf16{});
    }
    f(A{});
}

// A run of columns inside one stream, the unit of work of the gathering operators.
struct Columns {
    int64_t stream, begin, end;
    bool first, last;  // of its stream
};

constexpr int64_t whole_streams = INT64_MAX / 2;

// The columns of every stream, in runs of at most `width`.
inline std::vector<Columns> column_runs(const std::vector<int64_t>& d_streams, int64_t width) {
    std::vector<Columns> runs;
    int64_t offset = 0;
    for (size_t s = 0; s < d_streams.size(); ++s) {
        const int64_t end = offset + d_streams[s];
        for (int64_t c = offset; c < end; c += width)
            runs.push_back({int64_t(s), c, c + width < end ? c + width : end, c == offset, c + width >= end});
        offset = end;
    }
    return runs;
}

// The active latents of each sample: [N, k] shared by its streams, or [N, S, k]. -1 is an empty slot.
struct Support {
    const int32_t* indices;
    int64_t N, S, k;
    bool shared;

    // `lowest` is 0 where a slot must not be empty.
    Support(const Tensor& tensor, int64_t S_, int64_t L, int32_t lowest = -1)
        : indices(tensor.at<const int32_t>(0)),
          N(tensor.size[0]),
          S(S_),
          k(tensor.size[tensor.ndim - 1]),
          shared(tensor.ndim == 2) {
        bool inside = true;
        for (int64_t i = 0; i < entries(); ++i) inside &= indices[i] >= lowest && indices[i] < L;
        if (!inside)
            throw std::out_of_range(
                "indices must lie in " + std::to_string(lowest) + " ... n_latents - 1 = " + std::to_string(L - 1));
    }

    int64_t entries() const { return N * k * (shared ? 1 : S); }
    const int32_t* of(int64_t n, int64_t s) const { return indices + (shared ? n : n * S + s) * k; }
};

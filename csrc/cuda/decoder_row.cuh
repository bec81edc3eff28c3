// One training step of a decoder row in one stream, once its gradient is known: Adam, then unit norm.
//
// update_rows and replay_rows take it with these functions, in blocks of the same number of threads: a row's bits then
// depend on the row alone.
#pragma once
#include "adam.cuh"
#include "block.cuh"
#include "columns.cuh"
#include "operators.h"

// A thread's columns of a row and its moments.
struct Held {
    float w[held], m[held], v[held];
};

template <bool whole>
__device__ void load(Held& row, const Rows& rows, int64_t l, const Columns<whole>& columns) {
    load(row.w, rows.weights, l, columns);
    load(row.m, rows.first, l, columns);
    load(row.v, rows.second, l, columns);
}

template <bool whole>
__device__ void prefetch(const Rows& rows, int64_t l, const Columns<whole>& columns) {
    prefetch(rows.weights, l, columns);
    prefetch(rows.first, l, columns);
    prefetch(rows.second, l, columns);
}

template <bool whole>
__device__ void store(const Held& row, const Rows& rows, int64_t l, const Columns<whole>& columns) {
    store(row.w, rows.weights, l, columns);
    store(row.m, rows.first, l, columns);
    store(row.v, rows.second, l, columns);
}

// Takes out what the gradient has along the row: <gradient, w> / <w, w> is `along`.
__device__ inline void project(float (&gradient)[held], const float (&w)[held], float along) {
#pragma unroll
    for (int i = 0; i < held; ++i) gradient[i] = __fmaf_rn(-along, w[i], gradient[i]);
}

// products += <gradient, w>, <w, w>
__device__ inline void multiply(float (&products)[2], const float (&gradient)[held], const float (&w)[held]) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
        products[0] = __fmaf_rn(gradient[i], w[i], products[0]);
        products[1] = __fmaf_rn(w[i], w[i], products[1]);
    }
}

constexpr float smallest = 1.1754943508222875e-38f;  // normal number: divides a row of zeros without harm

__device__ inline float along_of(float (&products)[2], BlockSums& sums) {
    sums(products);
    return __fmul_rn(products[0], approximate_reciprocal(larger(products[1], smallest)));
}

// Adam on the thread's columns; adds the squares of what comes out.
template <bool whole>
__device__ void move(
    Held& row, const float (&gradient)[held], const Columns<whole>& columns, const AdamConstants& constants,
    float (&squares)[1]) {
#pragma unroll
    for (int i = 0; i < held; ++i) {
        const float moved = adam(row.w[i], gradient[i], row.m[i], row.v[i], constants);
        row.w[i] = i < columns.count ? moved : 0;  // with eps = 0 the columns beside the row are 0 / 0
        squares[0] = __fmaf_rn(row.w[i], row.w[i], squares[0]);
    }
}

__device__ inline float inverse_norm(float (&squares)[1], BlockSums& sums) {
    sums(squares);
    return approximate_reciprocal(larger(approximate_root(squares[0]), smallest));
}

__device__ inline void scale(float (&w)[held], float factor) {
#pragma unroll
    for (int i = 0; i < held; ++i) w[i] = __fmul_rn(w[i], factor);
}

// A step of a row that the block holds.
template <bool whole>
__device__ void step_in_registers(
    Held& row, const float (&gradient)[held], const Columns<whole>& columns, const AdamConstants& constants,
    BlockSums& sums) {
    float squares[1] = {0};
    move(row, gradient, columns, constants, squares);
    scale(row.w, inverse_norm(squares, sums));
}

// A step of a row too wide for that, and of its copy; gradient_at(gradient, columns) sets a thread's columns, and what
// they have along the row is taken out here.
template <bool whole, class GradientAt>
__device__ void step_in_memory(
    const Rows& rows, int64_t l, const Stream& stream, const AdamConstants& constants, float along, BlockSums& sums,
    GradientAt gradient_at) {
    float squares[1] = {0};
    for (int first = stream.begin; first < stream.end; first += stream.step()) {
        const Columns<whole> columns(stream, first);
        float gradient[held];
        gradient_at(gradient, columns);
        Held row;
        load(row, rows, l, columns);
        project(gradient, row.w, along);
        move(row, gradient, columns, constants, squares);
        store(row, rows, l, columns);
    }
    const float factor = inverse_norm(squares, sums);
    for (int first = stream.begin; first < stream.end; first += stream.step()) {
        const Columns<whole> columns(stream, first);
        float w[held];
        load(w, rows.weights, l, columns);
        scale(w, factor);
        store(w, rows.weights, l, columns);
        store_copy(w, rows.copy, l, columns);
    }
}

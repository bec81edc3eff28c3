// Intervals that hold scores, and the candidates of a sample: kernels/global_topk.py says what they are.
#pragma once
#include "formats.cuh"
#include "operators.h"
#include "selection.cuh"

constexpr float largest_norm = 1e18f, unit = 0x1p-22f;
constexpr uint32_t sign_bit = 0x80000000;

// Keys are kept as signed numbers.
__device__ inline uint32_t key_from(int32_t stored) { return uint32_t(stored) ^ sign_bit; }
__device__ inline int32_t stored(uint32_t key) { return int32_t(key ^ sign_bit); }

__device__ inline float infinity() { return __uint_as_float(0x7f800000); }

struct Interval {
    float lower, upper;  // an upper end may be NaN, which ranks with +inf
};

// a + b -+ E, where a is x.w up to `bound`, or 0 where a row is zero.
__device__ inline Interval interval(float a, float b, float bound, float slack, bool zero) {
    const float size = fabsf(b);
    float error = bound + (unit * fabsf(a) + slack + unit * (size < largest_norm ? size : 0));
    if (zero) error = 0;
    if (size >= largest_norm && size < infinity()) error = __uint_as_float(0x7fffffff);
    const float lower = a + b - error;
    return {lower == lower ? lower : -infinity(), a + b + error};
}

// The candidates of one sample.
struct RowCandidates {
    int32_t *lows, *highs, *latents, *places;
    int capacity;

    __device__ RowCandidates(const Candidates& all, int64_t n) : capacity(all.capacity) {
        const int64_t place = n * capacity;
        lows = all.lows + place, highs = all.highs + place;
        latents = all.latents + place, places = all.places + place;
    }
    __device__ Candidate lower(int i) const { return candidate(key_from(lows[i]), latents[i]); }
    __device__ Candidate upper(int i) const { return candidate(key_from(highs[i]), latents[i]); }
};

// What makes intervals of the products of one sample.
struct SampleBounds {
    float p, q, whole, inverse, flushed, slack;

    SampleBounds() = default;
    __device__ SampleBounds(const SampleNorms& samples, int64_t n, const Bounds& bounds)
        : flushed(bounds.flushed), slack(bounds.slack) {
        const float rest = samples.residual[n], growth = 1 + 0x1p-20f;
        whole = samples.norm[n] + rest;
        p = (rest + bounds.gamma * whole) * growth;
        q = (1 + bounds.gamma) * whole * growth;
        inverse = samples.inverse[n];
    }

    // How many candidates there are before the first score; below 0, what to do instead.
    __device__ int start_count() const { return whole != whole ? -2 : q < infinity() ? 0 : -1; }

    __device__ Interval of(float a, float b, float norm, float residual, float scale) const {
        const bool zero = norm == 0 || (whole == 0 && norm < infinity());
        return interval(a * (inverse * scale), b, p * norm + q * residual, slack, zero);
    }
};

// Drops the candidates whose upper ends are not above `below`; how many are left.
__device__ inline int drop(
    const RowCandidates& candidates, int count, Candidate below, const SelectionShared& shared) {
    __syncthreads();
    if (threadIdx.x == 0) *shared.kept = 0;
    for (int begin = 0; begin < count; begin += blockDim.x) {
        const int i = begin + threadIdx.x;
        const bool keep = i < count && candidates.upper(i) > below;
        const int32_t low = keep ? candidates.lows[i] : 0, high = keep ? candidates.highs[i] : 0;
        const int32_t latent = keep ? candidates.latents[i] : 0;
        __syncthreads();  // where candidates are put now, all have been read
        if (!keep) continue;
        const int slot = atomicAdd(shared.kept, 1);
        candidates.lows[slot] = low, candidates.highs[slot] = high, candidates.latents[slot] = latent;
    }
    __syncthreads();
    return *shared.kept;
}

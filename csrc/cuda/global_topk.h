#pragma once
#include <cstdint>

#include "topk_rows.h"

// What may be among the k largest of some samples: what kernels/global_topk.py holds, in any order. Ends of intervals
// are keys, signed integers in the order of the floats.
struct Candidates {
    int32_t* counts;      // [samples]; -1: given up, -2: the sample holds NaN
    int32_t* thresholds;  // [samples]: keys that the upper end of a later latent must be above
    int32_t *lows, *highs, *latents, *places;  // [samples, capacity]; places are scratch
    int capacity;
};

// Of each latent of a chunk; residual and inverse are null where W is multiplied as it is stored.
struct LatentNorms {
    const float *bias, *norm, *residual, *inverse;
};

struct SampleNorms {
    const float *norm, *residual, *inverse;
};

// The bound's numbers that depend on D alone.
struct Bounds {
    float gamma, flushed, slack;
};

// How a chunk is filtered. Nothing here changes a support, unless it makes no sense.
struct FilterPlan {
    int threads;  // of a block
    int sample;   // of the first chunk's scores, to find a first threshold in; 0: none is needed, else at least k

    static FilterPlan of(int64_t chunk, int k, int capacity);
};

// Takes in scores[n] of the latents first ... first + chunk - 1, [N, chunk] without gaps; the first of them is 0 in the
// first chunk. k <= capacity, unless there are fewer latents. Nothing waits, nothing is allocated.
void filter_scores(
    FilterPlan plan, Candidates candidates, const float* scores, int64_t N, int64_t first, int64_t chunk,
    LatentNorms latents, SampleNorms samples, int k, Bounds bounds, uintptr_t stream);

// What scores are summed from.
struct Operands {
    Matrix x, pre_bias, W;
    const double* bias;  // [L]
    int D;
};

// indices[first_row + n] for N samples, from all their candidates; those given up are listed behind given_up[*total].
// The order of a score's sum is that of kernels/global_topk.py. 1 <= k <= most_k.
void settle_supports(
    Candidates candidates, Operands operands, int64_t first_row, int64_t N, const float* x_norm, const float* w_norm,
    int k, float rounding, float slack, int32_t* indices, int32_t* given_up, int32_t* total, uintptr_t stream);

// Every operator that has a CUDA kernel, with the meaning it has in sparc_fast/ops/reference.py. The workspace is of as
// many bytes as <operator>_workspace says; nothing waits, and nothing is allocated.
#pragma once
#include "matrix.h"

constexpr int most_k = 2048;

// How the rows of topk_rows are selected. Nothing here changes a result, unless it makes no sense.
struct TopkPlan {
    int threads;   // of a block
    int capacity;  // candidates a block can hold, at least k + threads
    int parts;     // a row is cut in so many, each the work of a block; their results are merged
    int sample;    // scores looked at to guess a threshold, at most 2 capacity; 0: none is needed
    int rank;      // which of the sample is the threshold

    // For rows of L columns on a device of so many multiprocessors, which run together all of N rows' blocks.
    static TopkPlan of(int64_t N, int64_t L, int k, int multiprocessors);
    // Of another length, as the parts of a row or their results are.
    TopkPlan for_length(int64_t length, int k) const;

    int64_t span(int64_t L) const;  // columns of a part
};

int64_t topk_rows_workspace(TopkPlan plan, int64_t N, int k);

// indices[n] (int32) = columns of the k largest of scores[n], ascending. Ties go to the lower column; NaN ranks with
// +inf. 1 <= k <= most_k, k <= L < 2^31. Rows lie `stride` scores apart.
void topk_rows(
    TopkPlan plan, int32_t* indices, const void* scores, Floats type, int64_t stride, int64_t N, int64_t L, int k,
    void* workspace, uintptr_t stream);

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
// first chunk. k <= capacity, unless there are fewer latents.
void filter_scores(
    FilterPlan plan, Candidates candidates, const float* scores, int64_t N, int64_t first, int64_t chunk,
    LatentNorms latents, SampleNorms samples, int k, Bounds bounds, uintptr_t stream);

// Whether the current device multiplies tiles (tiles.cuh), and so screens scores.
bool screens_scores();

constexpr int tile_latents = 256;

int64_t screen_scores_workspace(int64_t N);

// Takes in the scores of all latents but every `apart`-th, whose candidates are there, counted 0, 1, ...; apart is a power
// of 2 below L. X [N, D], the samples, and W [L, D] are both bfloat16 or both float16, in whole 16 bytes. After it candidates are
// what settle_supports takes. k <= capacity, L + 2 tile_latents apart < 2^31.
void screen_scores(
    Candidates candidates, Matrix X, Matrix W, int N, int L, int D, const float* bias, const float* norm,
    SampleNorms samples, int apart, int k, Bounds bounds, int multiprocessors, void* workspace, uintptr_t stream);

// What scores are summed from.
struct Operands {
    Matrix x, pre_bias, W;
    const double* bias;  // [L]
    int D;
};

// Where the values of samples go, [samples, S, k] without gaps, and the biases in them, [S, L]; or nothing.
struct Activations {
    Matrix latent_bias, values;
};

// indices[first_row + n] for N samples, from all their candidates, and with their values where these go somewhere; those
// given up are listed behind given_up[*total]. The order of a score's sum is that of kernels/global_topk.py.
// 1 <= k <= most_k.
void settle_supports(
    Candidates candidates, Operands operands, const Streams& streams, Activations to, int64_t first_row, int64_t N,
    const float* x_norm, const float* w_norm, int k, float rounding, float slack, int32_t* indices, int32_t* given_up,
    int32_t* total, uintptr_t stream);

// The values of N samples on their supports, [samples, k] or, `per_stream`, [samples, S, k]; 0 where a latent is not
// 0 ... L - 1. Of all samples, or of those listed, *count of the N there may be. operands.bias is not read.
struct Supports {
    const int32_t* indices;
    int L, k;
    bool per_stream;
    const int32_t *listed, *count;
};

void support_values(
    Operands operands, const Streams& streams, Activations to, Supports supports, int64_t N, uintptr_t stream);

int64_t invert_indices_workspace(int64_t n, int64_t L);

// entries[offsets[l] ... offsets[l + 1]) (int64) = the positions p < n with indices[p] == l, ascending. Latents outside
// 0 ... L - 1 are in no segment: their positions follow behind offsets[L]. n and L + 1 below 2^31. `few`: in one launch,
// which reads all indices for every 256 latents, and has no need of the workspace.
void invert_indices(
    int64_t* offsets, int64_t* entries, const int32_t* indices, int64_t n, int64_t L, bool few, void* workspace,
    uintptr_t stream);

// A step of Adam. Where there is an address, the device has the number.
struct AdamStep {
    double lr, beta_1, beta_2, eps, step;
    const double *lr_at, *step_at;
};

// What is moved: weights, Adam's moments and the weights' copy in a narrower type.
struct Rows {
    Matrix weights, first, second, copy;

    bool aligned() const {
        return weights.aligned() && first.aligned() && second.aligned() && (!copy.data || copy.aligned());
    }
};

// The inverse index of a batch, and what is summed by it.
struct Batch {
    Matrix x, grad_recons;                 // [N, D], [N S, D]
    Matrix pre_bias, values, grad_values;  // [D], [N, S, k] twice
    const int64_t *offsets, *entries;
    int64_t count;  // of entries
    int L, k;
    bool per_stream;  // entries number [N, S, k], not [N, k]
    Streams streams;
};

// Gradients that are given instead, float32; used [L]: the latents that have an entry.
struct Gradients {
    Matrix W_enc, W_dec;  // [L, D]
    const bool* used;
    int L;
    Streams streams;
};

struct UpdatePlan {
    int blocks;        // that share the latents, each going on when it is through; changes no result
    int piece;         // entries beyond which a latent is summed in pieces; the rounding of its sum depends on it
    bool stages_rows;  // where all lie in whole 16 bytes, by bulk copies, which sm_90 has; changes no result

    static UpdatePlan of(const Streams& streams, bool per_stream, int multiprocessors);
};

// Of `count` entries; step_rows has none.
int64_t update_rows_workspace(UpdatePlan plan, int64_t count, int L, const Streams& streams);

// A step of every latent's rows in place, and grad_latent_bias [S, L] and grad_pre_bias [D]. With last_step, decoder rows
// without an entry are left behind, and those with one are marked. x and grad_recons are both of one type, or x is
// float16 and grad_recons float32; N S < 2^32.
void update_rows(
    UpdatePlan plan, float* grad_latent_bias, float* grad_pre_bias, const Rows& encoder, const Rows& decoder,
    const Batch& batch, const AdamStep& step, int64_t* last_step, void* workspace, uintptr_t stream);

void step_rows(
    UpdatePlan plan, const Rows& encoder, const Rows& decoder, const Gradients& gradients, const AdamStep& step,
    int64_t* last_step, void* workspace, uintptr_t stream);

int64_t replay_rows_workspace(int64_t T);

// Decoder rows of R latents through steps last_step + 1 ... T, each with a gradient of 0, in place; then their
// last_step is T. history is [T, 4]: (lr, beta_1, beta_2, eps) of each step. Latents outside 0 ... L - 1 are left
// alone.
void replay_rows(
    const Rows& decoder, const int64_t* latents, int64_t R, int64_t L, int64_t* last_step, const double* history,
    int64_t T, const Streams& streams, void* workspace, uintptr_t stream);

#pragma once
#include "adam_constants.h"
#include "matrix.h"

// What an update is made of, beside the samples: weights, Adam's moments and the weights' copy in a narrower type.
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

struct UpdatePlan {
    int blocks;  // that share the latents, each going on when it is through; changes no result
    int piece;   // entries beyond which a latent is summed in pieces; the rounding of its sum depends on it

    static UpdatePlan of(const Streams& streams, bool per_stream, int multiprocessors);
};

// Bytes of workspace that update_rows needs.
int64_t update_rows_workspace(UpdatePlan plan, int64_t count, int L, const Streams& streams);

// A step of every latent's rows in place, and grad_latent_bias [S, L] and grad_pre_bias [D], as
// sparc_fast/ops/reference.py says. With last_step, decoder rows without an entry are left behind, and those with one are
// marked. x and grad_recons are both of one type, or x is float16 and grad_recons float32; N S < 2^32. Nothing waits,
// nothing is allocated.
void update_rows(
    UpdatePlan plan, float* grad_latent_bias, float* grad_pre_bias, const Rows& encoder, const Rows& decoder,
    const Batch& batch, const AdamStep& step, int64_t* last_step, void* workspace, uintptr_t stream);

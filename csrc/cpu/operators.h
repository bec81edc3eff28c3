// Every operator of the CPU backend, with the arguments and the meaning it has in sparc_fast/ops/reference.py. Results
// come first and are written in place; `threads` comes last. Values, biases, scales and their gradients are in the
// type of the sums; x, the weights, the reconstructions and their gradients may be narrower.
#pragma once
#include <vector>

#include "tensor.h"

void support_values(
    Tensor values, Tensor x, Tensor W_enc, Tensor pre_bias, Tensor latent_bias, Tensor indices, Widths d_streams,
    int threads);

void support_values_grad_x(
    Tensor grad_x, Tensor grad_values, Tensor values, Tensor indices, Tensor W_enc, Widths d_streams, int threads);

void sparse_decode(Tensor recons, Tensor values, Tensor indices, Tensor W_dec, Tensor pre_bias, int threads);

void sparse_decode_grad_values(Tensor grad_values, Tensor grad_recons, Tensor indices, Tensor W_dec, int threads);

void decode_loss(
    Tensor nmse, Tensor grad_recons, Tensor grad_values, Tensor grad_pre_bias, Tensor values, Tensor indices,
    Tensor W_dec, Tensor pre_bias, Tensor target, Tensor scale, std::vector<double> weights, Widths d_streams,
    int threads);

// nmse is [P S, S], grad_recons [P N, S, D]; sizes [P], int64.
void nested_decode_loss(
    Tensor nmse, Tensor grad_recons, Tensor grad_values, Tensor grad_pre_bias, Tensor values, Tensor indices,
    Tensor W_dec, Tensor pre_bias, Tensor target, Tensor scale, std::vector<double> weights, Widths d_streams,
    Tensor sizes, int threads);

void invert_indices(Tensor offsets, Tensor entries, Tensor indices, int64_t L);

// The samples of a batch, what flowed through them, and where each latent occurs.
struct Batch {
    Tensor x, pre_bias, values, grad_values, grad_recons, offsets, entries;
    Widths d_streams;
};

// A gradient without data is not computed.
void weight_gradients(Tensor grad_W_enc, Tensor grad_W_dec, Tensor grad_latent_bias, Batch batch, int threads);

// squares [L], float64 and zeros before. Without grad_latent_bias or grad_recons, those of the other matrix alone.
void gradient_squares(Tensor squares, Tensor grad_latent_bias, Batch batch, int threads);

struct AdamStep {
    double lr, beta1, beta2, eps;
    int64_t step;
    uint64_t seed = 0;  // of the rounding of bfloat16 moments
};

// Moments are those of W_enc, then of W_dec, in the type of the sums or all bfloat16. Copies are bfloat16; those without
// data are not written. Weights without data stay as they are, and have no moments. With last_step, decoder rows without an entry are left behind.
void update_rows(
    Tensor grad_latent_bias, Tensor grad_pre_bias, Tensor W_enc, Tensor W_dec, Tensors<4> moments,
    Tensors<2> copies, Tensor last_step, Batch batch, AdamStep adam, int threads);

// Gradients that are given instead, in the type of the sums; used [L], one byte each: the latents that have an entry.
struct Gradients {
    Tensor W_enc, W_dec, used;
    Widths d_streams;
};

void step_rows(
    Tensor W_enc, Tensor W_dec, Tensors<4> moments, Tensors<2> copies, Tensor last_step,
    Gradients gradients, AdamStep adam, int threads);

void replay_rows(
    Tensor W_dec, Tensors<2> moments, Tensor copy, Tensor latents, Tensor last_step, Tensor history,
    Widths d_streams, uint64_t seed, int threads);

void count_silence(Tensor silence, Tensor values, Tensor indices);

// Queries and candidates are rows of few numbers: offsets [N + 1], their latents and values. Candidates first[n] ...
// last[n] - 1 are query n's own: own[n] <- the largest product with one of them, higher[n] and equal[n] <- the others whose
// product is greater than that by more than `tie`, and within it. A query without candidates of its own has own -inf, 0, 0.
void count_nearer(
    Tensor own, Tensor higher, Tensor equal, Tensor query_offsets, Tensor query_latents, Tensor query_values,
    Tensor offsets, Tensor latents, Tensor values, Tensor first, Tensor last, int64_t L, double tie, int threads);

// candidates, cosines [Q, top] <- those of the largest products with each query, the largest first, of equal ones the
// lower; -1 and 0 where no product is above 0.
void find_nearest(
    Tensor candidates, Tensor cosines, Tensor query_offsets, Tensor query_latents, Tensor query_values, Tensor offsets,
    Tensor latents, Tensor values, int64_t L, int threads);

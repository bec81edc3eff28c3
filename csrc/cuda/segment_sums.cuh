// Sums over the entries of a latent, in their order, of rows that many latents share and that stay in the L2 cache.
//
// encoder: sum over entries (n, j) in stream s of  grad_z[n, s, j] (x - pre_bias)[n, d],  grad_z = grad_values where
//          values > 0, else 0
// decoder: sum over entries (n, j) and streams s of  values[n, s, j] grad_recons[n, s, d]
//
// A warp looks up 32 terms at once, one a lane, and reads the rows of those whose coefficient is not 0; no barrier is
// needed. Of a latent with more than `piece` entries the first `piece` are summed where the sum is wanted. Every
// further piece was summed beforehand, by another block, into a row of scratch, and these rows are added in order: so a
// latent that every sample uses keeps no block busy, and the grid shows in no bit. The row of a piece is the number of
// its first entry / piece: first entries of pieces lie at least `piece` apart, so no two have one row.
#pragma once
#include "columns.cuh"
#include "update_rows.h"

// Sums of the pieces beyond the first of every latent.
struct PieceSums {
    Matrix encoder, decoder;  // [slots, D]
    float* bias;              // [slots, S]
    int piece;                // entries
};

struct Term {
    unsigned row;
    float coefficient;
};

// Of one entry in stream s: a row of x.
__device__ inline Term encoder_term(const Batch& batch, int s, int64_t entry) {
    const int S = batch.streams.count;
    const int64_t position = batch.entries[entry], row = position / batch.k;
    const int64_t n = batch.per_stream ? row / S : row;
    if (batch.per_stream && row % S != s) return {0, 0};
    const int64_t at = batch.per_stream ? position : (n * S + s) * batch.k + position % batch.k;
    return {unsigned(n), value_at(batch.values, at) > 0 ? value_at(batch.grad_values, at) : 0};
}

// Of one entry and one of its sources: a row of grad_recons.
__device__ inline Term decoder_term(const Batch& batch, int64_t entry, int source) {
    const int64_t position = batch.entries[entry], row = position / batch.k;
    const int64_t from = batch.per_stream ? row : row * batch.streams.count + source;
    return {unsigned(from), value_at(batch.values, from * batch.k + position % batch.k)};
}

// sum += coefficient * centred(row's column) of terms 0 ... count - 1 in order; returns the sum of coefficients. Called
// by whole warps.
template <class Format, class TermAt, class Centred>
__device__ float add_terms(
    float (&sum)[held], const Matrix& matrix, const Columns& columns, int count, TermAt term_at, Centred centred) {
    constexpr int in_flight = 4;  // rows that are read at once; estimated, not measured
    const Kept kept;
    const int lane = threadIdx.x % 32;
    float coefficients = 0;
    for (int first = 0; first < count; first += 32) {
        const Term mine = first + lane < count ? term_at(first + lane) : Term{0, 0};
        unsigned left = __ballot_sync(all_lanes, mine.coefficient != 0);
        while (left) {
            KeptColumns<Format> rows[in_flight];
            float coefficient[in_flight];
#pragma unroll
            for (int u = 0; u < in_flight; ++u) {
                const int owner = left ? __ffs(left) - 1 : 0;
                const unsigned row = __shfl_sync(all_lanes, mine.row, owner);
                coefficient[u] = __shfl_sync(all_lanes, mine.coefficient, owner);
                if (left)
                    rows[u].load(kept, matrix, row, columns);
                else
                    coefficient[u] = 0;
                left &= left - 1;
            }
#pragma unroll
            for (int u = 0; u < in_flight; ++u) {
                if (coefficient[u] == 0) continue;
                coefficients = __fadd_rn(coefficients, coefficient[u]);
#pragma unroll
                for (int i = 0; i < held; ++i)
                    sum[i] = __fmaf_rn(coefficient[u], centred(rows[u][i], i), sum[i]);
            }
        }
    }
    return coefficients;
}

// The encoder's gradient in stream s over entries begin ... end; returns that of the latent's bias.
template <class X>
__device__ float encoder_sum(
    float (&sum)[held], const Batch& batch, int s, const Columns& columns, const float (&centre)[held], int64_t begin,
    int64_t end) {
    return add_terms<X>(
        sum, batch.x, columns, int(end - begin), [&](int i) { return encoder_term(batch, s, begin + i); },
        [&](float value, int i) { return __fsub_rn(value, centre[i]); });
}

template <class G>
__device__ void decoder_sum(
    float (&sum)[held], const Batch& batch, const Columns& columns, int64_t begin, int64_t end) {
    const int sources = batch.per_stream ? 1 : batch.streams.count;
    add_terms<G>(
        sum, batch.grad_recons, columns, int(end - begin) * sources,
        [&](int i) { return decoder_term(batch, begin + i / sources, i % sources); },
        [](float value, int) { return value; });
}

// Adds what the further pieces of entries begin ... end sum up to.
__device__ inline void add_pieces(
    float (&sum)[held], const Matrix& rows, int piece, const Columns& columns, int64_t begin, int64_t end) {
    for (int64_t first = begin + piece; first < end; first += piece) {
        float more[held];
        load(more, rows, first / piece, columns);
#pragma unroll
        for (int i = 0; i < held; ++i) sum[i] = __fadd_rn(sum[i], more[i]);
    }
}

__device__ inline void load_centre(float (&centre)[held], const Batch& batch, const Columns& columns) {
#pragma unroll
    for (int i = 0; i < held; ++i) centre[i] = i < columns.count ? value_at(batch.pre_bias, columns.begin + i) : 0;
}

// The whole gradient of latent l's row.
template <class X>
__device__ float encoder_gradient(
    float (&sum)[held], const Batch& batch, const PieceSums& pieces, int s, const Columns& columns,
    const float (&centre)[held], int64_t l) {
    const int64_t begin = batch.offsets[l], end = batch.offsets[l + 1];
#pragma unroll
    for (int i = 0; i < held; ++i) sum[i] = 0;
    if (!columns.of_warp) return 0;
    float bias = encoder_sum<X>(sum, batch, s, columns, centre, begin, smaller(begin + pieces.piece, end));
    add_pieces(sum, pieces.encoder, pieces.piece, columns, begin, end);
    for (int64_t first = begin + pieces.piece; first < end; first += pieces.piece)
        bias = __fadd_rn(bias, pieces.bias[first / pieces.piece * batch.streams.count + s]);
    return bias;
}

template <class G>
__device__ void decoder_gradient(
    float (&sum)[held], const Batch& batch, const PieceSums& pieces, const Columns& columns, int64_t l) {
    const int64_t begin = batch.offsets[l], end = batch.offsets[l + 1];
#pragma unroll
    for (int i = 0; i < held; ++i) sum[i] = 0;
    if (!columns.of_warp) return;
    decoder_sum<G>(sum, batch, columns, begin, smaller(begin + pieces.piece, end));
    add_pieces(sum, pieces.decoder, pieces.piece, columns, begin, end);
}

// Sums over the entries of a latent, in their order, of rows that many latents share and that stay in the L2 cache.
//
// encoder: sum over entries (n, j) in stream s of  grad_z[n, s, j] (x - pre_bias)[n, d],  grad_z = grad_values where
//          values > 0, else 0
// decoder: sum over entries (n, j) and streams s of  values[n, s, j] grad_recons[n, s, d]
//
// What each entry adds, a row and a coefficient, is listed in the order of entries beforehand: all warps of a latent need
// it. A warp reads 32 terms at once, one a lane, puts those whose coefficient is not 0 side by side in shared memory, and
// reads their rows; no barrier is needed. Of a latent with more than `piece` entries the first `piece` are summed where the sum is wanted. Every
// further piece was summed beforehand, by another block, into a row of scratch, and these rows are added in order: so a
// latent that every sample uses keeps no block busy, and the grid shows in no bit. The row of a piece is the number of
// its first entry / piece: first entries of pieces lie at least `piece` apart, so no two have one row.
#pragma once
#include "columns.cuh"
#include "operators.h"

// A divisor that the host knows; dividing by it is a multiplication. Exact where (number + 1) divisor <= 2^64. By 0,
// which only empty batches have, nothing is divided.
class Divisor {
   public:
    explicit Divisor(int divisor) : value(divisor), magic(~uint64_t(0) / larger(divisor, 1)) {}

    __device__ operator int() const { return value; }
    __device__ int64_t quotient(int64_t number) const { return int64_t(__umul64hi(uint64_t(number) + 1, magic)); }

   private:
    int value;
    uint64_t magic;
};

struct alignas(8) Term {
    unsigned row;
    float coefficient;
};

// A batch whose entries are looked up without a division, and the list of their terms.
struct IndexedBatch : Batch {
    Divisor by_k, by_streams;
    int sources;          // terms that an entry is to a decoder row
    Term* encoder_terms;  // [S, count]
    Term* decoder_terms;  // [count, sources]

    IndexedBatch(const Batch& batch, Term* encoder_terms_, Term* decoder_terms_)
        : Batch(batch),
          by_k(k),
          by_streams(streams.count),
          sources(per_stream ? 1 : streams.count),
          encoder_terms(encoder_terms_),
          decoder_terms(decoder_terms_) {}
};

// Sums of the pieces beyond the first of every latent.
struct PieceSums {
    Matrix encoder, decoder;  // [slots, D]
    float* bias;              // [slots, S]
    Divisor piece;            // entries
};

// Of the entry at a position in stream s: a row of x.
__device__ inline Term encoder_term(const IndexedBatch& batch, int s, int64_t position, int64_t row) {
    const int S = batch.streams.count;
    const int64_t n = batch.per_stream ? batch.by_streams.quotient(row) : row;
    if (batch.per_stream && row - n * S != s) return {0, 0};
    const int64_t at = batch.per_stream ? position : position + (n * (S - 1) + s) * batch.k;
    return {unsigned(n), value_at(batch.values, at) > 0 ? value_at(batch.grad_values, at) : 0};
}

// Of the same and one of its sources: a row of grad_recons.
__device__ inline Term decoder_term(const IndexedBatch& batch, int source, int64_t position, int64_t row) {
    const int64_t from = batch.per_stream ? row : row * batch.streams.count + source;
    return {unsigned(from), value_at(batch.values, position + (from - row) * batch.k)};
}

// Rows that are read at once, 64 bytes of a thread; estimated, not measured.
template <class Format>
constexpr int in_flight = 8 / sizeof(typename Format::Word);

// sum += coefficient * centred(row's column) of `count` terms at once, at most in_flight, or of all of those.
template <class Format, bool all, bool whole, class Centred>
__device__ void add_rows(
    float (&sum)[held], float& coefficients, const Kept& kept, const Matrix& matrix, const Columns<whole>& columns,
    const Term* terms, int count, Centred centred) {
    KeptColumns<Format> rows[in_flight<Format>];
    float coefficient[in_flight<Format>];
    if (!all) {  // else registers that are set at times are kept for that all the time
#pragma unroll
        for (int u = 0; u < in_flight<Format>; ++u) rows[u] = {}, coefficient[u] = 0;
    }
#pragma unroll
    for (int u = 0; u < in_flight<Format>; ++u) {
        if (!all && u >= count) break;
        const Term term = terms[u];
        coefficient[u] = term.coefficient;
        rows[u].load(kept, matrix, term.row, columns);
    }
#pragma unroll
    for (int u = 0; u < in_flight<Format>; ++u) {
        if (!all && u >= count) break;
        coefficients = __fadd_rn(coefficients, coefficient[u]);
#pragma unroll
        for (int i = 0; i < held; ++i) sum[i] = __fmaf_rn(coefficient[u], centred(rows[u][i], i), sum[i]);
    }
}

// sum += coefficient * centred(row's column) of terms 0 ... count - 1 in order; returns the sum of coefficients. Called
// by whole warps, each of which has room for 32 terms at `room`.
template <class Format, bool whole, class Centred>
__device__ float add_terms(
    float (&sum)[held], const Matrix& matrix, const Columns<whole>& columns, Term* room, const Term* terms, int count,
    Centred centred) {
    const Kept kept;
    const int lane = threadIdx.x % 32;
    float coefficients = 0;
    for (int first = 0; first < count; first += 32) {
        const Term mine = first + lane < count ? terms[first + lane] : Term{0, 0};
        const unsigned used = __ballot_sync(all_lanes, mine.coefficient != 0);
        __syncwarp();  // all have read the terms before
        if (mine.coefficient != 0) room[__popc(used & ((1u << lane) - 1))] = mine;
        __syncwarp();
        if (whole && !columns.full) continue;
        const int many = __popc(used);
        constexpr int most = in_flight<Format>;
        int i = 0;
#pragma unroll 1
        for (; whole && i + most <= many; i += most)
            add_rows<Format, true>(sum, coefficients, kept, matrix, columns, room + i, most, centred);
#pragma unroll 1
        for (; i < many; i += most)
            add_rows<Format, false>(sum, coefficients, kept, matrix, columns, room + i, many - i, centred);
    }
    return coefficients;
}

// The encoder's gradient in stream s over entries begin ... end; returns that of the latent's bias.
template <class X, bool whole>
__device__ float encoder_sum(
    float (&sum)[held], const IndexedBatch& batch, int s, const Columns<whole>& columns, Term* room,
    const float (&centre)[held], int64_t begin, int64_t end) {
    return add_terms<X>(
        sum, batch.x, columns, room, batch.encoder_terms + s * batch.count + begin, int(end - begin),
        [&](float value, int i) { return __fsub_rn(value, centre[i]); });
}

template <class G, bool whole>
__device__ void decoder_sum(
    float (&sum)[held], const IndexedBatch& batch, const Columns<whole>& columns, Term* room, int64_t begin,
    int64_t end) {
    add_terms<G>(
        sum, batch.grad_recons, columns, room, batch.decoder_terms + begin * batch.sources,
        int(end - begin) * batch.sources, [](float value, int) { return value; });
}

// Adds what the further pieces of entries begin ... end sum up to.
template <bool whole>
__device__ void add_pieces(
    float (&sum)[held], const Matrix& rows, const Divisor& piece, const Columns<whole>& columns, int64_t begin,
    int64_t end) {
    for (int64_t first = begin + piece; first < end; first += piece) {
        float more[held];
        load(more, rows, piece.quotient(first), columns);
#pragma unroll
        for (int i = 0; i < held; ++i) sum[i] = __fadd_rn(sum[i], more[i]);
    }
}

// The gradients of latents' rows, in a thread's columns; `room` is the warp's, for 32 terms.
template <class X, class G>
struct SummedGradients : IndexedBatch {
    PieceSums pieces;
    float* latent_bias;  // [S, L]: written by the way

    __device__ bool has_entries(int64_t l) const { return offsets[l] < offsets[l + 1]; }

    // What all encoder rows have in common.
    template <bool whole>
    __device__ void centre(float (&centre)[held], const Columns<whole>& columns) const {
#pragma unroll
        for (int i = 0; i < held; ++i) centre[i] = i < columns.count ? value_at(pre_bias, columns.begin + i) : 0;
    }

    // Returns the gradient of the latent's bias, in threads that have columns.
    template <bool whole>
    __device__ float encoder(
        float (&sum)[held], int s, const Columns<whole>& columns, Term* room, const float (&centre)[held],
        int64_t l) const {
        const int64_t begin = offsets[l], end = offsets[l + 1];
#pragma unroll
        for (int i = 0; i < held; ++i) sum[i] = 0;
        if (!columns.of_warp) return 0;
        float bias = encoder_sum<X>(sum, *this, s, columns, room, centre, begin, smaller(begin + pieces.piece, end));
        add_pieces(sum, pieces.encoder, pieces.piece, columns, begin, end);
        for (int64_t first = begin + pieces.piece; first < end; first += pieces.piece)
            bias = __fadd_rn(bias, pieces.bias[pieces.piece.quotient(first) * streams.count + s]);
        if (columns.begin == streams.begin[s]) latent_bias[int64_t(s) * L + l] = bias;
        return bias;
    }

    template <bool whole>
    __device__ void decoder(float (&sum)[held], const Columns<whole>& columns, Term* room, int64_t l) const {
        const int64_t begin = offsets[l], end = offsets[l + 1];
#pragma unroll
        for (int i = 0; i < held; ++i) sum[i] = 0;
        if (!columns.of_warp) return;
        decoder_sum<G>(sum, *this, columns, room, begin, smaller(begin + pieces.piece, end));
        add_pieces(sum, pieces.decoder, pieces.piece, columns, begin, end);
    }
};

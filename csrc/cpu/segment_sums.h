// The gradient of one latent's rows: sums over the entries of the latent, samples ascending.
//
// A latent with many entries is summed in pieces of a fixed size, which all threads share beforehand, and the pieces
// are added in order: which thread summed what never shows.
#include "gather.h"

namespace SIMD_LEVEL {

constexpr int64_t piece_entries = 512;

struct Entry {
    int64_t n, s, j;  // s is -1 where all streams share the support
};

template <class T>
class SegmentSums {
    using A = sum_t<T>;

   public:
    // The rows and coefficients of one sum; each task has its own and uses it again and again.
    struct Terms {
        std::vector<const T*> rows;
        std::vector<A> coefficients;

        void clear() { rows.clear(), coefficients.clear(); }
        void add(const T* row, A coefficient) { rows.push_back(row), coefficients.push_back(coefficient); }
    };

    SegmentSums(const Batch& batch, bool encoder, bool decoder, int threads)
        : batch(batch), offsets(batch.offsets.at<const int64_t>(0)), entries(batch.entries.at<const int64_t>(0)) {
        S = batch.values.size[1];
        k = batch.values.size[2];
        shared = batch.entries.size[0] == batch.values.size[0] * k;
        for (int64_t width : batch.d_streams) {
            columns.push_back(D);
            D += width;
        }
        for (int64_t l = 0; l + 1 < batch.offsets.size[0]; ++l) {
            if (offsets[l + 1] - offsets[l] <= piece_entries) continue;
            for (int64_t begin = offsets[l]; begin < offsets[l + 1]; begin += piece_entries)
                pieces.push_back({l, begin, std::min(begin + piece_entries, offsets[l + 1])});
        }
        piece_sums.resize(pieces.size() * (2 * D + S));
        const int64_t streams = columns.size();
        parallel_for(pieces.size() * streams, threads, [&](int64_t task) {
            const int64_t p = task / streams, s = task % streams;
            A* sums = &piece_sums[p * (2 * D + S)];
            Terms terms;
            if (encoder) sums[2 * D + s] = sum_encoder(pieces[p].begin, pieces[p].end, s, terms, sums + columns[s]);
            if (decoder) sum_decoder(pieces[p].begin, pieces[p].end, s, terms, sums + D + columns[s]);
        });
    }

    // grad <- the gradient of W_enc[l] in stream s; returns that of latent_bias[s, l].
    A encoder(int64_t l, int64_t s, Terms& terms, A* grad) const {
        if (offsets[l + 1] - offsets[l] <= piece_entries)
            return sum_encoder(offsets[l], offsets[l + 1], s, terms, grad);
        add_pieces(l, columns[s], width(s), grad);
        A bias;
        add_pieces(l, 2 * D + s, 1, &bias);
        return bias;
    }

    // grad <- the gradient of W_dec[l] in stream s.
    void decoder(int64_t l, int64_t s, Terms& terms, A* grad) const {
        if (offsets[l + 1] - offsets[l] <= piece_entries)
            sum_decoder(offsets[l], offsets[l + 1], s, terms, grad);
        else
            add_pieces(l, D + columns[s], width(s), grad);
    }

    int64_t width(int64_t s) const { return batch.d_streams[s]; }

    std::vector<int64_t> columns;  // where each stream begins
    int64_t D = 0;

   private:
    struct Piece {
        int64_t latent, begin, end;
    };

    Entry entry(int64_t e) const {
        const int64_t row = entries[e] / k, j = entries[e] % k;
        return shared ? Entry{row, -1, j} : Entry{row / S, row % S, j};
    }

    A sum_encoder(int64_t begin, int64_t end, int64_t s, Terms& terms, A* grad) const {
        terms.clear();
        A bias = 0;
        for (int64_t e = begin; e < end; ++e) {
            const Entry at = entry(e);
            if (at.s >= 0 && at.s != s) continue;
            if (!(batch.values.at<const A>(at.n, s)[at.j] > 0)) continue;
            const A grad_z = batch.grad_values.at<const A>(at.n, s)[at.j];
            terms.add(batch.x.at<const T>(at.n) + columns[s], grad_z);
            bias += grad_z;
        }
        const A* coefficients[] = {terms.coefficients.data()};
        const RowList<T> list{terms.rows.data(), int64_t(terms.rows.size()), nullptr};
        combine<1, true>(list, coefficients, width(s), &grad, batch.pre_bias.at<const A>(columns[s]));
        return bias;
    }

    void sum_decoder(int64_t begin, int64_t end, int64_t s, Terms& terms, A* grad) const {
        terms.clear();
        for (int64_t e = begin; e < end; ++e) {
            const Entry at = entry(e);
            for (int64_t source = at.s < 0 ? 0 : at.s; source < (at.s < 0 ? S : at.s + 1); ++source) {
                const A value = batch.values.at<const A>(at.n, source)[at.j];
                if (value != 0) terms.add(batch.grad_recons.at<const T>(at.n, source) + columns[s], value);
            }
        }
        const A* coefficients[] = {terms.coefficients.data()};
        combine<1>(
            RowList<T>{terms.rows.data(), int64_t(terms.rows.size()), nullptr}, coefficients, width(s), &grad);
    }

    void add_pieces(int64_t l, int64_t column, int64_t width, A* grad) const {
        const auto before = [](const Piece& piece, int64_t latent) { return piece.latent < latent; };
        auto piece = std::lower_bound(pieces.begin(), pieces.end(), l, before);
        std::fill_n(grad, width, A(0));
        for (; piece != pieces.end() && piece->latent == l; ++piece) {
            const A* sums = &piece_sums[(piece - pieces.begin()) * (2 * D + S) + column];
            for (int64_t d = 0; d < width; ++d) grad[d] += sums[d];
        }
    }

    const Batch& batch;
    const int64_t *offsets, *entries;
    int64_t S, k;
    bool shared;
    std::vector<Piece> pieces;   // of the latents with many entries, ascending
    std::vector<A> piece_sums;   // [pieces, D of W_enc + D of W_dec + S of latent_bias]
};

}  // namespace SIMD_LEVEL

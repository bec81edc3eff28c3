// The gradients of a run of latents in one stream: sums over the entries of each latent, samples ascending.
//
// What the sums gather, x - pre_bias and the gradient of the reconstructions, is copied once a stream into strips of
// columns that lie together, and a run of latents is summed strip by strip: a strip stays in the second-level cache.
// A latent of many entries is summed beforehand, its strips shared among all threads. Every sum runs over its terms
// in order, so neither the threads nor the runs show in the result.
#include <stdexcept>

#include "gather.h"
#include "scratch.h"

namespace SIMD_LEVEL {

constexpr int64_t many_entries = 1024;

// What is summed for each latent, its rows and their coefficients: count[l] terms from begin(l) on.
template <class A>
struct Terms {
    const int64_t* offsets;
    int64_t an_entry;  // most terms of an entry
    Scratch<uint32_t> rows;
    Scratch<A> coefficients;
    std::vector<uint32_t> count;

    Terms(const int64_t* offsets, int64_t L, int64_t an_entry)
        : offsets(offsets), an_entry(an_entry), rows(begin(L)), coefficients(begin(L)), count(L) {}

    int64_t begin(int64_t l) const { return offsets[l] * an_entry; }

    // A coefficient of 0 leaves no term; no branch, since half of them are.
    void add(int64_t l, int64_t row, A coefficient) {
        const int64_t end = begin(l) + count[l];
        rows[end] = uint32_t(row);
        coefficients[end] = coefficient;
        count[l] += coefficient != 0;
    }
};

// total[d] = sum_i coefficients[i] row_i[d] of rows in cache, for B registers of columns from d on.
template <int B, class List, class A>
INLINE void combine_block(const List& list, const A* coefficients, int64_t d, int64_t n, A* total) {
    constexpr int W = lanes<A>;
    Vec<A> sum[B] = {};
    for (int64_t i = 0; i < list.count; ++i) {
        UNROLL for (int b = 0; b < B; ++b) sum[b] += coefficients[i] * load(list.row(i, d + b * W), n);
    }
    UNROLL for (int b = 0; b < B; ++b) store(total + d + b * W, sum[b], n);
}

// A matrix [rows, width] as strips [width / strip_width, rows, strip_width].
template <class A>
class Strips {
   public:
    Strips(int64_t rows, int64_t most_columns)
        : rows(rows), data((most_columns + strip_width - 1) / strip_width * rows * strip_width) {}

    // row <- source - centre, or source where there is no centre
    template <class T>
    void set(int64_t row, const T* source, const A* centre) const {
        for (int64_t d = 0; d < width; d += lanes<A>) {
            const int64_t n = width - d;
            store(at(row, d), centre ? load(source + d, n) - load(centre + d, n) : load(source + d, n), n);
        }
    }

    // sum[d ...] <- the sum of latent l's terms, in the strip that begins at column d
    void sum(const Terms<A>& terms, int64_t l, int64_t d, A* sum) const {
        struct List {
            const uint32_t* rows;
            int64_t count;
            const A* strip;
            const A* row(int64_t i, int64_t c) const { return strip + rows[i] * strip_width + c; }
        };
        const A* const coefficients = &terms.coefficients[terms.begin(l)];
        const List list{&terms.rows[terms.begin(l)], terms.count[l], at(0, d)};
        constexpr int W = lanes<A>;
        if (d + strip_width <= width) return combine_block<strip_width / W>(list, coefficients, 0, W, sum + d);
        for (int64_t c = 0; c < width - d; c += W) combine_block<1>(list, coefficients, c, width - d - c, sum + d);
    }

    // Brings rows first ... last - 1 of the strip that begins at column d into cache, in one sweep of loads: prefetches
    // would be dropped.
    void fetch(int64_t first, int64_t last, int64_t d) const {
        const A *begin = at(first, d), *end = at(0, d) + last * strip_width;
        for (const A* p = begin; p < end; p += 64 / sizeof(A)) *static_cast<const volatile A*>(p);
    }

    int64_t rows, width = 0;

   private:
    A* at(int64_t row, int64_t d) const {
        return &data[d / strip_width * rows * strip_width + row * strip_width + d % strip_width];
    }

    Scratch<A> data;
};

template <class T>
class SegmentSums {
    using A = sum_t<T>;

   public:
    SegmentSums(const Batch& batch, bool encoder, bool decoder, int threads)
        : L(batch.offsets.size[0] - 1),
          N(batch.values.size[0]),
          S(batch.values.size[1]),
          batch(batch),
          offsets(batch.offsets.at<const int64_t>(0)),
          threads(threads),
          x(encoder ? N : 0, widest(batch.d_streams)),
          grad_recons(decoder ? N * S : 0, widest(batch.d_streams)) {
        const int64_t k = batch.values.size[2], count = batch.entries.size[0];
        const bool shared = count == N * k;
        check(count);
        for (int64_t s = 0; encoder && s < S; ++s) encoder_terms.emplace_back(offsets, L, 1);
        if (decoder) decoder_terms.emplace_back(offsets, L, shared ? S : 1);
        parallel_for((L + 63) / 64, threads, [&](int64_t task) {
            for (int64_t l = task * 64; l < std::min(L, task * 64 + 64); ++l) {
                for (int64_t e = offsets[l]; e < offsets[l + 1]; ++e) {
                    const int64_t position = *batch.entries.at<const int64_t>(e), row = position / k, j = position % k;
                    if (!shared) add_terms(l, row / S, row % S, j);
                    for (int64_t s = 0; shared && s < S; ++s) add_terms(l, row, s, j);
                }
            }
        });
        for (int64_t l = 0; l < L; ++l)
            if (is_long(l)) long_latents.push_back(l);
    }

    // Throws unless every latent's entries are places in the supports.
    void check(int64_t count) const {
        bool right = (count == N * batch.values.size[2] || count == N * S * batch.values.size[2]) && offsets[0] == 0;
        for (int64_t l = 0; l < L; ++l) right &= offsets[l] <= offsets[l + 1];
        if (!right || offsets[L] > count) throw std::out_of_range("offsets must ascend from 0 to at most all entries");
        for (int64_t e = 0; e < offsets[L]; ++e) right &= uint64_t(*batch.entries.at<const int64_t>(e)) < uint64_t(count);
        if (!right) throw std::out_of_range("entries must be places in the supports");
    }

    // Turns to columns offset ... offset + width_ of stream s.
    void enter(int64_t s, int64_t offset, int64_t width_) {
        stream = s;
        width = x.width = grad_recons.width = width_;
        parallel_for((N + 15) / 16, threads, [&](int64_t task) {
            for (int64_t n = task * 16; n < std::min(N, task * 16 + 16); ++n) {
                if (!encoder_terms.empty())
                    x.set(n, batch.x.at<const T>(n) + offset, batch.pre_bias.at<const A>(offset));
                for (int64_t s = 0; s < S && !decoder_terms.empty(); ++s)
                    grad_recons.set(
                        n * S + s, batch.grad_recons.at<const T>(n, s) + offset, static_cast<const A*>(nullptr));
            }
        });
        const int64_t strips = (width + strip_width - 1) / strip_width;
        long_sums.resize(long_latents.size() * 2 * width);
        parallel_for(long_latents.size() * strips, threads, [&](int64_t task) {
            A* sums = &long_sums[task / strips * 2 * width];
            const int64_t l = long_latents[task / strips], d = task % strips * strip_width;
            if (!encoder_terms.empty()) x.sum(encoder_terms[stream], l, d, sums);
            if (!decoder_terms.empty()) grad_recons.sum(decoder_terms[0], l, d, sums + width);
        });
    }

    bool used(int64_t l) const { return offsets[l] < offsets[l + 1]; }

    // The gradient of latent_bias[stream, l].
    A bias(int64_t l) const {
        const Terms<A>& terms = encoder_terms[stream];
        A sum = 0;
        for (int64_t i = 0; i < terms.count[l]; ++i) sum += terms.coefficients[terms.begin(l) + i];
        return sum;
    }

    // grad, rows `stride` apart, <- the gradients of W_enc[first ... last] in this stream.
    void encoder(int64_t first, int64_t last, A* grad, int64_t stride) const {
        sum_run(x, encoder_terms[stream], 0, first, last, grad, stride);
    }

    // grad, rows `stride` apart, <- the gradients of W_dec[first ... last] in this stream.
    void decoder(int64_t first, int64_t last, A* grad, int64_t stride) const {
        sum_run(grad_recons, decoder_terms[0], width, first, last, grad, stride);
    }

    // Latents of a run: many, so that a strip is used often while it is in cache; few, so that threads share the work
    // and the gradients of the run stay in cache.
    int64_t run_latents() const {
        const int64_t used_often = 8 * L / batch.values.size[2], room = run_bytes / (int64_t(sizeof(A)) * width);
        return std::max<int64_t>(1, std::min({used_often, room, L / (3 * threads)}));
    }

    const int64_t L, N, S;

   private:
    static int64_t widest(const Widths& widths) { return *std::max_element(widths.begin(), widths.end()); }

    bool is_long(int64_t l) const { return offsets[l + 1] - offsets[l] > many_entries; }

    void add_terms(int64_t l, int64_t n, int64_t s, int64_t j) {
        const A value = batch.values.at<const A>(n, s)[j];
        if (!encoder_terms.empty()) {
            const A grad_value = batch.grad_values.at<const A>(n, s)[j];
            encoder_terms[s].add(l, n, value > 0 ? grad_value : 0);
        }
        if (!decoder_terms.empty()) decoder_terms[0].add(l, n * S + s, value);
    }

    void sum_run(
        const Strips<A>& strips, const Terms<A>& terms, int64_t long_offset, int64_t first, int64_t last, A* grad,
        int64_t stride) const {
        // a sweep reads a row several times as fast as sums read rows at random; the rows of a latent ascend, and those
        // of the groups of nested dictionaries lie apart
        int64_t low = strips.rows, high = 0;
        for (int64_t l = first; l < last; ++l) {
            if (!terms.count[l]) continue;
            low = std::min<int64_t>(low, terms.rows[terms.begin(l)]);
            high = std::max<int64_t>(high, terms.rows[terms.begin(l) + terms.count[l] - 1] + 1);
        }
        const bool swept = 4 * (terms.begin(last) - terms.begin(first)) > high - low;
        for (int64_t d = 0; d < width; d += strip_width) {
            if (swept && low < high) strips.fetch(low, high, d);
            for (int64_t l = first; l < last; ++l)
                if (!is_long(l)) strips.sum(terms, l, d, grad + (l - first) * stride);
        }
        const auto begin = long_latents.begin();
        for (auto it = std::lower_bound(begin, long_latents.end(), first); it != long_latents.end() && *it < last; ++it)
            std::copy_n(&long_sums[(it - begin) * 2 * width + long_offset], width, grad + (*it - first) * stride);
    }

    const Batch& batch;
    const int64_t* offsets;
    int threads;
    std::vector<Terms<A>> encoder_terms;  // one a stream
    std::vector<Terms<A>> decoder_terms;  // one for all
    std::vector<int64_t> long_latents;

    int64_t stream = 0, width = 0;
    Strips<A> x, grad_recons;
    std::vector<A> long_sums;  // [long_latents, encoder and decoder, width]
};

}  // namespace SIMD_LEVEL

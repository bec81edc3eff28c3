// Which candidates are nearer to a query than its own, for exact ranks of sparse codes. Candidates go in blocks whose
// sums stay in the first-level cache, each with a list of the candidates that fire a latent: a query adds up the lists of
// its latents. The sum of a pair runs over the query's latents in order, so equal candidates have equal sums.
#ifndef SIMD_LEVEL
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "level.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"

constexpr int64_t block_rows = 8192;
constexpr int64_t rows_together = 32;  // queries of a task

// A matrix [rows, L] of few numbers a row.
struct SparseRows {
    const int64_t* offsets;
    const int32_t* latents;
    const float* values;
    int64_t rows;

    SparseRows(const Tensor& offsets_, const Tensor& latents_, const Tensor& values_, int64_t L)
        : offsets(offsets_.at<const int64_t>(0)),
          latents(latents_.at<const int32_t>(0)),
          values(values_.at<const float>(0)),
          rows(offsets_.size[0] - 1) {
        bool ascend = offsets[0] == 0 && offsets[rows] == latents_.size[0], inside = true;
        for (int64_t n = 0; n < rows; ++n) ascend &= offsets[n] <= offsets[n + 1];
        for (int64_t e = 0; e < latents_.size[0]; ++e) inside &= latents[e] >= 0 && latents[e] < L;
        if (!ascend) throw std::out_of_range("count_nearer: offsets must ascend from 0 to the number of entries");
        if (!inside) throw std::out_of_range("count_nearer: latents must lie in 0 ... L - 1");
    }
};

// The candidates of a block by latent. A latent that many fire has a column of all of them instead, which is added in
// whole vectors.
class Lists {
   public:
    struct Column {
        const float* dense;  // [block_rows], or null
        const uint16_t* places;
        const float* values;
        int64_t count;
    };

    explicit Lists(int64_t L) : begins(L + 1), dense(L) {}

    void set(const SparseRows& candidates, int64_t first, int64_t last) {
        const int64_t L = dense.size(), from = candidates.offsets[first], to = candidates.offsets[last];
        std::fill(begins.begin(), begins.end(), 0);
        for (int64_t e = from; e < to; ++e) ++begins[candidates.latents[e] + 1];
        int64_t columns = 0;
        for (int64_t l = 0; l < L; ++l) {
            dense[l] = begins[l + 1] > block_rows / 8 ? columns++ : -1;
            begins[l + 1] += begins[l];
        }
        places.resize(to - from);
        values.resize(to - from);
        full.assign(columns * block_rows, 0.0f);
        next.assign(begins.begin(), begins.end() - 1);
        for (int64_t n = first; n < last; ++n)
            for (int64_t e = candidates.offsets[n]; e < candidates.offsets[n + 1]; ++e) {
                const int32_t l = candidates.latents[e];
                places[next[l]] = uint16_t(n - first);
                values[next[l]++] = candidates.values[e];
                if (dense[l] >= 0) full[dense[l] * block_rows + n - first] += candidates.values[e];
            }
    }

    Column of(int64_t l) const {
        const float* const column = dense[l] < 0 ? nullptr : &full[dense[l] * block_rows];
        return {column, places.data() + begins[l], values.data() + begins[l], begins[l + 1] - begins[l]};
    }

   private:
    std::vector<int64_t> begins, next, dense;  // dense: which column, or -1
    std::vector<uint16_t> places;
    std::vector<float> values, full;
};

#define OPERATOR "count_nearer.cpp"
#include "every_level.h"

static void add_up(float* sums, const SparseRows& queries, int64_t n, const Lists& lists) {
    AT_SIMD_LEVEL(add_up(sums, queries, n, lists))
}

static void compare(float* sums, int64_t count, float above, float from, int64_t& higher, int64_t& equal) {
    AT_SIMD_LEVEL(compare(sums, count, above, from, higher, equal))
}

void count_nearer(
    Tensor own_, Tensor higher_, Tensor equal_, Tensor query_offsets, Tensor query_latents, Tensor query_values,
    Tensor offsets, Tensor latents, Tensor values, Tensor first_, Tensor last_, int64_t L, double tie, int threads) {
    const SparseRows queries(query_offsets, query_latents, query_values, L), candidates(offsets, latents, values, L);
    const int64_t *first = first_.at<const int64_t>(0), *last = last_.at<const int64_t>(0);
    int64_t *higher = higher_.at<int64_t>(0), *equal = equal_.at<int64_t>(0);
    float* own = own_.at<float>(0);
    for (int64_t n = 0; n < queries.rows; ++n) {
        if (first[n] < 0 || first[n] > last[n] || last[n] > candidates.rows)
            throw std::out_of_range("count_nearer: first and last must be of candidates there are, and ascend");
        own[n] = -std::numeric_limits<float>::infinity();
        higher[n] = equal[n] = 0;
    }
    Lists lists(L);
    // task(n, begin, end, sums): query n, the candidates of its own in this block, and its cosines with all of the block
    const auto sweep = [&](bool own_only, auto task) {
        for (int64_t block = 0; block < candidates.rows; block += block_rows) {
            const int64_t end = std::min(block + block_rows, candidates.rows);
            lists.set(candidates, block, end);
            const auto make_sums = [] {
                Scratch<float> sums(block_rows);
                std::fill_n(&sums[0], block_rows, 0.0f);
                return sums;
            };
            parallel_for(
                (queries.rows + rows_together - 1) / rows_together, threads, make_sums, [&](int64_t i, auto& sums) {
                    const int64_t stop = std::min(queries.rows, (i + 1) * rows_together);
                    for (int64_t n = i * rows_together; n < stop; ++n) {
                        const int64_t from = std::max(first[n], block), to = std::min(last[n], end);
                        if (first[n] == last[n] || (own_only && from >= to)) continue;
                        add_up(&sums[0], queries, n, lists);
                        task(n, from - block, std::max(from, to) - block, &sums[0], end - block);
                    }
                });
        }
    };
    sweep(true, [&](int64_t n, int64_t from, int64_t to, float* sums, int64_t count) {
        own[n] = std::max(own[n], *std::max_element(sums + from, sums + to));
        std::fill_n(sums, count, 0.0f);
    });
    sweep(false, [&](int64_t n, int64_t from, int64_t to, float* sums, int64_t count) {
        if (from < to) std::fill(sums + from, sums + to, -std::numeric_limits<float>::infinity());
        compare(sums, count, own[n] + float(tie), own[n] - float(tie), higher[n], equal[n]);
    });
}
#else

namespace SIMD_LEVEL {

inline void add_up(float* sums, const SparseRows& queries, int64_t n, const Lists& lists) {
    for (int64_t e = queries.offsets[n]; e < queries.offsets[n + 1]; ++e) {
        const Lists::Column column = lists.of(queries.latents[e]);
        const float value = queries.values[e];
        if (column.dense) {
            for (int64_t c = 0; c < block_rows; c += lanes<float>)
                store(sums + c, load(sums + c) + value * load(column.dense + c));
        } else {
            for (int64_t i = 0; i < column.count; ++i) sums[column.places[i]] += value * column.values[i];
        }
    }
}

// Counts the sums above `above` and those between it and `from`, and leaves zeros.
inline void compare(float* sums, int64_t count, float above, float from, int64_t& higher, int64_t& equal) {
    Vec<int32_t> over = {}, least = {};
    int64_t c = 0;
    for (; c + lanes<float> <= count; c += lanes<float>) {
        const Vec<float> sum = load(sums + c);
        over += (Vec<int32_t>)(sum > above);  // -1 where it is true
        least += (Vec<int32_t>)(sum >= from);
        store(sums + c, Vec<float>{});
    }
    int64_t n_over = -total<int32_t>(over), n_least = -total<int32_t>(least);
    for (; c < count; ++c) {
        n_over += sums[c] > above;
        n_least += sums[c] >= from;
        sums[c] = 0;
    }
    higher += n_over;
    equal += n_least - n_over;
}

}  // namespace SIMD_LEVEL
#endif

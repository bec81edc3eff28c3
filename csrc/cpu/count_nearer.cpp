// Which candidates are nearest to a query, or nearer than its own, for exact retrieval of sparse codes. Candidates go in
// blocks whose sums stay in the first-level cache, each with a list of the candidates that fire a latent: a query adds up the lists of
// its latents. The sum of a pair runs over the query's latents in order, so equal candidates have equal sums.
#ifndef SIMD_LEVEL
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

#include "level.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"

using namespace std::string_literals;

constexpr int64_t block_rows = 8192;
constexpr int64_t rows_together = 32;  // queries of a task

// A matrix [rows, L] of few numbers a row.
struct SparseRows {
    const int64_t* offsets;
    const int32_t* latents;
    const float* values;
    int64_t rows;

    SparseRows(const char* of, const Tensor& offsets_, const Tensor& latents_, const Tensor& values_, int64_t L)
        : offsets(offsets_.at<const int64_t>(0)),
          latents(latents_.at<const int32_t>(0)),
          values(values_.at<const float>(0)),
          rows(offsets_.size[0] - 1) {
        bool ascend = offsets[0] == 0 && offsets[rows] == latents_.size[0], inside = true;
        for (int64_t n = 0; n < rows; ++n) ascend &= offsets[n] <= offsets[n + 1];
        for (int64_t e = 0; e < latents_.size[0]; ++e) inside &= latents[e] >= 0 && latents[e] < L;
        if (!ascend) throw std::out_of_range(of + ": offsets must ascend from 0 to the number of entries"s);
        if (!inside) throw std::out_of_range(of + ": latents must lie in 0 ... L - 1"s);
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

static void keep_best(float* sums, int64_t count, int64_t block, int64_t* candidates, float* cosines, int64_t top) {
    AT_SIMD_LEVEL(keep_best(sums, count, block, candidates, cosines, top))
}

// task(n, block, sums, count) for each query that is `wanted` with the candidates of a block, of which sums are its
// products; it leaves zeros. Blocks come in order.
template <class Wanted, class Task>
static void sweep(
    const SparseRows& queries, const SparseRows& candidates, int64_t L, int threads, Wanted wanted, Task task) {
    Lists lists(L);
    for (int64_t block = 0; block < candidates.rows; block += block_rows) {
        const int64_t end = std::min(block + block_rows, candidates.rows);
        lists.set(candidates, block, end);
        const auto make_sums = [] {
            Scratch<float> sums(block_rows);
            std::fill_n(&sums[0], block_rows, 0.0f);
            return sums;
        };
        parallel_for((queries.rows + rows_together - 1) / rows_together, threads, make_sums, [&](int64_t i, auto& sums) {
            const int64_t stop = std::min(queries.rows, (i + 1) * rows_together);
            for (int64_t n = i * rows_together; n < stop; ++n) {
                if (!wanted(n, block, end)) continue;
                add_up(&sums[0], queries, n, lists);
                task(n, block, &sums[0], end - block);
            }
        });
    }
}

void count_nearer(
    Tensor own_, Tensor higher_, Tensor equal_, Tensor query_offsets, Tensor query_latents, Tensor query_values,
    Tensor offsets, Tensor latents, Tensor values, Tensor first_, Tensor last_, int64_t L, double tie, int threads) {
    const SparseRows queries("count_nearer", query_offsets, query_latents, query_values, L);
    const SparseRows candidates("count_nearer", offsets, latents, values, L);
    const int64_t *first = first_.at<const int64_t>(0), *last = last_.at<const int64_t>(0);
    int64_t *higher = higher_.at<int64_t>(0), *equal = equal_.at<int64_t>(0);
    float* own = own_.at<float>(0);
    for (int64_t n = 0; n < queries.rows; ++n) {
        if (first[n] < 0 || first[n] > last[n] || last[n] > candidates.rows)
            throw std::out_of_range("count_nearer: first and last must be of candidates there are, and ascend");
        own[n] = -std::numeric_limits<float>::infinity();
        higher[n] = equal[n] = 0;
    }
    const auto begin_of = [&](int64_t n, int64_t block) { return std::max(first[n], block); };
    const auto end_of = [&](int64_t n, int64_t end) { return std::min(last[n], end); };
    sweep(queries, candidates, L, threads,
        [&](int64_t n, int64_t block, int64_t end) { return begin_of(n, block) < end_of(n, end); },
        [&](int64_t n, int64_t block, float* sums, int64_t count) {
            const int64_t from = begin_of(n, block) - block, to = end_of(n, block + count) - block;
            own[n] = std::max(own[n], *std::max_element(sums + from, sums + to));
            std::fill_n(sums, count, 0.0f);
        });
    sweep(queries, candidates, L, threads,
        [&](int64_t n, int64_t, int64_t) { return first[n] < last[n]; },
        [&](int64_t n, int64_t block, float* sums, int64_t count) {
            const int64_t from = begin_of(n, block) - block, to = end_of(n, block + count) - block;
            if (from < to) std::fill(sums + from, sums + to, -std::numeric_limits<float>::infinity());
            compare(sums, count, own[n] + float(tie), own[n] - float(tie), higher[n], equal[n]);
        });
}

void find_nearest(
    Tensor candidates_, Tensor cosines_, Tensor query_offsets, Tensor query_latents, Tensor query_values, Tensor offsets,
    Tensor latents, Tensor values, int64_t L, int threads) {
    const SparseRows queries("find_nearest", query_offsets, query_latents, query_values, L);
    const SparseRows candidates("find_nearest", offsets, latents, values, L);
    const int64_t top = candidates_.size[1];
    int64_t* found = candidates_.at<int64_t>(0);
    float* cosines = cosines_.at<float>(0);
    std::fill_n(found, queries.rows * top, -1);
    std::fill_n(cosines, queries.rows * top, 0.0f);
    if (top == 0) return;
    sweep(queries, candidates, L, threads, [](int64_t, int64_t, int64_t) { return true; },
        [&](int64_t n, int64_t block, float* sums, int64_t count) {
            keep_best(sums, count, block, found + n * top, cosines + n * top, top);
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

// Takes the sums in order, each before what is smaller, and leaves zeros.
inline void keep_best(float* sums, int64_t count, int64_t block, int64_t* candidates, float* cosines, int64_t top) {
    const auto take = [&](int64_t from, int64_t to) {
        for (int64_t c = from; c < to; ++c) {
            if (!(sums[c] > cosines[top - 1])) continue;
            int64_t place = top - 1;
            for (; place > 0 && sums[c] > cosines[place - 1]; --place) {
                candidates[place] = candidates[place - 1];
                cosines[place] = cosines[place - 1];
            }
            candidates[place] = block + c;
            cosines[place] = sums[c];
        }
    };
    constexpr int64_t stretch = 8 * lanes<float>;
    int64_t c = 0;
    for (; c + stretch <= count; c += stretch) {
        Vec<int32_t> over = {};
        UNROLL for (int64_t i = 0; i < stretch; i += lanes<float>)
            over += (Vec<int32_t>)(load(sums + c + i) > cosines[top - 1]);  // -1 where it is true
        if (total<int32_t>(over) != 0) take(c, c + stretch);
    }
    take(c, count);
    std::fill_n(sums, count, 0.0f);
}

}  // namespace SIMD_LEVEL
#endif

// The two inner loops of every sparse operator, over rows of a matrix:
//   combine   sums[s][d] = sum_i coefficients[s][i] row_i[d]; combine_onto: sums += that
//   dots      products[s][i] += sum_d vectors[s][d] row_i[d]
// for S coefficient lists or vectors at once, so that S streams share one read of the rows. Each sum has its own
// register and a fixed order: it does not depend on what else is computed beside it.
#include <algorithm>

namespace SIMD_LEVEL {

constexpr int most_streams = 4;  // S of one call

// Columns of one pass over rows in memory: long enough for the hardware to read a row ahead, few enough that the run's
// columns of many rows stay in the last-level cache. Sums of squares and products are taken a run at a time.
constexpr int64_t run_width = 512;
// Samples of a task, so few that no thread waits long for the last.
constexpr int64_t few_samples = 4;
// How many rows ahead a pass over gathered rows prefetches.
constexpr int64_t soon = 8;

// What an empty slot of a support gathers.
template <class T>
alignas(64) constexpr T zeros[run_width] = {};

// Rows picked by place, `stride` apart: `count` of them, and `empty` slots; `left` in memory until others come.
template <class T>
struct RowList {
    const T* begin;
    int64_t stride;
    const int32_t* places;
    int64_t count, empty, left;
    const T* next_begin;
    const int32_t* next_places;
    int64_t next_left;

    const T* row(int64_t i) const { return at(begin, places[i]); }
    const T* ahead(int64_t i) const {
        i += soon;
        i += i < count ? 0 : empty;
        return i < left ? row(i) : at(next_begin, next_places[std::min(i - left, next_left - 1)]);
    }
    const T* at(const T* first, int32_t place) const { return place < 0 ? zeros<T> : first + place * stride; }
};

// add(d, n) for all columns, n of them at a time, while R rows further on come into cache. Two neighbouring lines of a
// row are asked for together, which memory answers sooner than one at a time.
template <int R, class T, class Add>
INLINE void each_column(const RowList<T>& list, int64_t i, int64_t width, Add add) {
    constexpr int W = lanes<sum_t<T>>, line = 64 / sizeof(T);
    const T* ahead[R];
    UNROLL for (int r = 0; r < R; ++r) ahead[r] = list.ahead(i + r);
    int64_t d = 0;
    for (; d + 2 * line <= width; d += 2 * line) {
        UNROLL for (int e = 0; e < 2 * line; e += W) {
            add(d + e, W);
            UNROLL for (int r = R * e / (2 * line); r < R * (e + W) / (2 * line); ++r) {
                __builtin_prefetch(ahead[r] + d);
                __builtin_prefetch(ahead[r] + d + line);
            }
        }
    }
    for (; d < width; d += W) {
        add(d, width - d);
        UNROLL for (int r = 0; r < R; ++r) __builtin_prefetch(ahead[r] + d);
    }
}

// R rows at a time from end to end, so that each is one stream to the hardware: coefficients stay in registers, sums in
// the first-level cache. The first rows find nothing to add to.
template <int S, int R, bool first, class T, class A>
INLINE void combine_rows(
    const RowList<T>& list, const A* const* coefficients, int64_t i, int64_t width, A* const* sums) {
    Vec<A> coefficient[R][S];
    const T* row[R];
    A* total[S];
    UNROLL for (int s = 0; s < S; ++s) total[s] = sums[s];
    UNROLL for (int r = 0; r < R; ++r) {
        row[r] = list.row(i + r);
        UNROLL for (int s = 0; s < S; ++s) coefficient[r][s] = Vec<A>{} + coefficients[s][i + r];
    }
    each_column<R>(list, i, width, [&](int64_t d, int64_t n) INLINE_LAMBDA {
        UNROLL for (int s = 0; s < S; ++s) {
            Vec<A> sum = {};
            if constexpr (!first) sum = load(total[s] + d, n);
            UNROLL for (int r = 0; r < R; ++r) sum += coefficient[r][s] * load(row[r] + d, n);
            store(total[s] + d, sum, n);
        }
    });
}

template <int S>
constexpr int rows_at_once() {
    constexpr int fitting = (VECTOR_REGISTERS - 1) / S - 1;
    return fitting >= 8 ? 8 : fitting >= 4 ? 4 : 2;
}

// From row i on, R at a time, then half as many.
template <int S, int R = rows_at_once<S>(), class T, class A>
INLINE void combine_onto(
    const RowList<T>& list, const A* const* coefficients, int64_t width, A* const* sums, int64_t i = 0) {
    for (; i + R <= list.count; i += R) combine_rows<S, R, false>(list, coefficients, i, width, sums);
    if constexpr (R > 1) combine_onto<S, R / 2>(list, coefficients, width, sums, i);
}

template <int S, class T, class A>
INLINE void combine(const RowList<T>& list, const A* const* coefficients, int64_t width, A* const* sums) {
    constexpr int R = rows_at_once<S>();
    if (list.count >= R)
        combine_rows<S, R, true>(list, coefficients, 0, width, sums);
    else
        combine_rows<S, 1, true>(list, coefficients, 0, width, sums);
    combine_onto<S>(list, coefficients, width, sums, list.count >= R ? R : 1);
}

template <int S, int J, class T, class A>
INLINE void dots_block(const RowList<T>& list, const A* const* vectors, int64_t width, int64_t i, A* const* products) {
    const T* row[J];
    UNROLL for (int j = 0; j < J; ++j) row[j] = list.row(i + j);
    Vec<A> sum[S][J] = {};
    each_column<J>(list, i, width, [&](int64_t d, int64_t n) INLINE_LAMBDA {
        Vec<A> vector[S];
        UNROLL for (int s = 0; s < S; ++s) vector[s] = load(vectors[s] + d, n);
        UNROLL for (int j = 0; j < J; ++j) {
            Vec<A> values = load(row[j] + d, n);
            KEEP_IN_REGISTER(values);
            UNROLL for (int s = 0; s < S; ++s) sum[s][j] += vector[s] * values;
        }
    });
    UNROLL for (int s = 0; s < S; ++s) {
        UNROLL for (int j = 0; j < J; ++j) products[s][i + j] += total<A>(sum[s][j]);
    }
}

// From row i on, J at a time, then half as many.
template <int S, int J = S == 1 ? 8 : VECTOR_REGISTERS / 8, class T, class A>
INLINE void dots(
    const RowList<T>& list, const A* const* vectors, int64_t width, A* const* products, int64_t i = 0) {
    for (; i + J <= list.count; i += J) dots_block<S, J>(list, vectors, width, i, products);
    if constexpr (J > 1) dots<S, J / 2>(list, vectors, width, products, i);
}

// Calls f with std::integral_constant<int, S> for S = 1 ... most_streams.
template <class F>
INLINE void with_streams(int64_t S, F f) {
    if (S == 1) f(std::integral_constant<int, 1>{});
    if (S == 2) f(std::integral_constant<int, 2>{});
    if (S == 3) f(std::integral_constant<int, 3>{});
    if (S == 4) f(std::integral_constant<int, 4>{});
}

// Samples of a task; and where reading goes on after it: at which of them, at which column.
struct Block {
    int64_t index, first, last, next, next_column;
};

// body(run, block) for all runs of columns of all blocks of `size` samples, a block after the other.
template <class Body>
void each_block(const Widths& d_streams, const Support& support, int64_t size, int threads, Body body) {
    const auto runs = column_runs(d_streams, run_width);
    parallel_for((support.N + size - 1) / size, threads, [&](int64_t i) {
        const int64_t first = i * size, last = std::min(support.N, first + size);
        for (size_t r = 0; r < runs.size(); ++r) {
            const bool more = r + 1 < runs.size();
            body(runs[r], Block{i, first, last, more ? first : last, more ? runs[r + 1].begin : 0});
        }
    });
}

// The same, a run after the other where samples share rows, so that a run's columns stay in cache; a block meets the
// runs in order.
template <class Body>
void each_run(const Widths& d_streams, const Support& support, int64_t L, int64_t size, int threads, Body body) {
    if (support.N * support.k <= L) return each_block(d_streams, support, size, threads, body);
    const auto runs = column_runs(d_streams, run_width);
    const int64_t blocks = (support.N + size - 1) / size;
    std::vector<std::atomic<int64_t>> done(blocks);  // runs of each block
    parallel_for(int64_t(runs.size()) * blocks, threads, [&](int64_t task) {
        const int64_t r = task / blocks, i = task % blocks;
        const int64_t first = i * size, last = std::min(support.N, first + size);
        wait_until([&] { return done[i].load(std::memory_order_acquire) >= r; });
        body(runs[r], Block{i, first, last, last, runs[r].begin});
        done[i].store(r + 1, std::memory_order_release);
    });
}

// The rows of W, cut to the run, that sample n of the block gathers for stream s.
template <class T>
RowList<T> gathered(
    const Tensor& W, const Columns& run, const Block& block, const Support& support, int64_t n, int64_t s) {
    const T* const begin = W.at<const T>(0);
    const int32_t *latents = support.of(n, s), *next = support.of(block.next, 0);
    const int32_t* const end = support.indices + support.entries();
    const int64_t left = support.of(block.last, 0) - latents;
    int64_t count = support.k;
    while (count > 0 && latents[count - 1] < 0) --count;
    return {begin + run.begin, W.stride[0], latents, count, support.k - count, left, begin + block.next_column, next, end - next};
}

// f(streams, count) for groups of these streams that gather the same rows: most_streams where the support is shared,
// else one by one.
template <class F>
void each_group(const std::vector<int64_t>& streams, const Support& support, F f) {
    const int64_t size = support.shared ? most_streams : 1, count = streams.size();
    for (int64_t i = 0; i < count; i += size) f(&streams[i], std::min(size, count - i));
}

inline std::vector<int64_t> every_stream(int64_t S) {
    std::vector<int64_t> streams;
    for (int64_t s = 0; s < S; ++s) streams.push_back(s);
    return streams;
}

}  // namespace SIMD_LEVEL

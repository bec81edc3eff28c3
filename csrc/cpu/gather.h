// The two inner loops of every sparse operator, over rows picked by address:
//   combine   sums[s][d] = sum_i coefficients[s][i] row_i[d]
//   dots      products[s][i] += sum_d vectors[s][d] row_i[d]
// for S coefficient lists or vectors at once, so that S streams share one read of the rows. Each sum has its own
// register and a fixed order: it does not depend on what else is computed beside it.
#include <algorithm>

namespace SIMD_LEVEL {

constexpr int most_streams = 4;  // S of one call

// Rows picked by address, and as many to prefetch meanwhile.
template <class T>
struct RowList {
    const T* const* rows;
    int64_t count;
    const T* const* ahead;

    const T* row(int64_t i, int64_t d) const { return rows[i] + d; }
    void prefetch(int64_t i, int64_t d) const { __builtin_prefetch(ahead[i] + d, 0, 2); }
};

template <int S, int B, bool fetch, class List, class A>
INLINE void combine_block(const List& list, const A* const* coefficients, int64_t d, int64_t n, A* const* sums) {
    constexpr int W = lanes<A>;
    Vec<A> sum[S][B] = {};
    for (int64_t i = 0; i < list.count; ++i) {
        UNROLL for (int b = 0; b < B; ++b) {
            if constexpr (fetch) list.prefetch(i, d + b * W);
            Vec<A> row = load(list.row(i, d + b * W), n);
            KEEP_IN_REGISTER(row);
            UNROLL for (int s = 0; s < S; ++s) sum[s][b] += coefficients[s][i] * row;
        }
    }
    UNROLL for (int s = 0; s < S; ++s) {
        UNROLL for (int b = 0; b < B; ++b) store(sums[s] + d + b * W, sum[s][b], n);
    }
}

template <int S, bool fetch, class List, class A>
INLINE void combine(const List& list, const A* const* coefficients, int64_t width, A* const* sums) {
    constexpr int W = lanes<A>, most = VECTOR_REGISTERS / (S == 1 ? 2 : S == 4 ? 8 : 4);
    int64_t d = 0;
    for (; d + most * W <= width; d += most * W) combine_block<S, most, fetch>(list, coefficients, d, W, sums);
    if constexpr (most > 4)
        for (; d + 4 * W <= width; d += 4 * W) combine_block<S, 4, fetch>(list, coefficients, d, W, sums);
    for (; d < width; d += W) combine_block<S, 1, fetch>(list, coefficients, d, std::min<int64_t>(W, width - d), sums);
}

template <int S, int J, class T, class A>
INLINE void dots_block(const RowList<T>& list, const A* const* vectors, int64_t width, int64_t i, A* const* products) {
    constexpr int W = lanes<A>;
    Vec<A> sum[S][J] = {};
    const auto add = [&](int64_t d, int64_t n) INLINE_LAMBDA {
        Vec<A> vector[S];
        UNROLL for (int s = 0; s < S; ++s) vector[s] = load(vectors[s] + d, n);
        UNROLL for (int j = 0; j < J; ++j) {
            list.prefetch(i + j, d);
            Vec<A> row = load(list.row(i + j, d), n);
            KEEP_IN_REGISTER(row);
            UNROLL for (int s = 0; s < S; ++s) sum[s][j] += vector[s] * row;
        }
    };
    int64_t d = 0;
    for (; d + W <= width; d += W) add(d, W);
    if (d < width) add(d, width - d);
    UNROLL for (int s = 0; s < S; ++s) {
        UNROLL for (int j = 0; j < J; ++j) products[s][i + j] += total<A>(sum[s][j]);
    }
}

template <int S, class T, class A>
INLINE void dots(const RowList<T>& list, const A* const* vectors, int64_t width, A* const* products) {
    constexpr int J = S == 1 ? 8 : VECTOR_REGISTERS / 8;
    int64_t i = 0;
    for (; i + J <= list.count; i += J) dots_block<S, J>(list, vectors, width, i, products);
    for (; i < list.count; ++i) dots_block<S, 1>(list, vectors, width, i, products);
}

// Calls f with std::integral_constant<int, S> for S = 1 ... most_streams.
template <class F>
INLINE void with_streams(int64_t S, F f) {
    if (S == 1) f(std::integral_constant<int, 1>{});
    if (S == 2) f(std::integral_constant<int, 2>{});
    if (S == 3) f(std::integral_constant<int, 3>{});
    if (S == 4) f(std::integral_constant<int, 4>{});
}

// Columns of one pass over the samples: narrow enough that L rows of it tend to stay in the last-level cache.
constexpr int64_t run_width = 256;
// Samples of a task.
constexpr int64_t block_samples = 16;
// How many rows ahead a single pass over gathered rows prefetches.
constexpr int64_t soon = 16;

// body(run, block) for all runs of columns and all blocks of samples; a block meets the runs in order. Where other
// samples use the same rows, run by run, so that the columns of a run stay in cache; else each row in one go.
template <class Body>
void each_run(const std::vector<Columns>& runs, const Support& support, int64_t L, int threads, Body body) {
    const int64_t blocks = (support.N + block_samples - 1) / block_samples;
    if (support.N * support.k <= L) {
        parallel_for(blocks, threads, [&](int64_t block) {
            for (const Columns& run : runs) body(run, block);
        });
        return;
    }
    std::vector<std::atomic<int64_t>> done(blocks);  // runs of each block
    parallel_for(int64_t(runs.size()) * blocks, threads, [&](int64_t task) {
        const int64_t r = task / blocks, block = task % blocks;
        while (done[block].load(std::memory_order_acquire) < r) std::this_thread::yield();
        body(runs[r], block);
        done[block].store(r + 1, std::memory_order_release);
    });
}

struct SampleBlock {
    int64_t first, last;
    SampleBlock(const Support& support, int64_t block)
        : first(block * block_samples), last(std::min(support.N, first + block_samples)) {}
};

// Addresses, at one column, of the rows of W that each sample of a block gathers for stream s.
template <class T>
struct BlockRows : SampleBlock {
    std::vector<const T*> rows;
    int64_t k;

    BlockRows(const Tensor& W, const Support& support, int64_t s, int64_t column, int64_t block)
        : SampleBlock(support, block), k(support.k) {
        rows.reserve((last - first + 1) * k + soon);
        for (int64_t n = first; n < last; ++n)
            for (int64_t j = 0; j < k; ++j) rows.push_back(W.at<const T>(support.of(n, s)[j]) + column);
        rows.resize(rows.capacity(), rows.back());
    }

    RowList<T> of(int64_t n, int64_t distance) const {
        const T* const* mine = rows.data() + (n - first) * k;
        return {mine, k, mine + distance};
    }
};

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

// The two inner loops of every sparse operator, over rows picked by address:
//   combine   sums[s][d] = sum_i coefficients[s][i] (row_i[d] - centre[d])
//   dots      products[s][i] += sum_d vectors[s][d] row_i[d]
// for S coefficient lists or vectors at once, so that S streams share one read of the rows. Each sum has its own
// register and a fixed order: it does not depend on what else is computed beside it.
#include <algorithm>

namespace SIMD_LEVEL {

constexpr int most_streams = 4;  // S of one call

template <class T>
struct RowList {
    const T* const* rows;
    int64_t count;
    const T* const* ahead;  // rows to prefetch meanwhile, as many

    void prefetch(int64_t i, int64_t d) const { __builtin_prefetch(ahead[i] + d, 0, PF); }
};

template <int S, int B, bool centred, class T, class A>
INLINE void combine_block(
    const RowList<T>& list, const A* const* coefficients, const A* centre, int64_t d, int64_t n, A* const* sums) {
    constexpr int W = lanes<A>;
    Vec<A> sum[S][B] = {}, offset[B] = {};
    if constexpr (centred) {
        UNROLL for (int b = 0; b < B; ++b) offset[b] = load(centre + d + b * W, n);
    }
    for (int64_t i = 0; i < list.count; ++i) {
        UNROLL for (int b = 0; b < B; ++b) {
            Vec<A> row = load(list.rows[i] + d + b * W, n);
            if constexpr (centred) row -= offset[b];
            KEEP_IN_REGISTER(row);
            UNROLL for (int s = 0; s < S; ++s) sum[s][b] += coefficients[s][i] * row;
        }
    }
    UNROLL for (int s = 0; s < S; ++s) {
        UNROLL for (int b = 0; b < B; ++b) store(sums[s] + d + b * W, sum[s][b], n);
    }
}

template <int S, bool centred = false, class T, class A>
INLINE void combine(
    const RowList<T>& list, const A* const* coefficients, int64_t width, A* const* sums, const A* centre = nullptr) {
    constexpr int W = lanes<A>, B = VECTOR_REGISTERS / (centred ? 4 : S == 1 ? 2 : S == 4 ? 8 : 4);
    int64_t d = 0;
    for (; d + B * W <= width; d += B * W) combine_block<S, B, centred>(list, coefficients, centre, d, W, sums);
    for (; d < width; d += W)
        combine_block<S, 1, centred>(list, coefficients, centre, d, std::min<int64_t>(W, width - d), sums);
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
            Vec<A> row = load(list.rows[i + j] + d, n);
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
#ifndef RW
#define RW 256
#define PF 2
#endif
constexpr int64_t run_width = RW;
// Samples of a task.
constexpr int64_t block_samples = 16;
// How many rows ahead a single pass over gathered rows prefetches.
constexpr int64_t soon = 16;

inline int64_t sample_blocks(const Support& support) { return (support.N + block_samples - 1) / block_samples; }

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

// Streams that gather the same rows: up to most_streams where the support is shared, else one.
struct StreamGroup {
    int64_t first, count;
};

inline std::vector<StreamGroup> stream_groups(const Support& support) {
    std::vector<StreamGroup> groups;
    const int64_t size = support.shared ? most_streams : 1;
    for (int64_t s = 0; s < support.S; s += size) groups.push_back({s, std::min(size, support.S - s)});
    return groups;
}

}  // namespace SIMD_LEVEL

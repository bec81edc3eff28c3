// decode_loss of nested dictionaries, from one gather of decoder rows: of one dictionary its very sums.
//
// A sample's slots are taken group by group. A prefix's reconstruction is that of the prefix before and what the rows of
// its own group add. What moves a group is the gradient of its prefix and of all that follow: gradients are added up from
// the last prefix down, and go back through the rows of each group while these are in cache.
#ifndef SIMD_LEVEL
#include <algorithm>
#include <stdexcept>

#include "huge_pages.h"
#include "level.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"
// A support whose slots lie group by group, empty ones last.
struct GroupedSupport {
    Support support;
    std::vector<int32_t> latents, slots, ends;  // slots: where each latent was; ends: of each group, [rows, P]
    int64_t P;

    GroupedSupport(const Support& given, const int64_t* sizes, int64_t P, int threads)
        : support(given), latents(given.entries()), slots(given.entries()), P(P) {
        const int64_t k = given.k, rows = k ? given.entries() / k : 0;
        ends.resize(rows * P);
        parallel_for((rows + 63) / 64, threads, [&](int64_t task) {
            std::vector<int32_t> next(P + 1), group(k);
            for (int64_t row = task * 64; row < std::min(rows, task * 64 + 64); ++row) {
                const int32_t* const from = given.indices + row * k;
                std::fill(next.begin(), next.end(), 0);
                for (int64_t j = 0; j < k; ++j) {
                    group[j] = from[j] < 0 ? int32_t(P) : int32_t(std::upper_bound(sizes, sizes + P, from[j]) - sizes);
                    ++next[group[j]];
                }
                for (int64_t g = 0, end = 0; g <= P; ++g) {
                    const int64_t begin = end;
                    end += next[g];
                    next[g] = int32_t(begin);
                    if (g < P) ends[row * P + g] = int32_t(end);
                }
                for (int64_t j = 0; j < k; ++j) {
                    const int64_t place = row * k + next[group[j]]++;
                    latents[place] = from[j];
                    slots[place] = int32_t(j);
                }
            }
        });
        support.indices = latents.data();
    }

    int64_t row(int64_t n, int64_t s) const { return support.shared ? n : n * support.S + s; }
};

#define OPERATOR "nested_decode_loss.cpp"
#include "every_level.h"

void nested_decode_loss(
    Tensor nmse, Tensor grad_recons, Tensor grad_values, Tensor grad_pre_bias, Tensor values, Tensor indices,
    Tensor W_dec, Tensor pre_bias, Tensor target, Tensor scale, std::vector<double> weights, Widths d_streams,
    Tensor sizes, int threads) {
    const int64_t P = sizes.size[0], *const size = sizes.at<const int64_t>(0);
    for (int64_t p = 0; p < P; ++p)
        if (size[p] < (p ? size[p - 1] : 0)) throw std::invalid_argument("sizes must ascend");
    if (P == 0 || size[P - 1] != W_dec.size[0]) throw std::invalid_argument("sizes must end in n_latents");
    if (nmse.size[0] != P * nmse.size[1] || grad_recons.size[0] != P * values.size[0])
        throw std::invalid_argument("nmse and grad_recons must have room for every prefix");
    const GroupedSupport support(Support(indices, d_streams.size(), W_dec.size[0]), size, P, threads);
    with_type(W_dec.item_size, [&](auto type) {
        AT_SIMD_LEVEL(
            nested_decode_loss<decltype(type)>(
                nmse, grad_recons, grad_values, grad_pre_bias, values, support, W_dec, pre_bias, target, scale, weights,
                d_streams, threads))
    });
}
#else
#include "gather.h"

#include "compare.h"

namespace SIMD_LEVEL {

// Those of rows begin ... end - 1.
template <class T>
RowList<T> part(RowList<T> rows, int64_t begin, int64_t end) {
    rows.places += begin;
    rows.left -= begin;
    rows.empty = end < rows.count ? 0 : rows.empty;
    rows.count = end - begin;
    return rows;
}

template <class T>
void nested_decode_loss(
    const Tensor& nmse, const Tensor& grad_recons, const Tensor& grad_values, const Tensor& grad_pre_bias,
    const Tensor& values, const GroupedSupport& grouped, const Tensor& W_dec, const Tensor& pre_bias,
    const Tensor& target, const Tensor& scale, const std::vector<double>& weights, const Widths& d_streams,
    int threads) {
    using A = sum_t<T>;
    const Support& support = grouped.support;
    const int64_t N = support.N, S = support.S, k = support.k, P = grouped.P;
    const int64_t D = W_dec.size[1], blocks = (N + block_samples - 1) / block_samples;
    std::vector<double> errors(N * P * S * S);  // [N, prefix, source, target]
    std::vector<A> grad_sums(blocks * D);       // [blocks of samples, D]
    const bool large = grad_recons.bytes() >= beyond_caches;
    each_block(d_streams, support, block_samples, threads, [&](const Columns& run, const Block& block) {
        const int64_t t = run.stream, width = run.end - run.begin;
        const A* bias = pre_bias.at<const A>(run.begin);
        A* const grad_sum = &grad_sums[block.index * D + run.begin];
        std::vector<int64_t> compared;  // sources
        for (int64_t s = 0; s < S; ++s) {
            const bool skipped = weights[s * S + t] == 0;
            if (!skipped) compared.push_back(s);
            for (int64_t n = block.first; n < block.last; ++n) {
                for (int64_t p = 0; p < P && skipped; ++p)
                    std::fill_n(grad_recons.at<T>(p * N + n, s) + run.begin, width, T{});
                if (run.begin == 0) std::fill_n(grad_values.at<A>(n, s), k, A(0));
            }
        }
        const Scratch<A> buffer(P * most_streams * run_width), own(2 * most_streams * k);
        each_group(compared, support, [&](const int64_t* sources, int64_t count) {
            for (int64_t n = block.first; n < block.last; ++n) {
                const int64_t row = grouped.row(n, sources[0]);
                const int32_t *const slots = &grouped.slots[row * k], *const ends = &grouped.ends[row * P];
                for (int64_t i = 0; i < count; ++i) {
                    const A* const given = values.at<const A>(n, sources[i]);
                    for (int64_t j = 0; j < k; ++j) own[i * k + j] = given[slots[j]];
                    std::fill_n(&own[(most_streams + i) * k], k, A(0));
                }
                const auto rows = gathered<T>(W_dec, run, block, support, n, sources[0]);
                // the rows of a group, the coefficients or products of each source there, its reconstructions
                const auto of_group = [&](int64_t p, int64_t first, auto body) INLINE_LAMBDA {
                    const int64_t begin = p ? ends[p - 1] : 0;
                    A *numbers[most_streams], *recons[most_streams];
                    for (int64_t i = 0; i < count; ++i) {
                        numbers[i] = &own[(first + i) * k + begin];
                        recons[i] = &buffer[(p * most_streams + i) * run_width];
                    }
                    body(part(rows, begin, ends[p]), numbers, recons);
                };
                for (int64_t p = 0; p < P; ++p)
                    of_group(p, 0, [&](const RowList<T>& list, A** coefficients, A** recons) INLINE_LAMBDA {
                        for (int64_t i = 0; i < count; ++i) {
                            if (p) std::copy_n(recons[i] - most_streams * run_width, width, recons[i]);
                            if (!p && !list.count) std::fill_n(recons[i], width, A(0));
                        }
                        with_streams(count, [&](auto streams) {
                            if (p) return combine_onto<streams>(list, coefficients, width, recons);
                            if (list.count) combine<streams>(list, coefficients, width, recons);
                        });
                    });
                for (int64_t p = P; p-- > 0;)
                    for (int64_t i = 0; i < count; ++i) {
                        const int64_t s = sources[i];
                        A* const recon = &buffer[(p * most_streams + i) * run_width];
                        const A factor = A(2 * weights[s * S + t] / double(P)) * scale.at<const A>(n)[t];
                        const T* const goal = target.at<const T>(n) + run.begin;
                        T* const grad = grad_recons.at<T>(p * N + n, s) + run.begin;
                        A* const sum = p ? nullptr : grad_sum;
                        double& error = errors[((n * P + p) * S + s) * S + t];
                        if (p + 1 < P)
                            error += compare<true, T, A>(
                                recon, bias, goal, factor, recon + most_streams * run_width, grad, sum, width, large);
                        else
                            error += compare<false, T, A>(recon, bias, goal, factor, nullptr, grad, sum, width, large);
                    }
                for (int64_t p = 0; p < P; ++p)
                    of_group(p, most_streams, [&](const RowList<T>& list, A** products, A** gradients) INLINE_LAMBDA {
                        with_streams(count, [&](auto streams) { dots<streams>(list, gradients, width, products); });
                    });
                for (int64_t i = 0; i < count; ++i) {
                    A* const products = grad_values.at<A>(n, sources[i]);
                    for (int64_t j = 0; j < k; ++j) products[slots[j]] += own[(most_streams + i) * k + j];
                }
            }
        });
        finish_past_caches();
    });
    for (int64_t p = 0; p < P; ++p)
        for (int64_t s = 0; s < S; ++s)
            for (int64_t t = 0; t < S; ++t) {
                double sum = 0;
                for (int64_t n = 0; n < N; ++n)
                    if (weights[s * S + t] != 0)
                        sum += double(scale.at<const A>(n)[t]) * errors[((n * P + p) * S + s) * S + t];
                nmse.at<A>(p * S + s)[t] = A(sum);
            }
    for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += grad_sums[b * D + d];
        grad_pre_bias.at<A>(0)[d] = A(sum);
    }
}

}  // namespace SIMD_LEVEL
#endif

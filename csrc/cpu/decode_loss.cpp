// Decode, squared errors, their gradient, and that gradient back to the values, from one gather of decoder rows.
//
// A run of one target stream's columns at a time over a few samples a task: the k rows of a sample, cut to the run, are
// read once for all sources and are still in cache when the gradient goes back through them. Squared errors are summed
// in vector lanes over a run, then in float64 over runs and samples, in order; so is the gradient, over blocks of
// samples.
#ifndef SIMD_LEVEL
#include "huge_pages.h"
#include "level.h"
#include "operators.h"
#include "parallel.h"
#include "scratch.h"
#define OPERATOR "decode_loss.cpp"
#include "every_level.h"

void decode_loss(
    Tensor nmse, Tensor grad_recons, Tensor grad_values, Tensor grad_pre_bias, Tensor values, Tensor indices,
    Tensor W_dec, Tensor pre_bias, Tensor target, Tensor scale, std::vector<double> weights, Widths d_streams,
    int threads) {
    const Support support(indices, d_streams.size(), W_dec.size[0]);
    with_type(W_dec.item_size, [&](auto type) {
        AT_SIMD_LEVEL(
            decode_loss<decltype(type)>(
                nmse, grad_recons, grad_values, grad_pre_bias, values, support, W_dec, pre_bias, target, scale, weights,
                d_streams, threads))
    });
}
#else
#include "gather.h"

#include "compare.h"

namespace SIMD_LEVEL {

template <class T>
void decode_loss(
    const Tensor& nmse, const Tensor& grad_recons, const Tensor& grad_values, const Tensor& grad_pre_bias,
    const Tensor& values, const Support& support, const Tensor& W_dec, const Tensor& pre_bias, const Tensor& target,
    const Tensor& scale, const std::vector<double>& weights, const Widths& d_streams, int threads) {
    using A = sum_t<T>;
    const int64_t N = support.N, S = support.S, k = support.k;
    const int64_t D = W_dec.size[1], blocks = (N + block_samples - 1) / block_samples;
    std::vector<double> errors(N * S * S);  // [N, source, target]
    std::vector<A> grad_sums(blocks * D);   // [blocks of samples, D]
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
                if (skipped) std::fill_n(grad_recons.at<T>(n, s) + run.begin, width, T{});
                if (run.begin == 0) std::fill_n(grad_values.at<A>(n, s), k, A(0));
            }
        }
        each_group(compared, support, [&](const int64_t* sources, int64_t count) {
            alignas(64) A buffer[most_streams][run_width];
            for (int64_t n = block.first; n < block.last; ++n) {
                const A* coefficients[most_streams];
                A *recons[most_streams], *products[most_streams];
                for (int64_t i = 0; i < count; ++i) {
                    coefficients[i] = values.at<const A>(n, sources[i]);
                    products[i] = grad_values.at<A>(n, sources[i]);
                    recons[i] = buffer[i];
                }
                const auto rows = gathered<T>(W_dec, run, block, support, n, sources[0]);
                with_streams(count, [&](auto streams) { combine<streams>(rows, coefficients, width, recons); });
                for (int64_t i = 0; i < count; ++i) {
                    const int64_t s = sources[i];
                    const A factor = A(2 * weights[s * S + t]) * scale.at<const A>(n)[t];
                    errors[(n * S + s) * S + t] += compare<false, T, A>(
                        recons[i], bias, target.at<const T>(n) + run.begin, factor, nullptr,
                        grad_recons.at<T>(n, s) + run.begin, grad_sum, width, large);
                }
                with_streams(count, [&](auto streams) { dots<streams>(rows, recons, width, products); });
            }
        });
        finish_past_caches();
    });
    for (int64_t s = 0; s < S; ++s)
        for (int64_t t = 0; t < S; ++t) {
            double sum = 0;
            for (int64_t n = 0; n < N; ++n)
                if (weights[s * S + t] != 0) sum += double(scale.at<const A>(n)[t]) * errors[(n * S + s) * S + t];
            nmse.at<A>(s)[t] = A(sum);
        }
    for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += grad_sums[b * D + d];
        grad_pre_bias.at<A>(0)[d] = A(sum);
    }
}

}  // namespace SIMD_LEVEL
#endif

// Each stream's own pre-activations at the latents of the support.
//
// A run of columns at a time over a few samples a task. Sums over a run in vector lanes, over runs in order.
#ifndef SIMD_LEVEL
#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "support_values.cpp"
#include "every_level.h"

void support_values(
    Tensor values, Tensor x, Tensor W_enc, Tensor pre_bias, Tensor latent_bias, Tensor indices, Widths d_streams,
    int threads) {
    const Support support(indices, d_streams.size(), W_enc.size[0]);
    with_type(W_enc.item_size, [&](auto type) {
        AT_SIMD_LEVEL(
            support_values<decltype(type)>(values, x, W_enc, pre_bias, latent_bias, support, d_streams, threads))
    });
}

void support_values_grad_x(
    Tensor grad_x, Tensor grad_values, Tensor values, Tensor indices, Tensor W_enc, Widths d_streams, int threads) {
    const Support support(indices, d_streams.size(), W_enc.size[0]);
    with_type(W_enc.item_size, [&](auto type) {
        AT_SIMD_LEVEL(
            support_values_grad_x<decltype(type)>(grad_x, grad_values, values, support, W_enc, d_streams, threads))
    });
}
#else
#include "gather.h"

namespace SIMD_LEVEL {

template <class T>
void support_values(
    const Tensor& values, const Tensor& x, const Tensor& W_enc, const Tensor& pre_bias, const Tensor& latent_bias,
    const Support& support, const Widths& d_streams, int threads) {
    using A = sum_t<T>;
    each_run(d_streams, support, W_enc.size[0], few_samples, threads, [&](const auto& run, const auto& block) {
        const int64_t s = run.stream, width = run.end - run.begin;
        const A* centre = pre_bias.at<const A>(run.begin);
        const A* bias = latent_bias.at<const A>(s);
        for (int64_t n = block.first; n < block.last; ++n) {
            alignas(64) A centred[run_width];
            const T* sample = x.at<const T>(n) + run.begin;
            for (int64_t d = 0; d < width; d += lanes<A>)
                store(centred + d, load(sample + d, width - d) - load(centre + d, width - d), width - d);
            const A* vectors[] = {centred};
            A* products[] = {values.at<A>(n, s)};
            if (run.first) std::fill_n(products[0], support.k, A(0));
            dots<1>(gathered<T>(W_enc, run, block, support, n, s), vectors, width, products);
            if (!run.last) continue;
            for (int64_t j = 0; j < support.k; ++j) {
                A& value = products[0][j];
                const int32_t latent = support.of(n, s)[j];
                value = latent < 0 ? 0 : value + bias[latent];
                if (value <= 0) value = 0;  // NaN stays
            }
        }
    });
}

template <class T>
void support_values_grad_x(
    const Tensor& grad_x, const Tensor& grad_values, const Tensor& values, const Support& support, const Tensor& W_enc,
    const Widths& d_streams, int threads) {
    using A = sum_t<T>;
    each_run(d_streams, support, W_enc.size[0], few_samples, threads, [&](const auto& run, const auto& block) {
        const int64_t s = run.stream, width = run.end - run.begin;
        std::vector<A> grad_z(support.k);
        for (int64_t n = block.first; n < block.last; ++n) {
            for (int64_t j = 0; j < support.k; ++j)
                grad_z[j] = values.at<const A>(n, s)[j] > 0 ? grad_values.at<const A>(n, s)[j] : 0;
            alignas(64) A sum[run_width];
            A* sums[] = {sum};
            const A* coefficients[] = {grad_z.data()};
            combine<1>(gathered<T>(W_enc, run, block, support, n, s), coefficients, width, sums);
            T* grad = grad_x.at<T>(n) + run.begin;
            for (int64_t d = 0; d < width; d += lanes<A>) store(grad + d, load(sum + d, width - d), width - d);
        }
    });
}

}  // namespace SIMD_LEVEL
#endif

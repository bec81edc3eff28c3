// All S * S reconstructions from one gather of decoder rows, and the gradient that goes back through it.
//
// A run of columns at a time over a few samples a task. A reconstruction is summed over the support in order.
#ifndef SIMD_LEVEL
#include "huge_pages.h"
#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "sparse_decode.cpp"
#include "every_level.h"

void sparse_decode(Tensor recons, Tensor values, Tensor indices, Tensor W_dec, Tensor pre_bias, int threads) {
    const Support support(indices, values.size[1], W_dec.size[0]);
    with_type(W_dec.item_size, [&](auto type) {
        with_either<sum_t<decltype(type)>>(Tensors<1>{recons}, [&](auto stored) {
            AT_SIMD_LEVEL(
                sparse_decode<decltype(type), decltype(stored)>(recons, values, support, W_dec, pre_bias, threads))
        });
    });
}

void sparse_decode_grad_values(Tensor grad_values, Tensor grad_recons, Tensor indices, Tensor W_dec, int threads) {
    const Support support(indices, grad_recons.size[1], W_dec.size[0]);
    with_type(W_dec.item_size, [&](auto type) {
        AT_SIMD_LEVEL(sparse_decode_grad_values<decltype(type)>(grad_values, grad_recons, support, W_dec, threads))
    });
}
#else
#include "gather.h"

namespace SIMD_LEVEL {

// R is what reconstructions are stored in.
template <class T, class R>
void sparse_decode(
    const Tensor& recons, const Tensor& values, const Support& support, const Tensor& W_dec, const Tensor& pre_bias,
    int threads) {
    using A = sum_t<T>;
    const bool large = recons.bytes() >= beyond_caches;
    each_block({W_dec.size[1]}, support, few_samples, threads, [&](const auto& run, const auto& block) {
        const int64_t width = run.end - run.begin;
        const A* bias = pre_bias.at<const A>(run.begin);
        each_group(every_stream(support.S), support, [&](const int64_t* sources, int64_t count) {
            alignas(64) A buffer[most_streams][run_width];
            for (int64_t n = block.first; n < block.last; ++n) {
                const A* coefficients[most_streams];
                A* sums[most_streams];
                for (int64_t i = 0; i < count; ++i) {
                    coefficients[i] = values.at<const A>(n, sources[i]);
                    sums[i] = buffer[i];
                }
                const auto rows = gathered<T>(W_dec, run, block, support, n, sources[0]);
                with_streams(count, [&](auto S) { combine<S>(rows, coefficients, width, sums); });
                for (int64_t i = 0; i < count; ++i) {
                    R* recon = recons.at<R>(n, sources[i]) + run.begin;
                    const bool past = large && aligned(recon);
                    for (int64_t d = 0; d < width; d += lanes<A>)
                        store(recon + d, load(sums[i] + d, width - d) + load(bias + d, width - d), width - d, past);
                }
            }
        });
        finish_past_caches();
    });
}

template <class T>
void sparse_decode_grad_values(
    const Tensor& grad_values, const Tensor& grad_recons, const Support& support, const Tensor& W_dec, int threads) {
    using A = sum_t<T>;
    each_run({W_dec.size[1]}, support, W_dec.size[0], few_samples, threads, [&](const auto& run, const auto& block) {
        const int64_t width = run.end - run.begin;
        each_group(every_stream(support.S), support, [&](const int64_t* sources, int64_t count) {
            alignas(64) A buffer[most_streams][run_width];
            for (int64_t n = block.first; n < block.last; ++n) {
                const A* vectors[most_streams];
                A* products[most_streams];
                for (int64_t i = 0; i < count; ++i) {
                    const T* grad = grad_recons.at<const T>(n, sources[i]) + run.begin;
                    for (int64_t d = 0; d < width; d += lanes<A>)
                        store(buffer[i] + d, load(grad + d, width - d), width - d);
                    vectors[i] = buffer[i];
                    products[i] = grad_values.at<A>(n, sources[i]);
                    if (run.first) std::fill_n(products[i], support.k, A(0));
                }
                const auto rows = gathered<T>(W_dec, run, block, support, n, sources[0]);
                with_streams(count, [&](auto S) { dots<S>(rows, vectors, width, products); });
            }
        });
    });
}

}  // namespace SIMD_LEVEL
#endif

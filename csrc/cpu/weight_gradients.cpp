// The gradients of both weight matrices and of the latent bias, materialised: each row written once, by one task.
#ifndef SIMD_LEVEL
#include <stdexcept>

#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "weight_gradients.cpp"
#include "every_level.h"

void weight_gradients(Tensor grad_W_enc, Tensor grad_W_dec, Tensor grad_latent_bias, Batch batch, int threads) {
    const bool has_encoder = batch.x.ndim && batch.pre_bias.ndim && batch.grad_values.ndim && grad_latent_bias.ndim &&
                             int64_t(batch.d_streams.size()) == batch.values.size[1];
    if ((grad_W_enc.data && !has_encoder) || (grad_W_dec.data && !batch.grad_recons.ndim))
        throw std::invalid_argument("weight_gradients: batch must hold what the gradients are made of");
    with_type((grad_W_enc.data ? batch.x : batch.grad_recons).item_size, [&](auto type) {
        AT_SIMD_LEVEL(weight_gradients<decltype(type)>(grad_W_enc, grad_W_dec, grad_latent_bias, batch, threads))
    });
}
#else
#include "segment_sums.h"

namespace SIMD_LEVEL {

template <class T>
void weight_gradients(
    const Tensor& grad_W_enc, const Tensor& grad_W_dec, const Tensor& grad_latent_bias, const Batch& batch,
    int threads) {
    using A = sum_t<T>;
    SegmentSums<T> sums(batch, grad_W_enc.data, grad_W_dec.data, threads);
    for (const Columns& run : column_runs(batch.d_streams, whole_streams)) {
        sums.enter(run.stream, run.begin, run.end - run.begin);
        const int64_t size = sums.run_latents();
        parallel_for((sums.L + size - 1) / size, threads, [&](int64_t task) {
            const int64_t first = task * size, last = std::min(sums.L, first + size);
            if (grad_W_enc.data) {
                sums.encoder(first, last, grad_W_enc.at<A>(first) + run.begin, grad_W_enc.stride[0]);
                for (int64_t l = first; l < last; ++l) grad_latent_bias.at<A>(run.stream)[l] = sums.bias(l);
            }
            if (grad_W_dec.data)
                sums.decoder(first, last, grad_W_dec.at<A>(first) + run.begin, grad_W_dec.stride[0]);
        });
    }
}

}  // namespace SIMD_LEVEL
#endif

// The gradients of both weight matrices and of the latent bias, materialised: each row written once, by one task.
#ifndef SIMD_LEVEL
#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "weight_gradients.cpp"
#include "every_level.h"

void weight_gradients(Tensor grad_W_enc, Tensor grad_W_dec, Tensor grad_latent_bias, Batch batch, int threads) {
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
    const SegmentSums<T> sums(batch, grad_W_enc.data, grad_W_dec.data, threads);
    const int64_t L = batch.offsets.size[0] - 1, size = 16, blocks = (L + size - 1) / size;
    parallel_for(blocks * sums.columns.size(), threads, [&](int64_t task) {
        const int64_t s = task / blocks, first = task % blocks * size;
        typename SegmentSums<T>::Terms terms;
        for (int64_t l = first; l < std::min(L, first + size); ++l) {
            if (grad_W_enc.data)
                grad_latent_bias.at<A>(s)[l] = sums.encoder(l, s, terms, grad_W_enc.at<A>(l) + sums.columns[s]);
            if (grad_W_dec.data) sums.decoder(l, s, terms, grad_W_dec.at<A>(l) + sums.columns[s]);
        }
    });
}

}  // namespace SIMD_LEVEL
#endif

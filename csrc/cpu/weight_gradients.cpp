// The gradients of both weight matrices and of the latent bias, materialised: each row written once, by one task. Or
// the squares of their norms alone, from rows that stay in cache.
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

void gradient_squares(Tensor squares, Tensor grad_latent_bias, Batch batch, int threads) {
    const bool has_encoder = batch.x.ndim && batch.pre_bias.ndim && batch.grad_values.ndim &&
                             int64_t(batch.d_streams.size()) == batch.values.size[1];
    if ((grad_latent_bias.ndim && !has_encoder) || (!grad_latent_bias.ndim && !batch.grad_recons.ndim))
        throw std::invalid_argument("gradient_squares: batch must hold what the gradients are made of");
    with_type((grad_latent_bias.ndim ? batch.x : batch.grad_recons).item_size, [&](auto type) {
        AT_SIMD_LEVEL(gradient_squares<decltype(type)>(squares, grad_latent_bias, batch, threads))
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

template <class A>
double squared_norm(const A* row, int64_t width) {
    Vec<A> sums = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const Vec<A> part = load(row + d, width - d);
        sums += part * part;
    }
    double total = 0;
    for (int i = 0; i < lanes<A>; ++i) total += sums[i];
    return total;
}

// squares[l] += ||gradient of latent l||^2 over the streams, of each matrix that the batch says something of.
template <class T>
void gradient_squares(const Tensor& squares, const Tensor& grad_latent_bias, const Batch& batch, int threads) {
    using A = sum_t<T>;
    const bool encoder = grad_latent_bias.ndim, decoder = batch.grad_recons.ndim;
    SegmentSums<T> sums(batch, encoder, decoder, threads);
    for (const Columns& run : column_runs(batch.d_streams, whole_streams)) {
        const int64_t width = run.end - run.begin;
        sums.enter(run.stream, run.begin, width);
        const int64_t size = sums.run_latents();
        const auto make_room = [&] { return Scratch<A>(size * width); };
        parallel_for((sums.L + size - 1) / size, threads, make_room, [&](int64_t task, const Scratch<A>& grads) {
            const int64_t first = task * size, last = std::min(sums.L, first + size);
            const auto add = [&] {
                for (int64_t l = first; l < last; ++l)
                    *squares.at<double>(l) += squared_norm(&grads[(l - first) * width], width);
            };
            if (encoder) {
                sums.encoder(first, last, &grads[0], width);
                for (int64_t l = first; l < last; ++l) grad_latent_bias.at<A>(run.stream)[l] = sums.bias(l);
                add();
            }
            if (decoder) {
                sums.decoder(first, last, &grads[0], width);
                add();
            }
        });
    }
}

}  // namespace SIMD_LEVEL
#endif

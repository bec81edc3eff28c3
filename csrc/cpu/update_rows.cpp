// A whole training step of every latent's rows in one pass: gradient, projection, Adam, unit norm.
//
// One stream after the other, so that what its latents gather (x and the gradient of the reconstructions, cut to the
// stream) stays in cache; a task is a few latents of one stream. Gradients live in a buffer of one row. The encoder's
// part of the pre-bias gradient is summed over the latents of a task, then over tasks in order.
#ifndef SIMD_LEVEL
#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "update_rows.cpp"
#include "every_level.h"

void update_rows(
    Tensor grad_latent_bias, Tensor grad_pre_bias, Tensor W_enc, Tensor W_dec, std::vector<Tensor> moments, Batch batch,
    AdamStep adam, ExtraRows extra, int threads) {
    with_type(batch.x.item_size, [&](auto type) {
        AT_SIMD_LEVEL(
            update_rows<decltype(type)>(
                grad_latent_bias, grad_pre_bias, W_enc, W_dec, moments, batch, adam, extra, threads))
    });
}
#else
#include "adam.h"
#include "segment_sums.h"

namespace SIMD_LEVEL {

// pre_bias -= grad_bias w, then Adam on w.
template <class A>
void update_encoder(A* w, A* m, A* v, const A* grad, A grad_bias, A* pre_bias, int64_t width, const Adam<A>& adam) {
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        const Vec<A> row = load(w + d, n);
        store(pre_bias + d, load(pre_bias + d, n) - grad_bias * row, n);
        store(w + d, adam(row, load(grad + d, n), m + d, v + d, n), n);
    }
}

// Adam on w along the sphere: what the gradient has along w is taken out before, and w has unit norm after.
template <class A>
void update_decoder(A* w, A* m, A* v, A* grad, int64_t width, const Adam<A>& adam) {
    Vec<A> gw = {}, ww = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const Vec<A> row = load(w + d, width - d);
        gw += load(grad + d, width - d) * row;
        ww += row * row;
    }
    const A along = total<A>(gw) / std::max(total<A>(ww), std::numeric_limits<A>::min());
    Vec<A> squares = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        const Vec<A> row = load(w + d, n);
        const Vec<A> moved = adam(row, load(grad + d, n) - along * row, m + d, v + d, n);
        squares += moved * moved;
        store(w + d, moved, n);
    }
    const A norm = std::max(std::sqrt(total<A>(squares)), std::numeric_limits<A>::min());
    for (int64_t d = 0; d < width; d += lanes<A>) store(w + d, load(w + d, width - d) / norm, width - d);
}

template <class A>
void add(A* sum, const A* term, int64_t width) {
    for (int64_t d = 0; d < width; ++d) sum[d] += term[d];
}

template <class T>
void update_rows(
    const Tensor& grad_latent_bias, const Tensor& grad_pre_bias, const Tensor& W_enc, const Tensor& W_dec,
    const std::vector<Tensor>& moments, const Batch& batch, const AdamStep& step, const ExtraRows& extra, int threads) {
    using A = sum_t<T>;
    const SegmentSums<T> sums(batch, true, true, threads);
    const Adam<A> adam(step);
    const int64_t L = batch.offsets.size[0] - 1, D = sums.D;
    std::vector<int64_t> extra_row(L, -1);
    for (int64_t r = 0; r < extra.latents.size[0]; ++r) extra_row[extra.latents.at<const int64_t>(0)[r]] = r;

    const int64_t size = std::max<int64_t>(16, (L + 255) / 256), blocks = (L + size - 1) / size;
    std::vector<A> pre_bias_parts(blocks * D);
    parallel_for(blocks * sums.columns.size(), threads, [&](int64_t task) {
        const int64_t s = task / blocks, block = task % blocks, width = sums.width(s), column = sums.columns[s];
        typename SegmentSums<T>::Terms terms;
        std::vector<A> grad(width);
        for (int64_t l = block * size; l < std::min(L, (block + 1) * size); ++l) {
            const int64_t r = extra_row[l];
            const auto row = [&](const Tensor& tensor) { return tensor.at<A>(l) + column; };

            A grad_bias = sums.encoder(l, s, terms, grad.data());
            if (r >= 0) {
                grad_bias += extra.grad_latent_bias.at<const A>(s)[r];
                add(grad.data(), extra.grad_W_enc.at<const A>(r) + column, width);
            }
            grad_latent_bias.at<A>(s)[l] = grad_bias;
            update_encoder(
                row(W_enc), row(moments[0]), row(moments[1]), grad.data(), grad_bias,
                &pre_bias_parts[block * D + column], width, adam);

            sums.decoder(l, s, terms, grad.data());
            if (r >= 0) add(grad.data(), extra.grad_W_dec.at<const A>(r) + column, width);
            update_decoder(row(W_dec), row(moments[2]), row(moments[3]), grad.data(), width, adam);
        }
    });
    for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t block = 0; block < blocks; ++block) sum += pre_bias_parts[block * D + d];
        grad_pre_bias.at<A>(0)[d] = A(sum);
    }
}

}  // namespace SIMD_LEVEL
#endif

// A whole training step of every latent's rows in one pass: gradient, projection, Adam, unit norm.
//
// A task is a run of latents in one stream: it sums their gradients into a buffer that stays in cache, then moves the
// rows, encoder first, while the next row is fetched. The encoder's part of the pre-bias gradient is summed over
// fixed blocks of latents, then over blocks in order.
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

// Columns of rows l and of the row after, which is fetched meanwhile.
template <class A>
struct Row {
    A* data;
    int64_t next;  // distance to the next row

    Row(const Tensor& tensor, int64_t l, int64_t column, bool is_last)
        : data(tensor.at<A>(l) + column), next(is_last ? 0 : tensor.stride[0]) {}
    A* operator+(int64_t d) const { return data + d; }
    void prefetch(int64_t d) const { __builtin_prefetch(data + next + d, 1, 2); }
};

// pre_bias -= grad_bias w, then Adam on w.
template <class A>
void update_encoder(
    Row<A> w, Row<A> m, Row<A> v, const A* grad, A grad_bias, A* pre_bias, int64_t width, const Adam<A>& adam) {
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        for (const Row<A>& row : {w, m, v}) row.prefetch(d);
        const Vec<A> old = load(w + d, n);
        store(pre_bias + d, load(pre_bias + d, n) - grad_bias * old, n);
        store(w + d, adam(old, load(grad + d, n), m + d, v + d, n), n);
    }
}

// Adam on w along the sphere: what the gradient has along w is taken out before, and w has unit norm after.
template <class A>
void update_decoder(Row<A> w, Row<A> m, Row<A> v, const A* grad, int64_t width, const Adam<A>& adam) {
    Vec<A> gw = {}, ww = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        w.prefetch(d);
        const Vec<A> old = load(w + d, width - d);
        gw += load(grad + d, width - d) * old;
        ww += old * old;
    }
    const A along = total<A>(gw) / std::max(total<A>(ww), std::numeric_limits<A>::min());
    Vec<A> squares = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        for (const Row<A>& row : {m, v}) row.prefetch(d);
        const Vec<A> old = load(w + d, n);
        const Vec<A> moved = adam(old, load(grad + d, n) - along * old, m + d, v + d, n);
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
    SegmentSums<T> sums(batch, true, true, threads);
    const Adam<A> adam(step);
    const int64_t L = sums.L, D = grad_pre_bias.size[0];
    std::vector<int64_t> extra_row(L, -1);
    for (int64_t r = 0; r < extra.latents.size[0]; ++r) extra_row[extra.latents.at<const int64_t>(0)[r]] = r;

    // the pre-bias gradient is summed in blocks of latents that no thread count changes; a task is some whole blocks
    const int64_t block = std::max<int64_t>(16, (L + 255) / 256), blocks = (L + block - 1) / block;
    std::vector<A> pre_bias_parts(blocks * D);
    for (const Columns& run : column_runs(batch.d_streams, whole_streams)) {
        const int64_t s = run.stream, column = run.begin, width = run.end - column;
        sums.enter(s, column, width);
        const int64_t size = std::max(sums.run_latents() / block, int64_t(1)) * block;
        const auto make_room = [&] { return Scratch<A>(size * width); };
        parallel_for((L + size - 1) / size, threads, make_room, [&](int64_t task, const Scratch<A>& grads) {
            const int64_t first = task * size, last = std::min(L, first + size);
            sums.encoder(first, last, &grads[0], width);
            for (int64_t l = first; l < last; ++l) {
                const auto row = [&](const Tensor& tensor) { return Row<A>(tensor, l, column, l + 1 == L); };
                A* grad = &grads[(l - first) * width];
                A bias = sums.bias(l);
                if (const int64_t r = extra_row[l]; r >= 0) {
                    bias += extra.grad_latent_bias.at<const A>(s)[r];
                    add(grad, extra.grad_W_enc.at<const A>(r) + column, width);
                }
                grad_latent_bias.at<A>(s)[l] = bias;
                A* pre_bias = &pre_bias_parts[l / block * D + column];
                update_encoder(row(W_enc), row(moments[0]), row(moments[1]), grad, bias, pre_bias, width, adam);
            }
            sums.decoder(first, last, &grads[0], width);
            for (int64_t l = first; l < last; ++l) {
                const auto row = [&](const Tensor& tensor) { return Row<A>(tensor, l, column, l + 1 == L); };
                A* grad = &grads[(l - first) * width];
                if (const int64_t r = extra_row[l]; r >= 0) add(grad, extra.grad_W_dec.at<const A>(r) + column, width);
                update_decoder(row(W_dec), row(moments[2]), row(moments[3]), grad, width, adam);
            }
        });
    }
    for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += pre_bias_parts[b * D + d];
        grad_pre_bias.at<A>(0)[d] = A(sum);
    }
}

}  // namespace SIMD_LEVEL
#endif

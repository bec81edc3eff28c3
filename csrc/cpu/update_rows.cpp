// A whole training step of every latent's rows in one pass: gradient, projection, Adam, unit norm.
//
// A task is a run of latents in one stream: it sums their gradients, or takes those given, into a buffer that stays in
// cache, then moves the rows, encoder first, while the next row is fetched. Lazily, only decoder rows that have an entry
// are moved. Where gradients are summed, the encoder's part of the pre-bias gradient is too: over fixed blocks of
// latents, then over blocks in order. A matrix that is not given stays as it is.
#ifndef SIMD_LEVEL
#include <stdexcept>

#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "update_rows.cpp"
#include "every_level.h"

// Throws unless a matrix that moves comes with its moments and with what else it takes.
static void check_moved(
    const Tensor& W_enc, const Tensor& W_dec, const Tensors<4>& moments, bool has_encoder, bool has_decoder) {
    const bool encoder = has_encoder && moments[0].ndim && moments[1].ndim;
    const bool decoder = has_decoder && moments[2].ndim && moments[3].ndim;
    if ((W_enc.ndim && !encoder) || (W_dec.ndim && !decoder))
        throw std::invalid_argument("weights must come with their moments and with what their gradients are made of");
}

void update_rows(
    Tensor grad_latent_bias, Tensor grad_pre_bias, Tensor W_enc, Tensor W_dec, Tensors<4> moments,
    Tensors<2> copies, Tensor last_step, Batch batch, AdamStep adam, int threads) {
    const bool own_streams = int64_t(batch.d_streams.size()) == batch.values.size[1];
    const bool has_encoder = batch.x.ndim && batch.pre_bias.ndim && batch.grad_values.ndim && own_streams;
    check_moved(
        W_enc, W_dec, moments, has_encoder && grad_latent_bias.ndim && grad_pre_bias.ndim, batch.grad_recons.ndim);
    with_type((W_enc.ndim ? batch.x : batch.grad_recons).item_size, [&](auto type) {
        with_either<sum_t<decltype(type)>>(moments, [&](auto moment) {
            AT_SIMD_LEVEL(
                update_rows<decltype(type), decltype(moment)>(
                    grad_latent_bias, grad_pre_bias, W_enc, W_dec, moments, copies, last_step, batch, adam, threads))
        });
    });
}

void step_rows(
    Tensor W_enc, Tensor W_dec, Tensors<4> moments, Tensors<2> copies, Tensor last_step,
    Gradients gradients, AdamStep adam, int threads) {
    check_moved(W_enc, W_dec, moments, gradients.W_enc.ndim, gradients.W_dec.ndim);
    with_type((W_enc.ndim ? gradients.W_enc : gradients.W_dec).item_size, [&](auto type) {
        if constexpr (sizeof(type) >= sizeof(float))
            with_either<decltype(type)>(moments, [&](auto moment) {
                AT_SIMD_LEVEL(
                    step_rows<decltype(type), decltype(moment)>(
                        W_enc, W_dec, moments, copies, last_step, gradients, adam, threads))
            });
    });
}
#else
#include "decoder_row.h"
#include "segment_sums.h"

namespace SIMD_LEVEL {

// pre_bias -= grad_bias w, where there is one, then Adam on w.
template <class A, class M>
void update_encoder(
    Row<A> w, const Moments<M>& moments, CopyRow copy, const A* grad, A grad_bias, A* pre_bias, int64_t width,
    const Adam<A>& adam) {
    const Noise noise = moments.noise(adam.noise);
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        w.prefetch(d);
        moments.prefetch(d);
        const Vec<A> old = load(w + d, n);
        if (pre_bias) store(pre_bias + d, load(pre_bias + d, n) - grad_bias * old, n);
        const Vec<A> moved = adam(old, load(grad + d, n), moments, noise, d, n);
        store(w + d, moved, n);
        if (copy.data) copy_to(copy.data + d, moved, n);
    }
}

// Gradients that are given, by the names of SegmentSums.
template <class A>
class GivenSums {
   public:
    explicit GivenSums(const Gradients& gradients, int threads)
        : L(gradients.used.size[0]), gradients(gradients), threads(threads) {}

    void enter(int64_t, int64_t offset_, int64_t width_) { offset = offset_, width = width_; }
    bool used(int64_t l) const { return gradients.used.at<const uint8_t>(0)[l]; }
    A bias(int64_t) const { return 0; }
    void encoder(int64_t first, int64_t last, A* grad, int64_t stride) const {
        copy(gradients.W_enc, first, last, grad, stride);
    }
    void decoder(int64_t first, int64_t last, A* grad, int64_t stride) const {
        copy(gradients.W_dec, first, last, grad, stride);
    }
    int64_t run_latents() const {
        return std::max<int64_t>(1, std::min((256 << 10) / (int64_t(sizeof(A)) * width), L / (3 * threads)));
    }

    const int64_t L;

   private:
    void copy(const Tensor& rows, int64_t first, int64_t last, A* grad, int64_t stride) const {
        for (int64_t l = first; l < last; ++l)
            std::copy_n(rows.at<const A>(l) + offset, width, grad + (l - first) * stride);
    }

    const Gradients& gradients;
    int threads;
    int64_t offset = 0, width = 0;
};

// The latents of a run whose decoder rows make this step, and once more the last of them.
template <class Sums>
std::vector<int64_t> stepping(const Sums& sums, int64_t first, int64_t last, bool lazy) {
    std::vector<int64_t> latents;
    for (int64_t l = first; l < last; ++l)
        if (!lazy || sums.used(l)) latents.push_back(l);
    if (!latents.empty()) latents.push_back(latents.back());
    return latents;
}

template <class A, class M, class Sums>
void move_rows(
    Sums& sums, const Tensor& grad_latent_bias, const Tensor& grad_pre_bias, const Tensor& W_enc, const Tensor& W_dec,
    const Tensors<4>& moments, const Tensors<2>& copies, const Tensor& last_step,
    const Widths& d_streams, const AdamStep& step, int threads) {
    const Adam<A> adam(step);
    const bool lazy = last_step.data, biases = grad_pre_bias.data;
    const int64_t L = sums.L, D = biases ? grad_pre_bias.size[0] : 0;

    // the pre-bias gradient is summed in blocks of latents that no thread count changes; a task is some whole blocks
    const int64_t block = std::max<int64_t>(16, (L + 255) / 256), blocks = (L + block - 1) / block;
    std::vector<A> pre_bias_parts(blocks * D);
    for (const Columns& run : column_runs(d_streams, whole_streams)) {
        const int64_t s = run.stream, column = run.begin, width = run.end - column;
        sums.enter(s, column, width);
        const int64_t size = std::max(sums.run_latents() / block, int64_t(1)) * block;
        const auto make_room = [&] { return Scratch<A>(size * width); };
        parallel_for((L + size - 1) / size, threads, make_room, [&](int64_t task, const Scratch<A>& grads) {
            const int64_t first = task * size, last = std::min(L, first + size);
            const auto moments_of = [&](int64_t matrix, int64_t l, int64_t after) {
                return Moments<M>(&moments[2 * matrix], matrix, l, after, column);
            };
            if (W_enc.ndim) sums.encoder(first, last, &grads[0], width);
            for (int64_t l = first; l < last && W_enc.ndim; ++l) {
                const int64_t after = std::min(l + 1, L - 1);
                const A bias = sums.bias(l);
                if (biases) grad_latent_bias.at<A>(s)[l] = bias;
                update_encoder(
                    Row<A>(W_enc, l, after, column), moments_of(0, l, after), CopyRow(copies[0], l, column),
                    &grads[(l - first) * width], bias, biases ? &pre_bias_parts[l / block * D + column] : nullptr,
                    width, adam);
            }
            if (!W_dec.ndim) return;
            sums.decoder(first, last, &grads[0], width);
            const std::vector<int64_t> latents = stepping(sums, first, last, lazy);
            for (size_t i = 0; i + 1 < latents.size(); ++i) {
                const int64_t l = latents[i], after = latents[i + 1];
                const Row<A> w(W_dec, l, after, column);
                update_decoder(w, moments_of(1, l, after), &grads[(l - first) * width], width, adam);
                copy_row(CopyRow(copies[1], l, column), w.data, width);
            }
        });
    }
    for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
        for (int64_t b = 0; b < blocks; ++b) sum += pre_bias_parts[b * D + d];
        grad_pre_bias.at<A>(0)[d] = A(sum);
    }
    for (int64_t l = 0; lazy && W_dec.ndim && l < L; ++l)
        if (sums.used(l)) last_step.at<int64_t>(0)[l] = step.step;
}

template <class T, class M>
void update_rows(
    const Tensor& grad_latent_bias, const Tensor& grad_pre_bias, const Tensor& W_enc, const Tensor& W_dec,
    const Tensors<4>& moments, const Tensors<2>& copies, const Tensor& last_step, const Batch& batch,
    const AdamStep& step, int threads) {
    SegmentSums<T> sums(batch, W_enc.ndim, W_dec.ndim, threads);
    move_rows<sum_t<T>, M>(
        sums, grad_latent_bias, grad_pre_bias, W_enc, W_dec, moments, copies, last_step, batch.d_streams, step,
        threads);
}

template <class A, class M>
void step_rows(
    const Tensor& W_enc, const Tensor& W_dec, const Tensors<4>& moments, const Tensors<2>& copies,
    const Tensor& last_step, const Gradients& gradients, const AdamStep& step, int threads) {
    GivenSums<A> sums(gradients, threads);
    move_rows<A, M>(
        sums, Tensor{}, Tensor{}, W_enc, W_dec, moments, copies, last_step, gradients.d_streams, step, threads);
}

}  // namespace SIMD_LEVEL
#endif

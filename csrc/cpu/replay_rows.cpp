// Decoder rows go through the steps they missed, each with a gradient of 0, while they stay in the first-level cache.
//
// Their moments decay, so that in the end no step moves them. From there on, once that is certain for all steps to
// come, only the moments are taken on:
//     |step| <= rate |m| / eps,  and  w - step == w  where  |step| <= u |w|,  u = a quarter of the rounding unit.
#ifndef SIMD_LEVEL
#include <algorithm>
#include <cmath>

#include "level.h"
#include "operators.h"
#include "parallel.h"
#define OPERATOR "replay_rows.cpp"
#include "every_level.h"

void replay_rows(
    Tensor W_dec, Tensors<2> moments, Tensor copy, Tensor latents, Tensor last_step, Tensor history,
    Widths d_streams, uint64_t seed, int threads) {
    with_type(W_dec.item_size, [&](auto type) {
        if constexpr (sizeof(type) >= sizeof(float))
            with_either<decltype(type)>(moments, [&](auto moment) {
                AT_SIMD_LEVEL(
                    replay_rows<decltype(type), decltype(moment)>(
                        W_dec, moments, copy, latents, last_step, history, d_streams, seed, threads))
            });
    });
}
#else
#include "decoder_row.h"

namespace SIMD_LEVEL {

// A missed step, and the most that any from here on can divide a moment's part in a weight by.
template <class A>
struct Missed {
    Adam<A> adam;
    A most_per_moment;  // max rate / eps of this step and all after it
};

// Whether no step from here on moves w, which has unit norm. A moment that is rounded does not grow either: it is one
// of the numbers it may be rounded to, and decays to one that lies below.
template <class A, class M>
bool is_at_rest(Row<A> w, Row<M> m, int64_t width, A most_per_moment) {
    constexpr A u = std::numeric_limits<A>::epsilon() / 8;
    auto rests = Vec<A>{} == Vec<A>{};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const Vec<A> weight = load(w + d, width - d), moment = load(m + d, width - d);
        rests &= most_per_moment * magnitude<A>(moment) <= u * magnitude<A>(weight);
    }
    bool all = true;
    for (int i = 0; i < lanes<A>; ++i) all &= rests[i] != 0;
    return all;
}

template <class A, class M>
void decay_moments(const Moments<M>& moments, int64_t width, const Missed<A>* step, const Missed<A>* end) {
    constexpr int W = lanes<A>, B = VECTOR_REGISTERS / 4;
    const Vec<A> no_gradient = {};
    for (int64_t d = 0; d < width; d += B * W) {
        Vec<A> mean[B], square[B];
        const auto n = [&](int b) { return std::max<int64_t>(0, width - d - b * W); };
        for (int b = 0; b < B; ++b) moments.read(d + b * W, n(b), mean[b], square[b]);
        for (const Missed<A>* missed = step; missed != end; ++missed) {
            const Noise noise = moments.noise(missed->adam.noise);
            for (int b = 0; b < B; ++b) {
                missed->adam.decay(mean[b], square[b], no_gradient);
                moments.round(noise, d + b * W, mean[b], square[b]);
            }
        }
        for (int b = 0; b < B; ++b) moments.write(Noise(), d + b * W, n(b), mean[b], square[b]);
    }
}

template <class A, class M>
void replay(
    Row<A> w, const Moments<M>& moments, const A* zeros, int64_t width, const Missed<A>* step, const Missed<A>* end) {
    constexpr int look_again = 16;
    for (int64_t i = 1; step != end; ++i, ++step) {
        const A norm = update_decoder(w, moments, zeros, width, step->adam);
        const Missed<A>* const next = step + 1;
        const bool look = i % look_again == 1 && norm == 1 && next != end;
        if (look && is_at_rest(w, moments.first, width, next->most_per_moment))
            return decay_moments(moments, width, next, end);
    }
}

template <class A, class M>
void replay_rows(
    const Tensor& W_dec, const Tensors<2>& moments, const Tensor& copy, const Tensor& latents,
    const Tensor& last_step, const Tensor& history, const Widths& d_streams, uint64_t seed, int threads) {
    const int64_t R = latents.size[0], T = history.size[0];
    const auto latent = [&](int64_t r) { return latents.at<const int64_t>(0)[std::min(r, R - 1)]; };
    int64_t* const last = last_step.at<int64_t>(0);
    int64_t first = T;
    for (int64_t r = 0; r < R; ++r) {
        if (latent(r) < 0 || latent(r) >= last_step.size[0])
            throw std::out_of_range("replay_rows: latents must be of W_dec, got " + std::to_string(latent(r)));
        if (last[latent(r)] < 0 || last[latent(r)] > T)
            throw std::out_of_range("replay_rows: last_step must lie in 0 ... " + std::to_string(T));
        first = std::min(first, last[latent(r)]);
    }
    std::vector<Missed<A>> missed;
    for (int64_t t = first; t < T; ++t) {
        const double* const h = history.at<const double>(t);
        missed.push_back({Adam<A>({h[0], h[1], h[2], h[3], t + 1, seed}), 0});
    }
    A most = 0;
    for (auto step = missed.rbegin(); step != missed.rend(); ++step)
        step->most_per_moment = most = std::max(most, step->adam.most_per_moment());

    const std::vector<Columns> runs = column_runs(d_streams, whole_streams);
    const std::vector<A> zeros(*std::max_element(d_streams.begin(), d_streams.end()));
    constexpr int64_t block = 8;
    parallel_for((R + block - 1) / block, threads, [&](int64_t task) {
        for (const Columns& run : runs)
            for (int64_t r = task * block; r < std::min(R, (task + 1) * block); ++r) {
                const int64_t l = latent(r);
                if (last[l] >= T) continue;
                const int64_t after = latent(r + 1), width = run.end - run.begin;
                const Row<A> w(W_dec, l, after, run.begin);
                const Moments<M> of_row(moments.data(), 1, l, after, run.begin);
                const Missed<A>* const steps = missed.data();
                replay(w, of_row, zeros.data(), width, steps + last[l] - first, steps + T - first);
                copy_row(CopyRow(copy, l, run.begin), w.data, width);
            }
    });
    for (int64_t r = 0; r < R; ++r) last[latent(r)] = T;
}

}  // namespace SIMD_LEVEL
#endif

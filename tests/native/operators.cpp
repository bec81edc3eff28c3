// Every operator on small ragged shapes against loops in float64, for builds with sanitizers: buffers are exactly as
// large as their tensors, so that a read or write beside them is seen. Exits with 1 and a line where they disagree.
#include "operators.h"

#include <numeric>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>
#include <thread>

#include "global_topk.h"
#include "level.h"
#include "loader.h"
#include "parallel.h"
#include "topk_rows.h"

static std::atomic<int> failures{0};
static std::atomic<uint64_t> digest{0};  // of all results, in whatever order
static std::mt19937 generator(0);
#ifdef __SANITIZE_THREAD__  // one thread races with nobody
static const std::vector<int> thread_counts{3};
#else
static const std::vector<int> thread_counts{1, 3};
#endif

static double widen(double value) { return value; }
static double widen(float value) { return value; }
static double widen(bf16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}
static void narrow(double& to, double from) { to = from; }
static void narrow(float& to, double from) { to = float(from); }
static void narrow(bf16& to, double from) {
    const float wide = float(from);
    uint32_t bits;
    std::memcpy(&bits, &wide, sizeof bits);
    to.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// A contiguous tensor of up to three dimensions and its numbers.
template <class T>
struct Array {
    int64_t size[3];
    std::vector<T> data;

    Array(int64_t a, int64_t b = 1, int64_t c = 1) : size{a, b, c}, data(a * b * c) {}

    static Array random(int64_t a, int64_t b = 1, int64_t c = 1) {
        Array array(a, b, c);
        std::normal_distribution<double> normal;
        for (T& value : array.data) narrow(value, normal(generator));
        return array;
    }
    double operator()(int64_t i, int64_t j = 0, int64_t l = 0) const {
        return widen(data[(i * size[1] + j) * size[2] + l]);
    }
    static constexpr Type type = std::is_same_v<T, double>    ? Type::float64
                                 : std::is_same_v<T, float>   ? Type::float32
                                 : std::is_same_v<T, bf16>    ? Type::bfloat16
                                 : std::is_same_v<T, f16>     ? Type::float16
                                 : std::is_same_v<T, int32_t> ? Type::int32
                                 : std::is_same_v<T, int64_t> ? Type::int64
                                                              : Type::boolean;
    Tensor tensor(int64_t ndim) {
        Tensor view;
        view.data = data.data();
        view.ndim = ndim;
        view.item_size = sizeof(T);
        view.type = type;
        view.memory = Memory::cpu;
        int64_t stride = 1;
        for (int64_t i = 2; i >= 0; --i) {
            if (i < ndim) view.size[i] = size[i], view.stride[i] = stride;
            stride *= size[i];
        }
        return view;
    }
};

static void expect(const char* what, double got, double expected, double tolerance) {
    uint64_t bits;
    std::memcpy(&bits, &got, sizeof bits);
    digest += (bits ^ bits >> 29) * 0x9e3779b97f4a7c15;
    if (std::abs(got - expected) <= tolerance * (1 + std::abs(expected))) return;
    std::printf("%s: got %.9g, expected %.9g\n", what, got, expected);
    ++failures;
}

// The step: that rows move where they should is the business of the Python tests; here, that memory is safe. M is what
// moments are kept in.
template <class T, class M>
void check_step(const Batch& batch, const Gradients& gradients, int threads) {
    using A = sum_t<T>;
    const int64_t L = batch.offsets.size[0] - 1, D = batch.x.size[1], S = batch.d_streams.size();
    const int64_t* const offsets = batch.offsets.at<int64_t>(0);
    auto W_enc = Array<A>::random(L, D), W_dec = Array<A>::random(L, D);
    auto given_W_enc = W_enc, given_W_dec = W_dec;
    std::vector<Array<M>> moments(4, Array<M>(L, D)), given_moments = moments;
    Tensors<4> moment_tensors, given_moment_tensors;
    for (size_t i = 0; i < 4; ++i) moment_tensors[i] = moments[i].tensor(2);
    for (size_t i = 0; i < 4; ++i) given_moment_tensors[i] = given_moments[i].tensor(2);
    Array<A> grad_bias(S, L), grad_pre_bias(D);
    Array<bf16> copy_enc(L, D), copy_dec(L, D);
    Array<int64_t> last_step(L), given_last_step(L), every_latent(L);
    for (int64_t l = 0; l < L; ++l) every_latent.data[l] = l;
    Tensors<2> copies;
    if (sizeof(A) == sizeof(float)) copies = {copy_enc.tensor(2), copy_dec.tensor(2)};
    Array<double> history(40, 4);
    for (int64_t t = 0; t < 40; ++t)
        for (int64_t i = 0; i < 4; ++i) history.data[t * 4 + i] = std::vector<double>{0.01, 0.5, 0.9, 1e-3}[i];
    const uint64_t seed = UINT64_MAX;
    for (const bool lazy : {false, true}) {
        const AdamStep adam{0.01, 0.5, 0.9, 1e-3, 1, seed};
        step_rows(
            given_W_enc.tensor(2), given_W_dec.tensor(2), given_moment_tensors, copies,
            lazy ? given_last_step.tensor(1) : Tensor{}, gradients, adam, threads);
        update_rows(
            grad_bias.tensor(2), grad_pre_bias.tensor(1), W_enc.tensor(2), W_dec.tensor(2), moment_tensors, copies,
            lazy ? last_step.tensor(1) : Tensor{}, batch, adam, threads);
    }
    for (int64_t l = 0; l < L; ++l) {
        expect("update_rows, last_step", last_step.data[l], offsets[l] < offsets[l + 1], 0);
        expect("step_rows, last_step", given_last_step.data[l], last_step.data[l], 0);
    }
    for (int64_t i = 0; i < L * D; ++i) {
        expect("step_rows, W_enc", given_W_enc.data[i], W_enc.data[i], 1e-4);
        expect("step_rows, W_dec", given_W_dec.data[i], W_dec.data[i], 1e-4);
    }
    replay_rows(
        W_dec.tensor(2), {moment_tensors[2], moment_tensors[3]}, copies[1], every_latent.tensor(1),
        last_step.tensor(1), history.tensor(2), batch.d_streams, seed, threads);
    for (int64_t l = 0; l < L; ++l) expect("replay_rows, last_step", last_step.data[l], 40, 0);
    for (int64_t l = 0; l < L; ++l)
        for (int64_t s = 0, column = 0; s < S; column += batch.d_streams[s++]) {
            double norm = 0;
            for (int64_t d = 0; d < batch.d_streams[s]; ++d) norm += W_dec(l, column + d) * W_dec(l, column + d);
            expect("update_rows, norm", norm, 1, 1e-4);
        }
}

// empty: the share of the slots that are.
template <class T>
void check(
    Widths d_streams, int64_t N, int64_t L, int64_t k, bool shared, int threads, double tolerance, double empty = 0) {
    using A = sum_t<T>;
    const int64_t S = d_streams.size();
    std::vector<int64_t> stream_of;  // column
    for (int64_t s = 0; s < S; ++s) stream_of.insert(stream_of.end(), d_streams[s], s);
    const int64_t D = stream_of.size();

    auto x = Array<T>::random(N, D), W_enc = Array<T>::random(L, D), W_dec = Array<T>::random(L, D);
    auto pre_bias = Array<A>::random(D), latent_bias = Array<A>::random(S, L), scale = Array<A>::random(N, S);
    auto grad_values = Array<A>::random(N, S, k);
    auto G = Array<T>::random(N, S, D);
    Array<int32_t> indices(N, shared ? k : S, shared ? 1 : k);
    std::vector<int32_t> latents(L);
    for (int64_t l = 0; l < L; ++l) latents[l] = int32_t(l);
    for (size_t row = 0; row * k < indices.data.size(); ++row) {
        std::shuffle(latents.begin() + 1, latents.end(), generator);  // latent 0 is in every support
        std::sort(latents.begin() + 1, latents.begin() + k);
        std::copy_n(latents.begin(), k, indices.data.begin() + row * k);
    }
    for (int32_t& latent : indices.data)
        if (std::bernoulli_distribution(empty)(generator)) latent = -1;
    const Tensor index = indices.tensor(shared ? 2 : 3);
    const auto I = [&](int64_t n, int64_t s, int64_t j) { return indices.data[(shared ? n : n * S + s) * k + j]; };
    const auto weight_of = [&](const Array<T>& W, int64_t l, int64_t d) { return l < 0 ? 0 : W(l, d); };

    Array<A> values(N, S, k);
    support_values(
        values.tensor(3), x.tensor(2), W_enc.tensor(2), pre_bias.tensor(1), latent_bias.tensor(2), index, d_streams,
        threads);
    Array<T> grad_x(N, D);
    support_values_grad_x(
        grad_x.tensor(2), grad_values.tensor(3), values.tensor(3), index, W_enc.tensor(2), d_streams, threads);
    const auto grad_z = [&](int64_t n, int64_t s, int64_t j) { return values(n, s, j) > 0 ? grad_values(n, s, j) : 0; };
    Array<T> recons(N, S, D);
    sparse_decode(recons.tensor(3), values.tensor(3), index, W_dec.tensor(2), pre_bias.tensor(1), threads);
    Array<A> back(N, S, k);
    sparse_decode_grad_values(back.tensor(3), G.tensor(3), index, W_dec.tensor(2), threads);
    Array<A> nmse(S, S), loss_grad_values(N, S, k), loss_grad_pre_bias(D);
    Array<T> grad_recons(N, S, D);
    std::vector<double> weights(S * S, 0.5);
    weights[S * S - 1] = 0;
    decode_loss(
        nmse.tensor(2), grad_recons.tensor(3), loss_grad_values.tensor(3), loss_grad_pre_bias.tensor(1),
        values.tensor(3), index, W_dec.tensor(2), pre_bias.tensor(1), x.tensor(2), scale.tensor(2), weights, d_streams,
        threads);

    // of nested dictionaries: none of them, some, and all latents
    const int64_t P = 3, sizes[P] = {0, L / 2, L};
    Array<A> nested_nmse(P * S, S), nested_grad_values(N, S, k), nested_grad_pre_bias(D);
    Array<T> nested_grad_recons(P * N, S, D);
    Array<int64_t> ends(P);
    std::copy_n(sizes, P, ends.data.begin());
    nested_decode_loss(
        nested_nmse.tensor(2), nested_grad_recons.tensor(3), nested_grad_values.tensor(3), nested_grad_pre_bias.tensor(1),
        values.tensor(3), index, W_dec.tensor(2), pre_bias.tensor(1), x.tensor(2), scale.tensor(2), weights, d_streams,
        ends.tensor(1), threads);
    for (int64_t n = 0; n < N; ++n)
        for (int64_t s = 0; s < S; ++s) {
            std::vector<double> back(k);
            for (int64_t d = 0; d < D; ++d) {
                const int64_t t = stream_of[d];
                double gradient = 0;
                for (int64_t p = P; p-- > 0;) {
                    double error = pre_bias(d) - x(n, d);
                    for (int64_t j = 0; j < k; ++j)
                        if (I(n, s, j) < sizes[p]) error += values(n, s, j) * weight_of(W_dec, I(n, s, j), d);
                    gradient += 2 * weights[s * S + t] / P * scale(n, t) * error;
                    expect("nested_decode_loss, grad_recons", nested_grad_recons(p * N + n, s, d), gradient, 2 * tolerance);
                    for (int64_t j = 0; j < k; ++j)
                        if (I(n, s, j) >= (p ? sizes[p - 1] : 0) && I(n, s, j) < sizes[p])
                            back[j] += gradient * weight_of(W_dec, I(n, s, j), d);
                }
            }
            for (int64_t j = 0; j < k; ++j)
                expect("nested_decode_loss, grad_values", nested_grad_values(n, s, j), back[j], 10 * tolerance);
        }
    for (int64_t s = 0; s < S; ++s)
        for (int64_t t = 0; t < S; ++t)
            expect("nested_decode_loss, nmse", nested_nmse((P - 1) * S + s, t), nmse(s, t), tolerance);

    std::vector<double> expected_nmse(S * S), expected_grad_pre_bias(D);
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t d = 0; d < D; ++d) {
            double sum = 0;
            for (int64_t j = 0, s = stream_of[d]; j < k; ++j) sum += grad_z(n, s, j) * weight_of(W_enc, I(n, s, j), d);
            expect("support_values_grad_x", widen(grad_x.data[n * D + d]), sum, tolerance);
        }
        for (int64_t s = 0; s < S; ++s) {
            std::vector<double> loss_back(k);
            for (int64_t d = 0; d < D; ++d) {
                const int64_t t = stream_of[d];
                double sum = pre_bias(d);
                for (int64_t j = 0; j < k; ++j) sum += values(n, s, j) * weight_of(W_dec, I(n, s, j), d);
                expect("sparse_decode", recons(n, s, d), sum, tolerance);
                const double weight = weights[s * S + t], error = weight ? sum - x(n, d) : 0;
                expected_grad_pre_bias[d] += 2 * weight * scale(n, t) * error;
                expected_nmse[s * S + t] += scale(n, t) * error * error;
                expect("decode_loss, grad_recons", grad_recons(n, s, d), 2 * weight * scale(n, t) * error, tolerance);
                for (int64_t j = 0; j < k; ++j)
                    loss_back[j] += 2 * weight * scale(n, t) * error * weight_of(W_dec, I(n, s, j), d);
            }
            for (int64_t j = 0; j < k; ++j) {
                const int64_t l = I(n, s, j);
                double h = l < 0 ? 0 : latent_bias(s, l), dot = 0;
                for (int64_t d = 0; d < D; ++d) {
                    if (stream_of[d] == s) h += (x(n, d) - pre_bias(d)) * weight_of(W_enc, l, d);
                    dot += G(n, s, d) * weight_of(W_dec, l, d);
                }
                expect("support_values", values(n, s, j), std::max(h, 0.0), tolerance);
                expect("sparse_decode_grad_values", back(n, s, j), dot, tolerance);
                expect("decode_loss, grad_values", loss_grad_values(n, s, j), loss_back[j], 10 * tolerance);
            }
        }
    }
    for (int64_t s = 0; s < S; ++s)
        for (int64_t t = 0; t < S; ++t)
            expect("decode_loss, nmse", nmse(s, t), expected_nmse[s * S + t], 10 * tolerance);

    for (int64_t d = 0; d < D; ++d)
        expect("decode_loss, grad_pre_bias", loss_grad_pre_bias(d), expected_grad_pre_bias[d], 10 * tolerance);

    Array<int64_t> offsets(L + 1), entries(indices.data.size());
    invert_indices(offsets.tensor(1), entries.tensor(1), index, L);
    for (int64_t l = 0; l < L; ++l)
        for (int64_t e = offsets.data[l]; e < offsets.data[l + 1]; ++e)
            expect("invert_indices", indices.data[entries.data[e]], double(l), 0);
    for (size_t e = offsets.data[L]; e < entries.data.size(); ++e)
        expect("invert_indices, empty slots", indices.data[entries.data[e]], -1, 0);

    const Batch batch{
        x.tensor(2), pre_bias.tensor(1), values.tensor(3), grad_values.tensor(3), G.tensor(3), offsets.tensor(1),
        entries.tensor(1), d_streams};
    Array<A> grad_W_enc(L, D), grad_W_dec(L, D), grad_bias(S, L);
    weight_gradients(grad_W_enc.tensor(2), grad_W_dec.tensor(2), grad_bias.tensor(2), batch, threads);
    std::vector<double> enc(L * D), dec(L * D), bias(S * L);
    for (int64_t n = 0; n < N; ++n)
        for (int64_t s = 0; s < S; ++s)
            for (int64_t j = 0; j < k; ++j) {
                const int64_t l = I(n, s, j);
                if (l < 0) continue;
                bias[s * L + l] += grad_z(n, s, j);
                for (int64_t d = 0; d < D; ++d) {
                    if (stream_of[d] == s) enc[l * D + d] += grad_z(n, s, j) * (x(n, d) - pre_bias(d));
                    dec[l * D + d] += values(n, s, j) * G(n, s, d);
                }
            }
    for (int64_t i = 0; i < L * D; ++i) {
        expect("weight_gradients, W_enc", grad_W_enc.data[i], enc[i], 10 * tolerance);
        expect("weight_gradients, W_dec", grad_W_dec.data[i], dec[i], 10 * tolerance);
    }
    for (int64_t i = 0; i < S * L; ++i) expect("weight_gradients, latent_bias", grad_bias.data[i], bias[i], 10 * tolerance);

    std::vector<uint8_t> used(L);
    for (int64_t l = 0; l < L; ++l) used[l] = offsets.data[l] < offsets.data[l + 1];
    Tensor used_tensor = offsets.tensor(1);
    used_tensor.data = used.data(), used_tensor.size[0] = L, used_tensor.item_size = 1;
    const Gradients gradients{grad_W_enc.tensor(2), grad_W_dec.tensor(2), used_tensor, d_streams};
    check_step<T, A>(batch, gradients, threads);
    if constexpr (sizeof(A) == sizeof(float)) check_step<T, bf16>(batch, gradients, threads);

    Array<int64_t> silence(L), expected_silence(L);
    for (int64_t& samples : expected_silence.data) samples = N;
    for (int64_t n = 0; n < N; ++n)
        for (int64_t s = 0; s < S; ++s)
            for (int64_t j = 0; j < k; ++j)
                if (values(n, s, j) > 0) expected_silence.data[I(n, s, j)] = 0;
    count_silence(silence.tensor(1), values.tensor(3), index);
    for (int64_t l = 0; l < L; ++l) expect("count_silence", silence.data[l], expected_silence.data[l], 0);
}

template <class T>
void check_shapes(double tolerance) {
    for (int threads : thread_counts)
        for (bool shared : {true, false}) {
            check<T>({7, 1, 19}, 5, 11, 3, shared, threads, tolerance);
            check<T>({1}, 1, 1, 1, shared, threads, tolerance);
            check<T>({259, 3}, 35, 6, 5, shared, threads, tolerance);              // several column runs
            check<T>({2, 1, 3, 1, 2}, 18, 40, 2, shared, threads, tolerance);      // more streams than one gather takes
            check<T>({5, 66}, 1100, 3, 2, shared, threads, tolerance);             // a latent with many entries
            check<T>({3, 2}, 0, 4, 2, shared, threads, tolerance);                 // no samples
            for (double empty : {0.5, 1.0}) {
                check<T>({7, 1, 19}, 21, 11, 3, shared, threads, tolerance, empty);
                check<T>({259, 3}, 9, 6, 5, shared, threads, tolerance, empty);
                check<T>({2, 1, 3, 1, 2}, 18, 40, 2, shared, threads, tolerance, empty);
            }
        }
}

static void expect_largest(const char* what, const int32_t* got, int64_t k, const std::vector<double>& row) {
    const auto rank = [&](int64_t i) { return std::isnan(row[i]) ? INFINITY : row[i]; };
    std::vector<int32_t> order(row.size());
    for (size_t i = 0; i < row.size(); ++i) order[i] = int32_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) { return rank(i) > rank(j); });
    std::sort(order.begin(), order.begin() + k);
    for (int64_t j = 0; j < k; ++j) expect(what, got[j], order[j], 0);
}

template <class T>
void check_topk_rows(int64_t L, int64_t k, int distinct) {
    const int64_t N = 9;
    Array<T> scores(N, L);
    for (T& score : scores.data) score = generator() % 50 ? T(generator() % distinct) : T(NAN);
    for (int threads : thread_counts) {
        Array<int32_t> indices(N, k);
        topk_rows(indices.tensor(2), scores.tensor(2), k, threads);
        for (int64_t n = 0; n < N; ++n)
            expect_largest(
                "topk_rows", &indices.data[n * k], k, {scores.data.begin() + n * L, scores.data.begin() + (n + 1) * L});
    }
}

// The product of a GEMM over the numbers it is given, in the type it stores.
template <class Score, class A, class B>
Array<Score> product(const Array<A>& x, const Array<B>& W) {
    const int64_t N = x.size[0], L = W.size[0], D = x.size[1];
    Array<Score> scores(N, L);
    for (int64_t n = 0; n < N; ++n)
        for (int64_t l = 0; l < L; ++l) {
            float sum = 0;
            for (int64_t d = 0; d < D; ++d) sum += float(x(n, d)) * float(W(l, d));
            narrow(scores.data[n * L + l], sum);
        }
    return scores;
}

// Every latent twice, so that every score is tied; the first sample is infinite. Score is what the GEMM stores.
template <class Score, class E>
void check_global_topk(int64_t N, int64_t L, int64_t D, int64_t k, int64_t capacity, int64_t chunk, int threads) {
    constexpr bool narrow = sizeof(Score) == 2, narrower = sizeof(Score) < sizeof(E);
    auto x = Array<float>::random(N, D);
    auto W = Array<E>::random(L, D);
    auto bias = Array<double>::random(L);
    x.data[0] = INFINITY;
    for (int64_t l = 1; l < L; l += 2) {
        std::copy_n(&W.data[(l - 1) * D], D, &W.data[l * D]);
        bias.data[l] = bias.data[l - 1];
    }
    Array<float> exact(N, L);
    exact_scores(exact.tensor(2), x.tensor(2), W.tensor(2), bias.tensor(1), threads);

    Array<float> norm(N), residual(N);
    Array<bf16> narrow_x(N, D);
    measure_rows(norm.tensor(1), residual.tensor(1), narrow ? narrow_x.tensor(2) : Tensor{}, x.tensor(2), threads);
    Screen screen(norm.tensor(1), residual.tensor(1), bias.tensor(1), D, k, capacity, narrow);
    const auto filter = [&](Screen& screen) {
        for (int64_t first = 0; first < L; first += chunk) {
            const int64_t m = std::min(chunk, L - first);
            Array<E> rows(m, D);
            Array<bf16> narrow_rows(m, D);
            Array<float> row_norm(m), row_residual(m);
            std::copy_n(&W.data[first * D], m * D, rows.data.begin());
            measure_rows(
                row_norm.tensor(1), row_residual.tensor(1), narrower ? narrow_rows.tensor(2) : Tensor{}, rows.tensor(2),
                threads);
            auto scores = narrower ? product<Score>(narrow_x, narrow_rows)
                          : narrow ? product<Score>(narrow_x, rows)
                                   : product<Score>(x, rows);
            screen.filter(scores.tensor(2), first, row_norm.tensor(1), row_residual.tensor(1), threads);
        }
    };
    filter(screen);
    Array<int32_t> indices(N, k);
    Array<uint8_t> given_up(N);
    screen.settle(indices.tensor(2), given_up.tensor(1), x.tensor(2), W.tensor(2), threads);
    Screen again(norm.tensor(1), residual.tensor(1), bias.tensor(1), D, k, capacity, narrow);
    filter(again);
    Array<int32_t> among(N, k);
    Array<float> ends(N, k), best(N, k);
    Array<uint8_t> unproven(N);
    again.best_ends(ends.tensor(2), threads);
    again.settle_among(
        among.tensor(2), best.tensor(2), unproven.tensor(1), ends.tensor(2), k, x.tensor(2), W.tensor(2), threads);
    for (int64_t n = 0; n < N; ++n) {
        expect("settle_among, given_up", unproven.data[n], given_up.data[n], 0);
        for (int64_t j = n * k; !given_up.data[n] && j < (n + 1) * k; ++j) {
            expect("settle_among", among.data[j], indices.data[j], 0);
            expect("settle_among, scores", best.data[j], exact(n, indices.data[j]), 0);
        }
    }
    for (int64_t n = 0; n < N; ++n) {
        if (n == 0 || capacity > L) expect("global_topk, given_up", given_up.data[n], n == 0, 0);
        for (int64_t l = 0; n > 0 && l < L; ++l) {
            double sum = bias(l);
            for (int64_t d = 0; d < D; ++d) sum += x(n, d) * W(l, d);
            expect("exact_scores", exact(n, l), sum, 1e-6);
        }
        if (!given_up.data[n])
            expect_largest(
                "global_topk", &indices.data[n * k], k, {exact.data.begin() + n * L, exact.data.begin() + (n + 1) * L});
    }
}

// The largest scores of a batch, and those above a threshold, of scores that are tied in pairs.
static void check_ragged(int64_t N, int64_t L, int64_t D, int64_t k, int64_t capacity, int threads) {
    auto x = Array<float>::random(N, D);
    auto W = Array<float>::random(L, D);
    auto bias = Array<double>::random(L);
    for (int64_t l = 1; l < L; l += 2) {
        std::copy_n(&W.data[(l - 1) * D], D, &W.data[l * D]);
        bias.data[l] = bias.data[l - 1];
    }
    Array<float> exact(N, L), norm(N), residual(N), row_norm(L), row_residual(L);
    exact_scores(exact.tensor(2), x.tensor(2), W.tensor(2), bias.tensor(1), threads);
    measure_rows(norm.tensor(1), residual.tensor(1), Tensor{}, x.tensor(2), threads);
    measure_rows(row_norm.tensor(1), row_residual.tensor(1), Tensor{}, W.tensor(2), threads);
    for (const Among among : {Among::batch, Among::above}) {
        const float least = among == Among::batch ? -INFINITY : 0.25f;
        Screen screen(norm.tensor(1), residual.tensor(1), bias.tensor(1), D, k, capacity, false, among, least);
        screen.filter(product<float>(x, W).tensor(2), 0, row_norm.tensor(1), row_residual.tensor(1), threads);
        const int64_t width = screen.settle_ragged(x.tensor(2), W.tensor(2), threads);
        if (capacity > L) expect("settle_ragged, given up", width >= 0, 1, 0);
        if (width < 0) continue;
        Array<int32_t> indices(N, std::max<int64_t>(1, width));
        screen.write(indices.tensor(2));
        const int32_t* place = indices.data.data();
        std::vector<int64_t> order(N * L);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(
            order.begin(), order.end(), [&](int64_t a, int64_t b) { return exact.data[a] > exact.data[b]; });
        std::vector<uint8_t> fires(N * L);
        for (int64_t i = 0; i < N * L; ++i)
            fires[order[i]] = among == Among::batch ? i < N * k : exact.data[order[i]] > least;
        for (int64_t n = 0; n < N; ++n) {
            const int32_t* const end = place + indices.size[1];
            for (int64_t l = 0; l < L; ++l)
                if (fires[n * L + l]) expect("ragged support", *place++, l, 0);
            while (place < end) expect("empty slot", *place++, -1, 0);
        }
    }
}

// The scores of all latents, and those of a support. The first sample is infinite.
template <class A, class E>
void check_scores(int64_t N, int64_t L, int64_t D, int64_t k, int threads) {
    auto x = Array<A>::random(N, D);
    auto W = Array<E>::random(L, D);
    auto bias = Array<double>::random(L);
    x.data[0] = INFINITY;
    Array<int32_t> indices(N, k);
    for (int32_t& latent : indices.data) latent = int32_t(generator() % L);
    Array<A> all(N, L), of_support(N, k);
    exact_scores(all.tensor(2), x.tensor(2), W.tensor(2), bias.tensor(1), threads);
    support_scores(of_support.tensor(2), x.tensor(2), W.tensor(2), bias.tensor(1), indices.tensor(2), threads);
    for (int64_t n = 1; n < N; ++n)
        for (int64_t l = 0; l < L; ++l) {
            double sum = bias(l);
            for (int64_t d = 0; d < D; ++d) sum += x(n, d) * W(l, d);
            expect("exact_scores", all(n, l), sum, sizeof(A) == sizeof(double) ? 1e-12 : 1e-6);
        }
    for (int64_t n = 0; n < N; ++n)
        for (int64_t j = 0; j < k; ++j) {
            const double score = all(n, indices.data[n * k + j]), ranked = std::isnan(score) ? INFINITY : score;
            expect("support_scores", of_support(n, j) == ranked, 1, 0);
        }
}

// A row as short as its threshold allows, one with group maxima, and one so long that these know their places.
static void check_selection() {
    for (int distinct : {1, 9, 1 << 24}) {
        check_topk_rows<float>(5, 5, distinct);
        check_topk_rows<float>(997, 20, distinct);
        check_topk_rows<float>(20011, 7, distinct);
#ifndef SPARC_FAST_FLOAT32_ONLY
        check_topk_rows<double>(20011, 7, distinct);
#endif
    }
    for (int threads : thread_counts) check_ragged(9, 40, 37, 3, 104, threads), check_ragged(9, 400, 37, 3, 70, threads);
    for (int threads : thread_counts)
        for (int64_t D : {1, 37, 256, 700}) {  // whole and cut 256 columns
            check_scores<double, double>(9, 5, D, 3, threads);
            check_scores<float, float>(9, 40, D, 3, threads);
            check_scores<float, bf16>(9, 40, D, 1, threads);
        }
    for (int threads : thread_counts)
        for (int64_t capacity : {80, 400}) {  // 80: too few for 300 of 301
            check_global_topk<float, float>(11, 301, 37, 10, capacity, 100, threads);
            check_global_topk<bf16, float>(11, 301, 37, 10, capacity, 100, threads);
            check_global_topk<bf16, bf16>(11, 301, 37, 10, capacity, 7, threads);
            check_global_topk<float, bf16>(11, 301, 37, 300, capacity, 100, threads);
        }
}

// Rows gathered at random, and spans of a file, each of them up to the last byte of its buffer.
template <class T>
void check_loader(int64_t width, int widening) {
    const int64_t N = 300, n = 150;
    auto window = Array<T>::random(N, width);
    auto batch = Array<float>::random(n, width);
    Array<T> same(n, width), read(n, width);
    Array<int64_t> rows(n);
    for (int64_t& row : rows.data) row = generator() % N;
    for (int threads : thread_counts) {
        if (widening) gather_rows(batch.tensor(2), window.tensor(2), rows.tensor(1), widening, threads);
        gather_rows(same.tensor(2), window.tensor(2), rows.tensor(1), as_it_is, threads);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t d = 0; d < width; ++d) {
                if (widening) expect("gather_rows, widened", batch(i, d), window(rows.data[i], d), 0);
                expect("gather_rows", same(i, d), window(rows.data[i], d), 0);
            }
    }
    std::FILE* file = std::tmpfile();
    std::fwrite(window.data.data(), sizeof(T), window.data.size(), file);
    std::fflush(file);
    const int64_t bytes = width * sizeof(T);
    const std::vector<int64_t> begins{7 * bytes, 200 * bytes}, lengths{50 * bytes, 100 * bytes};
    will_need(fileno(file), begins, lengths);
    const auto [done, error, found] = read_spans(fileno(file), begins, lengths, read.tensor(2), widening, true);
    expect("read_spans", done == n * bytes && error == 0 && found == -1, 1, 0);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; ++d) expect("read_spans", read(i, d), window(i < 50 ? i + 7 : i + 150, d), 0);
    const auto past_end = read_spans(fileno(file), {250 * bytes}, {n * bytes}, read.tensor(2), widening, true);
    expect("read_spans, cut short", std::get<0>(past_end), 50 * bytes, 0);
    expect("read_spans, no file", std::get<1>(read_spans(-1, begins, lengths, read.tensor(2), widening, true)) != 0, 1, 0);
    std::fclose(file);
    narrow(read.data.back(), std::numeric_limits<double>::infinity());
    expect("first_not_finite", first_not_finite(read.tensor(2), widening), n * width - 1, 0);
}

// Each task once, whoever calls: several threads at once, tasks themselves, and one whose other tasks threw.
static void check_threads() {
    const auto sum = [](int64_t tasks) {
        std::atomic<int64_t> sum{0};
        parallel_for(tasks, 4, [&](int64_t i) { parallel_for(i % 3, 4, [&](int64_t) { ++sum; }), sum += i; });
        return sum.load();
    };
    const auto call = [&] {
        for (int64_t tasks : {0, 1, 2, 5, 300, 2, 300}) {
            int64_t expected = 0;
            for (int64_t i = 0; i < tasks; ++i) expected += i + i % 3;
            expect("every task is done once", sum(tasks), expected, 0);
        }
    };
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; ++i) callers.emplace_back(call);
    for (auto& caller : callers) caller.join();
    for (int64_t wrong : {0, 57, 99}) {
        bool caught = false;
        try {
            parallel_for(100, 4, [&](int64_t i) {
                if (i == wrong) throw std::runtime_error("wrong");
            });
        } catch (const std::runtime_error&) {
            caught = true;
        }
        expect("what a task throws reaches the caller", caught, true, 0);
    }
    call();
}

// Small integers, whose products are exact, so that ties are ties; a latent that all fire has a column of its own.
static void check_nearness(int64_t Q, int64_t N, int64_t L, int threads) {
    const auto rows = [&](int64_t count, Array<int64_t>& offsets, std::vector<int32_t>& latents, std::vector<float>& values) {
        for (int64_t n = 0; n < count; ++n) {
            for (int64_t l = 0; l < L; ++l)
                if (l == 0 || generator() % 4 == 0) {
                    latents.push_back(int32_t(l));
                    values.push_back(float(generator() % 3));
                }
            offsets.data[n + 1] = latents.size();
        }
    };
    Array<int64_t> query_offsets(Q + 1), offsets(N + 1), first(Q), last(Q), higher(Q), equal(Q);
    std::vector<int32_t> query_latents, latents;
    std::vector<float> query_values, values;
    rows(Q, query_offsets, query_latents, query_values);
    rows(N, offsets, latents, values);
    const auto entries = [](const auto& from) {
        Array<typename std::decay_t<decltype(from)>::value_type> array(from.size());
        array.data = from;
        return array;
    };
    auto a = entries(query_latents), c = entries(latents);
    auto b = entries(query_values), d = entries(values);
    Array<float> own(Q);
    for (int64_t n = 0; n < Q; ++n) {
        first.data[n] = N ? generator() % N : 0;
        last.data[n] = std::min<int64_t>(N, first.data[n] + generator() % 3);
    }
    count_nearer(own.tensor(1), higher.tensor(1), equal.tensor(1), query_offsets.tensor(1), a.tensor(1), b.tensor(1),
                 offsets.tensor(1), c.tensor(1), d.tensor(1), first.tensor(1), last.tensor(1), L, 0.5, threads);
    const int64_t top = 5;
    Array<int64_t> nearest(Q, top);
    Array<float> largest(Q, top);
    find_nearest(nearest.tensor(2), largest.tensor(2), query_offsets.tensor(1), a.tensor(1), b.tensor(1),
                 offsets.tensor(1), c.tensor(1), d.tensor(1), L, threads);
    std::vector<double> query(L);
    for (int64_t n = 0; n < Q; ++n) {
        std::fill(query.begin(), query.end(), 0);
        for (int64_t e = query_offsets.data[n]; e < query_offsets.data[n + 1]; ++e)
            query[query_latents[e]] = query_values[e];
        std::vector<double> product(N);
        for (int64_t m = 0; m < N; ++m)
            for (int64_t e = offsets.data[m]; e < offsets.data[m + 1]; ++e) product[m] += query[latents[e]] * values[e];
        double best = -1;
        for (int64_t m = first.data[n]; m < last.data[n]; ++m) best = std::max(best, product[m]);
        int64_t above = 0, same = 0;
        for (int64_t m = 0; best >= 0 && m < N; ++m)
            if (m < first.data[n] || m >= last.data[n]) {
                above += product[m] > best;
                same += product[m] == best;
            }
        expect("count_nearer", higher.data[n], above, 0);
        expect("count_nearer", equal.data[n], same, 0);
        if (best >= 0) expect("count_nearer", own.data[n], best, 0);
        std::vector<int64_t> order(N);
        for (int64_t m = 0; m < N; ++m) order[m] = m;
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return product[i] > product[j]; });
        for (int64_t i = 0; i < top; ++i) {
            const bool some = i < N && product[order[i]] > 0;
            expect("find_nearest", nearest.data[n * top + i], some ? order[i] : -1, 0);
            expect("find_nearest", largest.data[n * top + i], some ? product[order[i]] : 0, 0);
        }
    }
}

int main() {
    check_threads();
    check_selection();
    for (int threads : thread_counts) {
        check_nearness(40, 9000, 6, threads);  // more than a block
        check_nearness(65, 33, 9, threads);
        check_nearness(3, 0, 2, threads);
        check_nearness(0, 3, 2, threads);
    }
    for (int64_t width : {1, 37, 700}) {
        check_loader<double>(width, as_it_is);
        check_loader<float>(width, as_it_is);
        check_loader<bf16>(width, from_bfloat16);
    }
#ifndef SPARC_FAST_FLOAT32_ONLY
    check_shapes<double>(1e-10);
    check_shapes<bf16>(1e-1);
#endif
    check_shapes<float>(1e-3);
    if (failures) std::printf("%d failures\n", failures.load());
    std::printf("results %016llx\n", static_cast<unsigned long long>(digest.load()));
    return failures > 0;
}

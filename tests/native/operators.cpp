// Every operator on small ragged shapes, for builds with sanitizers and for other processors: buffers are exactly as
// large as their tensors, so that a read or write beside them is seen. Prints a digest of all results, which every
// platform must find; that they are right is the business of the Python tests.
#include "operators.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <tuple>

#include "global_topk.h"
#include "level.h"
#include "loader.h"
#include "parallel.h"
#include "topk_rows.h"

static std::atomic<int> failures{0};
static uint64_t digest = 0;  // of all results
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

// A contiguous tensor of one to three dimensions and its numbers.
template <class T>
struct Array {
    int64_t ndim, size[3];
    std::vector<T> data;

    explicit Array(int64_t a) : ndim(1), size{a, 1, 1}, data(a) {}
    Array(int64_t a, int64_t b) : ndim(2), size{a, b, 1}, data(a * b) {}
    Array(int64_t a, int64_t b, int64_t c) : ndim(3), size{a, b, c}, data(a * b * c) {}

    template <class... Sizes>
    static Array random(Sizes... sizes) {
        Array array(sizes...);
        std::normal_distribution<double> normal;
        for (T& value : array.data) narrow(value, normal(generator));
        return array;
    }
    static constexpr Type type = std::is_same_v<T, double>    ? Type::float64
                                 : std::is_same_v<T, float>   ? Type::float32
                                 : std::is_same_v<T, bf16>    ? Type::bfloat16
                                 : std::is_same_v<T, f16>     ? Type::float16
                                 : std::is_same_v<T, int32_t> ? Type::int32
                                 : std::is_same_v<T, int64_t> ? Type::int64
                                                              : Type::boolean;
    operator Tensor() {
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

// Each number counts by its place; NaN is NaN, whatever its bits.
template <class T>
static void note(const Array<T>& result) {
    for (size_t i = 0; i < result.data.size(); ++i) {
        uint64_t bits = 0;
        if constexpr (std::is_integral_v<T>)
            bits = uint64_t(result.data[i]);
        else if (const double number = widen(result.data[i]); number == number)
            std::memcpy(&bits, &number, sizeof bits);
        digest = (digest ^ (bits ^ bits >> 29)) * 0x9e3779b97f4a7c15;
    }
}

template <class... Results>
static void note(const Results&... results) {
    (note(results), ...);
}

// M is what moments are kept in.
template <class T, class M>
void run_step(const Batch& batch, const Gradients& gradients, int threads) {
    using A = sum_t<T>;
    const int64_t L = batch.offsets.size[0] - 1, D = batch.x.size[1], S = batch.d_streams.size();
    auto W_enc = Array<A>::random(L, D), W_dec = Array<A>::random(L, D);
    std::vector<Array<M>> moments(4, Array<M>(L, D));
    Tensors<4> moment_tensors;
    for (size_t i = 0; i < 4; ++i) moment_tensors[i] = moments[i];
    Array<A> grad_bias(S, L), grad_pre_bias(D);
    Array<bf16> copy_enc(L, D), copy_dec(L, D);
    Array<int64_t> last_step(L), every_latent(L);
    std::iota(every_latent.data.begin(), every_latent.data.end(), 0);
    Tensors<2> copies;
    if (sizeof(A) == sizeof(float)) copies = {copy_enc, copy_dec};
    Array<double> history(40, 4);
    for (int64_t i = 0; i < 160; ++i) history.data[i] = std::vector<double>{0.01, 0.5, 0.9, 1e-3}[i % 4];
    const uint64_t seed = UINT64_MAX;
    const AdamStep adam{0.01, 0.5, 0.9, 1e-3, 1, seed};
    for (const Tensor& lazy : {Tensor{}, Tensor(last_step)}) {
        step_rows(W_enc, W_dec, moment_tensors, copies, lazy, gradients, adam, threads);
        update_rows(grad_bias, grad_pre_bias, W_enc, W_dec, moment_tensors, copies, lazy, batch, adam, threads);
        note(last_step, W_enc, W_dec, grad_bias, grad_pre_bias);
    }
    replay_rows(
        W_dec, {moment_tensors[2], moment_tensors[3]}, copies[1], every_latent, last_step, history, batch.d_streams,
        seed, threads);
    note(last_step, W_dec, copy_enc, copy_dec, moments[0], moments[1], moments[2], moments[3]);
}

// empty: the share of the slots that are.
template <class T>
void run_operators(Widths d_streams, int64_t N, int64_t L, int64_t k, bool shared, int threads, double empty = 0) {
    using A = sum_t<T>;
    const int64_t S = d_streams.size(), D = std::accumulate(d_streams.begin(), d_streams.end(), int64_t(0));
    auto x = Array<T>::random(N, D), W_enc = Array<T>::random(L, D), W_dec = Array<T>::random(L, D);
    auto pre_bias = Array<A>::random(D), latent_bias = Array<A>::random(S, L), scale = Array<A>::random(N, S);
    auto grad_values = Array<A>::random(N, S, k);
    auto G = Array<T>::random(N, S, D);
    auto indices = shared ? Array<int32_t>(N, k) : Array<int32_t>(N, S, k);
    std::vector<int32_t> latents(L);
    std::iota(latents.begin(), latents.end(), 0);
    for (size_t row = 0; row * k < indices.data.size(); ++row) {
        std::shuffle(latents.begin() + 1, latents.end(), generator);  // latent 0 is in every support
        std::sort(latents.begin() + 1, latents.begin() + k);
        std::copy_n(latents.begin(), k, indices.data.begin() + row * k);
    }
    for (int32_t& latent : indices.data)
        if (std::bernoulli_distribution(empty)(generator)) latent = -1;
    const Tensor index = indices;

    Array<A> values(N, S, k), back(N, S, k);
    Array<T> grad_x(N, D), recons(N, S, D);
    support_values(values, x, W_enc, pre_bias, latent_bias, index, d_streams, threads);
    support_values_grad_x(grad_x, grad_values, values, index, W_enc, d_streams, threads);
    sparse_decode(recons, values, index, W_dec, pre_bias, threads);
    sparse_decode_grad_values(back, G, index, W_dec, threads);
    note(values, grad_x, recons, back);

    std::vector<double> weights(S * S, 0.5);
    weights[S * S - 1] = 0;
    for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{}, {0, L / 2, L}}) {  // of nested dictionaries
        const int64_t P = std::max<int64_t>(1, sizes.size());
        Array<A> nmse(P * S, S), loss_back(N, S, k), grad_pre_bias(D);
        Array<T> grad_recons(P * N, S, D);
        Array<int64_t> ends(sizes.size());
        ends.data = sizes;
        if (sizes.empty())
            decode_loss(
                nmse, grad_recons, loss_back, grad_pre_bias, values, index, W_dec, pre_bias, x, scale, weights,
                d_streams, threads);
        else
            nested_decode_loss(
                nmse, grad_recons, loss_back, grad_pre_bias, values, index, W_dec, pre_bias, x, scale, weights,
                d_streams, ends, threads);
        note(nmse, grad_recons, loss_back, grad_pre_bias);
    }

    Array<int64_t> offsets(L + 1), entries(indices.data.size()), silence(L);
    invert_indices(offsets, entries, index, L);
    count_silence(silence, values, index);
    const Batch batch{x, pre_bias, values, grad_values, G, offsets, entries, d_streams};
    Array<A> grad_W_enc(L, D), grad_W_dec(L, D), grad_bias(S, L);
    Array<double> squares(L);
    weight_gradients(grad_W_enc, grad_W_dec, grad_bias, batch, threads);
    gradient_squares(squares, grad_bias, batch, threads);
    note(offsets, entries, silence, grad_W_enc, grad_W_dec, grad_bias, squares);

    Array<uint8_t> used(L);
    for (int64_t l = 0; l < L; ++l) used.data[l] = offsets.data[l] < offsets.data[l + 1];
    const Gradients gradients{grad_W_enc, grad_W_dec, used, d_streams};
    run_step<T, A>(batch, gradients, threads);
    if constexpr (sizeof(A) == sizeof(float)) run_step<T, bf16>(batch, gradients, threads);
}

template <class T>
void run_shapes() {
    for (int threads : thread_counts)
        for (bool shared : {true, false}) {
            run_operators<T>({7, 1, 19}, 5, 11, 3, shared, threads);
            run_operators<T>({1}, 1, 1, 1, shared, threads);
            run_operators<T>({259, 3}, 35, 6, 5, shared, threads);         // several column runs
            run_operators<T>({2, 1, 3, 1, 2}, 18, 40, 2, shared, threads);  // more streams than one gather takes
            run_operators<T>({5, 66}, 1100, 3, 2, shared, threads);        // a latent with many entries
            run_operators<T>({3, 2}, 0, 4, 2, shared, threads);            // no samples
            for (double empty : {0.5, 1.0}) {
                run_operators<T>({7, 1, 19}, 21, 11, 3, shared, threads, empty);
                run_operators<T>({259, 3}, 9, 6, 5, shared, threads, empty);
                run_operators<T>({2, 1, 3, 1, 2}, 18, 40, 2, shared, threads, empty);
            }
        }
}

template <class T>
void run_topk_rows(int64_t L, int64_t k, int distinct) {
    const int64_t N = 9;
    Array<T> scores(N, L);
    for (T& score : scores.data) score = generator() % 50 ? T(generator() % distinct) : T(NAN);
    for (int threads : thread_counts) {
        Array<int32_t> indices(N, k);
        topk_rows(indices, scores, k, threads);
        note(indices);
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
            for (int64_t d = 0; d < D; ++d) sum += float(widen(x.data[n * D + d])) * float(widen(W.data[l * D + d]));
            narrow(scores.data[n * L + l], sum);
        }
    return scores;
}

// Every latent twice, so that every score is tied.
template <class E>
static void tie(Array<E>& W, Array<double>& bias) {
    const int64_t L = W.size[0], D = W.size[1];
    for (int64_t l = 1; l < L; l += 2) {
        std::copy_n(&W.data[(l - 1) * D], D, &W.data[l * D]);
        bias.data[l] = bias.data[l - 1];
    }
}

// The first sample is infinite. Score is what the GEMM stores.
template <class Score, class E>
void run_global_topk(int64_t N, int64_t L, int64_t D, int64_t k, int64_t capacity, int64_t chunk, int threads) {
    constexpr bool narrow = sizeof(Score) == 2, narrower = sizeof(Score) < sizeof(E);
    auto x = Array<float>::random(N, D);
    auto W = Array<E>::random(L, D);
    auto bias = Array<double>::random(L);
    x.data[0] = INFINITY;
    tie(W, bias);
    Array<float> norm(N), residual(N);
    Array<bf16> narrow_x(N, D);
    measure_rows(norm, residual, narrow ? Tensor(narrow_x) : Tensor{}, x, threads);
    const auto filtered = [&] {
        auto screen = std::make_unique<Screen>(norm, residual, bias, D, k, capacity, narrow);
        for (int64_t first = 0; first < L; first += chunk) {
            const int64_t m = std::min(chunk, L - first);
            Array<E> rows(m, D);
            Array<bf16> narrow_rows(m, D);
            Array<float> row_norm(m), row_residual(m);
            std::copy_n(&W.data[first * D], m * D, rows.data.begin());
            measure_rows(row_norm, row_residual, narrower ? Tensor(narrow_rows) : Tensor{}, rows, threads);
            auto scores = narrower ? product<Score>(narrow_x, narrow_rows)
                          : narrow ? product<Score>(narrow_x, rows)
                                   : product<Score>(x, rows);
            screen->filter(scores, first, row_norm, row_residual, threads);
        }
        return screen;
    };
    Array<int32_t> indices(N, k), among(N, k);
    Array<uint8_t> given_up(N), unproven(N);
    Array<float> ends(N, k), best(N, k);
    filtered()->settle(indices, given_up, x, W, threads);
    const auto again = filtered();
    again->best_ends(ends, threads);
    again->settle_among(among, best, unproven, ends, k, x, W, threads);
    note(indices, given_up, ends, among, best, unproven);
}

// The largest scores of a batch, and those above a threshold.
static void run_ragged(int64_t N, int64_t L, int64_t D, int64_t k, int64_t capacity, int threads) {
    auto x = Array<float>::random(N, D);
    auto W = Array<float>::random(L, D);
    auto bias = Array<double>::random(L);
    tie(W, bias);
    Array<float> norm(N), residual(N), row_norm(L), row_residual(L);
    measure_rows(norm, residual, Tensor{}, x, threads);
    measure_rows(row_norm, row_residual, Tensor{}, W, threads);
    for (const Among among : {Among::batch, Among::above}) {
        const float least = among == Among::batch ? -INFINITY : 0.25f;
        Screen screen(norm, residual, bias, D, k, capacity, false, among, least);
        screen.filter(product<float>(x, W), 0, row_norm, row_residual, threads);
        const int64_t width = screen.settle_ragged(x, W, threads);
        if (width < 0) continue;
        Array<int32_t> indices(N, std::max<int64_t>(1, width));
        Array<float> scores(N, indices.size[1]);
        screen.write(indices);
        screen.write_scores(scores);
        note(indices, scores);
    }
}

// The scores of all latents, and those of a support. The first sample is infinite.
template <class A, class E>
void run_scores(int64_t N, int64_t L, int64_t D, int64_t k, int threads) {
    auto x = Array<A>::random(N, D);
    auto W = Array<E>::random(L, D);
    auto bias = Array<double>::random(L);
    x.data[0] = INFINITY;
    Array<int32_t> indices(N, k);
    for (int32_t& latent : indices.data) latent = int32_t(generator() % L);
    Array<A> all(N, L), of_support(N, k);
    exact_scores(all, x, W, bias, threads);
    support_scores(of_support, x, W, bias, indices, threads);
    note(all, of_support);
}

// A row as short as its threshold allows, one with group maxima, and one so long that these know their places.
static void run_selection() {
    for (int distinct : {1, 9, 1 << 24}) {
        run_topk_rows<float>(5, 5, distinct);
        run_topk_rows<float>(997, 20, distinct);
        run_topk_rows<float>(20011, 7, distinct);
#ifndef SPARC_FAST_FLOAT32_ONLY
        run_topk_rows<double>(20011, 7, distinct);
#endif
    }
    for (int threads : thread_counts) {
        run_ragged(9, 40, 37, 3, 104, threads), run_ragged(9, 400, 37, 3, 70, threads);
        for (int64_t D : {1, 37, 256, 700}) {  // whole and cut 256 columns
            run_scores<double, double>(9, 5, D, 3, threads);
            run_scores<float, float>(9, 40, D, 3, threads);
            run_scores<float, bf16>(9, 40, D, 1, threads);
        }
        for (int64_t capacity : {80, 400}) {  // 80: too few for 300 of 301
            run_global_topk<float, float>(11, 301, 37, 10, capacity, 100, threads);
            run_global_topk<bf16, float>(11, 301, 37, 10, capacity, 100, threads);
            run_global_topk<bf16, bf16>(11, 301, 37, 10, capacity, 7, threads);
            run_global_topk<float, bf16>(11, 301, 37, 300, capacity, 100, threads);
        }
    }
}

// Rows gathered at random, and spans of a file, each of them up to the last byte of its buffer.
template <class T>
void run_loader(int64_t width, int widening) {
    const int64_t N = 300, n = 150;
    auto window = Array<T>::random(N, width);
    auto batch = Array<float>::random(n, width);
    Array<T> same(n, width), read(n, width);
    Array<int64_t> rows(n), found(6);
    for (int64_t& row : rows.data) row = generator() % N;
    for (int threads : thread_counts) {
        if (widening) gather_rows(batch, window, rows, widening, threads);
        gather_rows(same, window, rows, as_it_is, threads);
    }
    std::FILE* file = std::tmpfile();
    std::fwrite(window.data.data(), sizeof(T), window.data.size(), file);
    std::fflush(file);
    const int64_t bytes = width * sizeof(T);
    const std::vector<int64_t> begins{7 * bytes, 200 * bytes}, lengths{50 * bytes, 100 * bytes};
    will_need(fileno(file), begins, lengths);
    std::tie(found.data[0], found.data[1], found.data[2]) =
        read_spans(fileno(file), begins, lengths, read, widening, true);
    note(batch, same, read);
    // past the end, and of no file
    found.data[3] = std::get<0>(read_spans(fileno(file), {250 * bytes}, {n * bytes}, read, widening, true));
    found.data[4] = std::get<1>(read_spans(-1, begins, lengths, read, widening, true)) != 0;
    std::fclose(file);
    narrow(read.data.back(), std::numeric_limits<double>::infinity());
    found.data[5] = first_not_finite(read, widening);
    note(found);
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
            failures += sum(tasks) != expected;
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
        failures += !caught;
    }
    call();
}

// Small integers, so that there are ties; a latent that all fire has a column of its own.
static void run_nearness(int64_t Q, int64_t N, int64_t L, int threads) {
    struct Rows {
        Array<int64_t> offsets;
        Array<int32_t> latents{0};
        Array<float> values{0};

        Rows(int64_t count, int64_t L) : offsets(count + 1) {
            for (int64_t n = 0; n < count; ++n) {
                for (int64_t l = 0; l < L; ++l)
                    if (l == 0 || generator() % 4 == 0) {
                        latents.data.push_back(int32_t(l));
                        values.data.push_back(float(generator() % 3));
                    }
                offsets.data[n + 1] = latents.size[0] = values.size[0] = latents.data.size();
            }
            latents.data.shrink_to_fit(), values.data.shrink_to_fit();
        }
    } queries(Q, L), rows(N, L);
    Array<int64_t> first(Q), last(Q), higher(Q), equal(Q), nearest(Q, 5);
    Array<float> own(Q), largest(Q, 5);
    for (int64_t n = 0; n < Q; ++n) {
        first.data[n] = N ? generator() % N : 0;
        last.data[n] = std::min<int64_t>(N, first.data[n] + generator() % 3);
    }
    count_nearer(
        own, higher, equal, queries.offsets, queries.latents, queries.values, rows.offsets, rows.latents, rows.values,
        first, last, L, 0.5, threads);
    find_nearest(
        nearest, largest, queries.offsets, queries.latents, queries.values, rows.offsets, rows.latents, rows.values, L,
        threads);
    note(own, higher, equal, nearest, largest);
}

int main() {
    check_threads();
    run_selection();
    for (int threads : thread_counts) {
        run_nearness(40, 9000, 6, threads);  // more than a block
        run_nearness(65, 33, 9, threads);
        run_nearness(3, 0, 2, threads);
        run_nearness(0, 3, 2, threads);
    }
    for (int64_t width : {1, 37, 700}) {
        run_loader<double>(width, as_it_is);
        run_loader<float>(width, as_it_is);
        run_loader<bf16>(width, from_bfloat16);
    }
#ifndef SPARC_FAST_FLOAT32_ONLY
    run_shapes<double>();
    run_shapes<bf16>();
#endif
    run_shapes<float>();
    if (failures) std::printf("%d tasks not done once, or what they threw is lost\n", failures.load());
    std::printf("results %016llx\n", static_cast<unsigned long long>(digest));
    return failures > 0;
}

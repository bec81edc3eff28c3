// The CUDA operators on small ragged shapes, for builds with sanitizers: buffers are exactly as large as their tensors.
// That results are right is the business of the Python tests, but for quotients and for who is given up.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "operators.h"
#include "segment_sums.cuh"

static int failures = 0;
static std::mt19937 generator(0);

static void expect(bool holds, const char* claim, int number) {
    if (holds) return;
    std::printf("%s: case %d\n", claim, number);
    ++failures;
}

struct Shape {
    int N, L, k, threads, capacity, parts, sample, rank;
};

// Numbers of few different values have ties; few bits make a float32 a bfloat16 as well.
static std::vector<float> scores(int count, int kind) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (int i = 0; i < count; ++i) {
        float value = normal(generator);
        if (kind == 1) value = std::round(value);
        if (kind == 2) value = float(i);
        if (kind == 3) value = i % 7 ? -0.f : 0.f;
        if (kind == 4 && i % 5 == 0) value = i % 2 ? NAN : -std::numeric_limits<float>::infinity();
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits &= 0xffff0000;
        std::memcpy(&values[i], &bits, sizeof bits);
    }
    return values;
}

static void run_topk_rows(const Shape& shape, int kind) {
    const int stride = shape.L + 3, words = (shape.N - 1) * stride + shape.L;
    const std::vector<float> wide = scores(words, kind);
    std::vector<uint16_t> narrow(words);
    for (int i = 0; i < words; ++i) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&wide[i]) + 2, 2);
    TopkPlan plan = TopkPlan::of(shape.N, shape.L, shape.k, 1);
    plan.threads = shape.threads, plan.parts = shape.parts;
    plan = plan.for_length(plan.span(shape.L), shape.k);
    if (shape.capacity) plan.capacity = shape.capacity, plan.sample = shape.sample, plan.rank = shape.rank;
    std::vector<char> workspace(topk_rows_workspace(plan, shape.N, shape.k));
    for (const Floats type : {Floats::float32, Floats::bfloat16}) {
        std::vector<int32_t> indices(shape.N * shape.k, -1);
        const void* const data = type == Floats::float32 ? static_cast<const void*>(wide.data()) : narrow.data();
        topk_rows(
            plan, indices.data(), data, type, stride, shape.N, shape.L, shape.k, workspace.data(), 0);
    }
}

// W's numbers as they are stored: small integers are the same in any type, and have sums without a rounding.
static std::vector<uint16_t> bfloat16_of(const std::vector<float>& wide) {
    std::vector<uint16_t> narrow(wide.size());
    for (size_t i = 0; i < wide.size(); ++i) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&wide[i]) + 2, 2);
    return narrow;
}

static uint16_t half_of(float value) { return __half_as_ushort(__float2half_rn(value)); }

static Streams streams_of(const std::vector<int>& widths) {
    Streams streams{int(widths.size()), {}};
    std::partial_sum(widths.begin(), widths.end(), streams.begin + 1);
    return streams;
}

struct Problem {
    int L, D, k, capacity, chunk, threads, sample;
    float residual;  // how far the products may be from the scores, in lengths of a sample
    int given_up;    // samples
};

// The filter by chunks and the choice. Sample 1 holds NaN; the products of the others are the scores.
static void check_global_topk(const Problem& problem, bool copied, int number) {
    const auto [L, D, k, capacity, chunk, threads, sample, residual, expected_given_up] = problem;
    constexpr int N = 3;
    std::vector<float> x(N * D), pre_bias(D, 1), W(L * D), bias(L), norm(L), rest(L, residual), one(L, 1);
    std::vector<float> x_norm(N), x_rest(N), x_one(N, 1);
    std::vector<double> wide_bias(L);
    for (float& v : x) v = 1 + float(generator() % 5) - 2;
    for (float& v : W) v = float(generator() % 3) - 1;
    x[D] = NAN;
    for (int l = 0; l < L; ++l) {
        wide_bias[l] = bias[l] = float(generator() % 9);
        norm[l] = std::sqrt(float(D));
    }
    for (int n = 0; n < N; ++n) x_norm[n] = n == 1 ? NAN : 2 * std::sqrt(float(D));
    std::vector<float> scores(N * L);
    for (int n = 0; n < N; ++n)
        for (int l = 0; l < L; ++l)
            for (int d = 0; d < D; ++d) scores[n * L + l] += (x[n * D + d] - 1) * W[l * D + d];
    std::vector<int32_t> counts(N), thresholds(N), lows(N * capacity), highs(lows), latents(lows), places(lows);
    const Candidates candidates{counts.data(), thresholds.data(), lows.data(),   highs.data(),
                                latents.data(), places.data(),    capacity};
    const Bounds bounds{float(D) * 0x1p-22f, 0, 0x1p-100f};
    for (int first = 0; first < L; first += chunk) {
        const int m = std::min(chunk, L - first);
        std::vector<float> part(N * m);
        for (int n = 0; n < N; ++n) std::copy_n(&scores[n * L + first], m, &part[n * m]);
        const auto of_chunk = [&](const std::vector<float>& all) { return all.data() + first; };
        const FilterPlan plan{threads, first == 0 ? sample : 0};
        const float *const rests = copied ? of_chunk(rest) : nullptr, *const ones = copied ? of_chunk(one) : nullptr;
        filter_scores(
            plan, candidates, part.data(), N, first, m, {of_chunk(bias), of_chunk(norm), rests, ones},
            {x_norm.data(), x_rest.data(), x_one.data()}, k, bounds, 0);
    }
    std::vector<uint16_t> narrow = bfloat16_of(W);
    std::vector<int32_t> indices(N * k, -1), given_up(N, -1);
    int32_t total = 0;
    const Matrix weights = copied ? Matrix{W.data(), D, Floats::float32} : Matrix{narrow.data(), D, Floats::bfloat16};
    const Operands operands{{x.data(), D, Floats::float32}, {pre_bias.data(), 1, Floats::float32}, weights,
                            wide_bias.data(), D};
    const Streams streams = streams_of(D > 1 ? std::vector<int>{D / 2, D - D / 2} : std::vector<int>{1});
    const int S = streams.count;
    std::vector<float> biases(S * L), values(N * S * k);
    const Activations to{{biases.data(), L, Floats::float32}, {values.data(), 0, Floats::float32}};
    settle_supports(
        candidates, operands, streams, to, 0, N, x_norm.data(), norm.data(), k, 0x1p-16f, bounds.slack,
        indices.data(), given_up.data(), &total, 0);
    expect(total == expected_given_up, "samples given up", number);
    const int32_t listed[] = {2, 0}, some = 1;
    support_values(operands, streams, to, {indices.data(), L, k, false, nullptr, nullptr}, N, 0);
    support_values(operands, streams, to, {indices.data(), L, k, false, listed, &some}, N, 0);
}

// All scores by tiles, after the filter has taken in every `apart`-th latent. Sample 1 holds NaN.
static void check_screen_scores(int N, int L, int D, int apart, int blocks, Floats type, int number) {
    constexpr int k = 5, capacity = 60;
    const auto word = [&](float value) { return type == Floats::bfloat16 ? bfloat16_of({value})[0] : half_of(value); };
    const int sampled = (L + apart - 1) / apart;
    std::vector<float> X(N * D), W(L * D), bias(L), norm(L), scores(N * L);
    for (float& v : X) v = float(generator() % 5) - 2;
    for (float& v : W) v = float(generator() % 3) - 1;
    for (float& b : bias) b = float(generator() % 9) / 8;
    if (N > 1) X[D] = NAN;
    std::vector<double> wide_bias(bias.begin(), bias.end());
    std::vector<float> x_norm(N), rest(N), one(N, 1), pre_bias(D);
    const auto norm_of = [&](const float* row) { return std::sqrt(std::inner_product(row, row + D, row, 1e-3f)); };
    for (int n = 0; n < N; ++n) x_norm[n] = norm_of(&X[n * D]);
    for (int l = 0; l < L; ++l) norm[l] = norm_of(&W[l * D]);
    for (int n = 0; n < N; ++n)
        for (int l = 0; l < L; ++l)
            for (int d = 0; d < D; ++d) scores[n * L + l] += X[n * D + d] * W[l * D + d];
    std::vector<uint16_t> narrow_X, narrow_W;
    for (const float v : X) narrow_X.push_back(word(v));
    for (const float v : W) narrow_W.push_back(word(v));
    narrow_X.shrink_to_fit(), narrow_W.shrink_to_fit();
    std::vector<int32_t> counts(N), thresholds(N), lows(N * capacity), highs(lows), latents(lows), places(lows);
    const Candidates candidates{counts.data(), thresholds.data(), lows.data(),   highs.data(),
                                latents.data(), places.data(),    capacity};
    const SampleNorms samples{x_norm.data(), rest.data(), one.data()};
    const Bounds bounds{float(D) * 0x1p-22f, 0, 0x1p-100f};
    std::vector<float> first, first_bias, first_norm;
    for (int l = 0; l < L; l += apart) first_bias.push_back(bias[l]), first_norm.push_back(norm[l]);
    for (int n = 0; n < N; ++n)
        for (int l = 0; l < L; l += apart) first.push_back(scores[n * L + l]);
    filter_scores(
        {32, 0}, candidates, first.data(), N, 0, sampled, {first_bias.data(), first_norm.data(), nullptr, nullptr},
        samples, k, bounds, 0);
    std::vector<char> workspace(screen_scores_workspace(N));
    screen_scores(
        candidates, {narrow_X.data(), D, type}, {narrow_W.data(), D, type}, N, L, D, bias.data(), norm.data(), samples,
        apart, k, bounds, blocks, workspace.data(), 0);
    std::vector<int32_t> indices(N * k, -1), given_up(N, -1);
    int32_t total = 0;
    const Operands operands{{X.data(), D, Floats::float32}, {pre_bias.data(), 1, Floats::float32},
                            {narrow_W.data(), D, type}, wide_bias.data(), D};
    settle_supports(
        candidates, operands, streams_of({D}), {}, 0, N, x_norm.data(), norm.data(), k, 0x1p-16f, bounds.slack,
        indices.data(), given_up.data(), &total, 0);
    expect(total == 0, "samples given up by tiles", number);
}

static void run_invert_indices(int n, int L, int hot, bool few) {
    std::vector<int32_t> indices(n);
    for (int p = 0; p < n; ++p) {
        const int latent = int(generator() % (L + 2)) - 1;  // -1 and L are outside
        indices[p] = int(generator() % 100) < hot ? 0 : latent;
    }
    std::vector<int64_t> offsets(L + 1), entries(n);
    std::vector<char> workspace(invert_indices_workspace(n, L));
    invert_indices(offsets.data(), entries.data(), indices.data(), n, L, few, workspace.data(), 0);
}

static std::vector<float> normal(size_t count) {
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (float& value : values) value = distribution(generator);
    return values;
}

// Quotients of the numbers around multiples of a divisor, up to the largest that a Divisor takes.
static void check_divisor(int divisor) {
    const uint64_t most = std::min(~uint64_t(0) / divisor, uint64_t(1) << 62) - 1;
    for (const uint64_t about : {uint64_t(0), uint64_t(1) << 31, uint64_t(1) << 43, most})
        for (const uint64_t multiple : {about / divisor * divisor, (about / divisor + 1) * divisor})
            for (const uint64_t number : {multiple - 1, multiple, multiple + 1, multiple + divisor - 1})
                if (number <= most)
                    expect(Divisor(divisor).quotient(int64_t(number)) == int64_t(number / divisor), "Divisor", divisor);
}

struct UpdateShape {
    std::vector<int> widths;
    int N, L, k, blocks, piece;
    bool per_stream, lazy, staged = false;
};

// Weights, moments and a bfloat16 copy, each exactly as large as it must be.
struct DeviceRows {
    std::vector<float> w, m, v;
    std::vector<uint16_t> copy;
    int64_t D;

    DeviceRows(int L, int64_t D_) : w(normal(L * D_)), m(normal(L * D_)), v(normal(L * D_)), copy(L * D_), D(D_) {
        for (float& value : v) value = std::abs(value) + 0.1f;
    }
    Rows rows() {
        const auto matrix = [&](auto& data, Floats type) { return Matrix{data.data(), D, type}; };
        return {matrix(w, Floats::float32), matrix(m, Floats::float32), matrix(v, Floats::float32),
                matrix(copy, Floats::bfloat16)};
    }
};

static void run_update_rows(const UpdateShape& shape) {
    const Streams streams = streams_of(shape.widths);
    const int N = shape.N, S = streams.count, L = shape.L, k = shape.k, D = streams.begin[S];
    std::vector<int32_t> indices(N * k * (shape.per_stream ? S : 1));
    for (size_t i = 0; i < indices.size(); ++i) indices[i] = i % 3 ? 0 : int(generator() % (L + 1));  // L is outside
    std::vector<int64_t> offsets(L + 1), entries(indices.size()), last_step(L, -1);
    std::vector<char> room(invert_indices_workspace(indices.size(), L)), used(L);
    invert_indices(offsets.data(), entries.data(), indices.data(), indices.size(), L, false, room.data(), 0);
    for (int l = 0; l < L; ++l) used[l] = offsets[l] < offsets[l + 1];
    std::vector<float> x = normal(N * D), grad_recons = normal(N * S * D), pre_bias = normal(D);
    std::vector<float> values = normal(N * S * k), grad_values = normal(N * S * k);
    std::vector<float> grad_W_enc = normal(L * D), grad_W_dec = normal(L * D), grad_latent_bias(S * L), grad_pre_bias(D);
    for (float& value : values) value = std::max(value, 0.f);
    DeviceRows encoder(L, D), decoder(L, D);
    const auto matrix = [](std::vector<float>& data, int64_t stride) { return Matrix{data.data(), stride, {}}; };
    const Batch batch{
        matrix(x, D), matrix(grad_recons, D), matrix(pre_bias, 1), matrix(values, k), matrix(grad_values, k),
        offsets.data(), entries.data(), int64_t(entries.size()), L, k, shape.per_stream, streams};
    const Gradients gradients{
        matrix(grad_W_enc, D), matrix(grad_W_dec, D), reinterpret_cast<const bool*>(used.data()), L, streams};
    const UpdatePlan plan{shape.blocks, shape.piece, shape.staged};
    const AdamStep adam{0.01, 0.9, 0.999, 1e-3, 3, nullptr, nullptr};
    int64_t* const lazy = shape.lazy ? last_step.data() : nullptr;
    std::vector<char> workspace(update_rows_workspace(plan, entries.size(), L, streams), char(0xa5));
    update_rows(
        plan, grad_latent_bias.data(), grad_pre_bias.data(), encoder.rows(), decoder.rows(), batch, adam, lazy,
        workspace.data(), 0);
    workspace.assign(update_rows_workspace(plan, 0, L, streams), char(0xa5));
    workspace.shrink_to_fit();
    step_rows(plan, encoder.rows(), decoder.rows(), gradients, adam, lazy, workspace.data(), 0);
}

static void run_replay_rows(const std::vector<int>& widths) {
    const Streams streams = streams_of(widths);
    const int L = 5, T = 4;
    DeviceRows decoder(L, streams.begin[streams.count]);
    std::vector<int64_t> latents{3, 0, 4, -1, L}, last_step{1, 0, 2, T, 3};
    std::vector<double> history;
    for (int t = 1; t <= T; ++t) history.insert(history.end(), {0.1 / t, 0.9, 0.999, 1e-3});
    std::vector<char> workspace(replay_rows_workspace(T));
    replay_rows(
        decoder.rows(), latents.data(), latents.size(), L, last_step.data(), history.data(), T, streams,
        workspace.data(), 0);
}

int main() {
    const Shape shapes[] = {
        {1, 1, 1, 32, 0, 1, 0, 0},
        {3, 50, 7, 64, 0, 1, 0, 0},
        {2, 33, 33, 32, 0, 1, 0, 0},
        {2, 900, 5, 64, 200, 1, 128, 30},    // the threshold is a good guess
        {2, 900, 20, 64, 100, 1, 128, 128},  // so low that there is no room
        {2, 900, 20, 64, 200, 1, 128, 1},    // so high that too few are found
        {2, 700, 9, 64, 90, 1, 0, 0},        // none
        {2, 700, 5, 32, 64, 3, 64, 20},      // in parts
        {1, 130, 40, 32, 160, 3, 0, 0},      // the last part has fewer than k
        {1, 130, 70, 32, 102, 1, 0, 0},      // to be sorted, the k largest take more room than there are candidates
    };
    for (const Shape& shape : shapes)
        for (int kind = 0; kind < 5; ++kind) run_topk_rows(shape, kind);
    const Problem problems[] = {
        {1, 1, 1, 1, 1, 32, 0, 0, 0},
        {300, 9, 7, 60, 130, 32, 0, 0, 0},     // the room is used up in every chunk
        {300, 9, 7, 60, 130, 32, 64, 0.1, 0},   // after a sample, and intervals overlap
        {700, 16, 5, 90, 700, 32, 32, 0.07, 0},  // in two steps, with vector loads
        {290, 270, 20, 80, 100, 64, 32, 9, 2},  // no room for intervals so wide
        {40, 9, 40, 40, 13, 32, 0, 1, 0},      // all
    };
    int number = 0;
    for (const Problem& problem : problems) {
        check_global_topk(problem, true, ++number);
        if (problem.given_up == 0) check_global_topk(problem, false, ++number);
    }
    check_screen_scores(3, 700, 72, 2, 2, Floats::bfloat16, 1);  // tiles that end within: of samples, latents, columns
    check_screen_scores(1, 70, 8, 4, 1, Floats::float16, 2);    // in two steps
    for (const int n : {0, 1, 77, 300}) {
        for (const bool few : {false, true}) {
            for (const int L : {1, 5, 700}) run_invert_indices(n, L, 0, few);
            run_invert_indices(n, 40, 50, few);
        }
    }
    run_invert_indices(4200, 3, 80, false);  // one latent takes a block more than one round
    for (int divisor = 1; divisor <= 2048; ++divisor) check_divisor(divisor);
    check_divisor(std::numeric_limits<int>::max());
    const UpdateShape updates[] = {
        {{8, 16}, 5, 9, 3, 3, 4, false, false},  // in vectors, one latent in pieces
        {{16, 8}, 5, 9, 3, 1, 4, true, false, true},  // the same by bulk copies
        {{7, 1, 12}, 4, 10, 3, 2, 3, true, true},
        {{60}, 3, 3, 2, 1, 100, false, true},
        {{9}, 0, 4, 2, 7, 1, false, false},  // no samples
        {{4100, 3}, 3, 2, 2, 2, 2, false, false},  // wider than a block
    };
#ifdef __SANITIZE_THREAD__
    const int widest = 4096;  // it knows no more than 8128 fibres
#else
    const int widest = 5000;
#endif
    for (const UpdateShape& shape : updates)
        if (shape.widths[0] < widest) run_update_rows(shape);
    for (const std::vector<int>& widths : {std::vector<int>{7, 1, 12}, {16, 8}, {4100, 3}})
        if (widths[0] < widest) run_replay_rows(widths);
    return failures != 0;
}

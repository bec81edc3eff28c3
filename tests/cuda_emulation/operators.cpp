// The CUDA operators on small ragged shapes against plain loops, for builds with sanitizers: buffers are exactly as
// large as their tensors. With an argument the largest is left out. Exits with 1 and a line where they disagree.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "global_topk.h"
#include "invert_indices.h"
#include "topk_rows.h"

static int failures = 0;
static std::mt19937 generator(0);

static void expect(bool holds, const char* claim, int number) {
    if (holds) return;
    std::printf("%s: case %d\n", claim, number);
    ++failures;
}

static std::vector<int32_t> largest(const float* row, int L, int k) {
    const auto rank = [&](int32_t l) { return std::isnan(row[l]) ? std::numeric_limits<float>::infinity() : row[l]; };
    std::vector<int32_t> order(L);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return rank(a) > rank(b); });
    order.resize(k);
    std::sort(order.begin(), order.end());
    return order;
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

static void check_topk_rows(const Shape& shape, int kind, int number) {
    const int stride = shape.L + 3, words = (shape.N - 1) * stride + shape.L;
    const std::vector<float> wide = scores(words, kind);
    std::vector<uint16_t> narrow(words);
    for (int i = 0; i < words; ++i) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&wide[i]) + 2, 2);
    TopkPlan plan = TopkPlan::of(shape.N, shape.L, shape.k, 1);
    plan.threads = shape.threads, plan.parts = shape.parts;
    plan = plan.for_length(plan.span(shape.L), shape.k);
    if (shape.capacity) plan.capacity = shape.capacity, plan.sample = shape.sample, plan.rank = shape.rank;
    std::vector<char> workspace(topk_rows_workspace(plan, shape.N, shape.k));
    for (const Scores type : {Scores::float32, Scores::bfloat16}) {
        std::vector<int32_t> indices(shape.N * shape.k, -1);
        const void* const data = type == Scores::float32 ? static_cast<const void*>(wide.data()) : narrow.data();
        topk_rows(
            plan, indices.data(), data, type, stride, shape.N, shape.L, shape.k, workspace.data(), 0);
        for (int n = 0; n < shape.N; ++n) {
            const std::vector<int32_t> exact = largest(&wide[n * stride], shape.L, shape.k);
            expect(std::equal(exact.begin(), exact.end(), &indices[n * shape.k]), "topk_rows", number);
        }
    }
}

// W's numbers as they are stored: small integers are the same in any type, and have sums without a rounding.
static std::vector<uint16_t> bfloat16_of(const std::vector<float>& wide) {
    std::vector<uint16_t> narrow(wide.size());
    for (size_t i = 0; i < wide.size(); ++i) std::memcpy(&narrow[i], reinterpret_cast<const char*>(&wide[i]) + 2, 2);
    return narrow;
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
    const std::vector<uint16_t> narrow = bfloat16_of(W);
    std::vector<int32_t> indices(N * k, -1), given_up(N, -1);
    int32_t total = 0;
    const Numbers weights = copied ? Numbers{W.data(), Scores::float32} : Numbers{narrow.data(), Scores::bfloat16};
    const Operands operands{{x.data(), Scores::float32}, {pre_bias.data(), Scores::float32}, weights, D, D,
                            wide_bias.data(), D};
    settle_supports(
        candidates, operands, 0, N, x_norm.data(), norm.data(), k, 0x1p-16f, bounds.slack, indices.data(),
        given_up.data(), &total, 0);
    expect(total == expected_given_up, "samples given up", number);
    for (int n = 0; n < N; ++n) {
        if (std::count(given_up.begin(), given_up.begin() + total, n)) continue;
        for (int l = 0; l < L; ++l) scores[n * L + l] += n == 1 ? NAN : bias[l];
        const std::vector<int32_t> exact = largest(&scores[n * L], L, k);
        expect(std::equal(exact.begin(), exact.end(), &indices[n * k]), "global_topk", number);
    }
}

static void check_invert_indices(int n, int L, int hot, int number) {
    std::vector<int32_t> indices(n);
    for (int p = 0; p < n; ++p) {
        const int latent = int(generator() % (L + 2)) - 1;  // -1 and L are outside
        indices[p] = int(generator() % 100) < hot ? 0 : latent;
    }
    std::vector<int64_t> offsets(L + 1, -1), entries(n, -1);
    std::vector<char> workspace(invert_indices_workspace(n, L));
    invert_indices(offsets.data(), entries.data(), indices.data(), n, L, workspace.data(), 0);
    std::vector<int64_t> expected_offsets{0}, expected;
    for (int l = 0; l <= L; ++l) {
        for (int p = 0; p < n; ++p)
            if (l < L ? indices[p] == l : indices[p] < 0 || indices[p] >= L) expected.push_back(p);
        if (l < L) expected_offsets.push_back(int64_t(expected.size()));
    }
    expect(offsets == expected_offsets && entries == expected, "invert_indices", number);
}

int main(int count, char**) {
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
    int number = 0;
    for (const Shape& shape : shapes)
        for (int kind = 0; kind < 5; ++kind) check_topk_rows(shape, kind, ++number);
    const Problem problems[] = {
        {1, 1, 1, 1, 1, 32, 0, 0, 0},
        {300, 9, 7, 60, 130, 32, 0, 0, 0},     // the room is used up in every chunk
        {300, 9, 7, 60, 130, 32, 64, 0.1, 0},   // after a sample, and intervals overlap
        {700, 16, 5, 90, 700, 32, 32, 0.07, 0},  // in two steps, with vector loads
        {290, 270, 20, 80, 100, 64, 32, 9, 2},  // no room for intervals so wide
        {40, 9, 40, 40, 13, 32, 0, 1, 0},      // all
    };
    number = 0;
    for (const Problem& problem : problems) {
        check_global_topk(problem, true, ++number);
        if (problem.given_up == 0) check_global_topk(problem, false, ++number);
    }
    number = 0;
    for (const int n : {0, 1, 77, 300}) {
        for (const int L : {1, 5, 700}) check_invert_indices(n, L, 0, ++number);
        check_invert_indices(n, 40, 50, ++number);
    }
    // one latent takes a block more than one round; of this many fibres ThreadSanitizer takes long to tell the order
    if (count == 1) check_invert_indices(4200, 3, 80, ++number);
    return failures != 0;
}

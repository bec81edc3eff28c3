// The inner loops of global_topk: measuring rows, screening a chunk of scores, exact scores.
#include "topk_rows_kernel.h"

namespace SIMD_LEVEL {

// Sums of squares of a row and of what its bfloat16 copy leaves out.
template <class T>
Squares measure_row(const T* w, int64_t D, bf16* copy) {
    constexpr int W = lanes<float>;
    Vec<float> row = {}, rest = {};
    for (int64_t d = 0; d < D; d += W) {
        const int64_t n = std::min<int64_t>(W, D - d);
        const Vec<float> v = load(w + d, n);
        row += v * v;
        if (copy) {
            store(copy + d, v, n);
            const Vec<float> lost = v - load(copy + d, n);
            rest += lost * lost;
        }
    }
    return {total<float>(row), total<float>(rest)};
}

struct Interval {
    Vec<float> lower, upper;
};

// Those of a row's scores in a chunk.
template <class T>
struct Intervals {
    const T* scores;
    const float *bias, *norm, *residual, *slack;
    float p, q, c;

    Intervals(const Screen& screen, int64_t row, const T* scores, const Chunk& chunk)
        : scores(scores),
          bias(screen.bias.data() + chunk.first),
          norm(chunk.norm),
          residual(chunk.residual),
          slack(screen.slack.data() + chunk.first),
          p(screen.p[row]),
          q(screen.q[row]),
          c(screen.c) {}

    // Of n latents from the l-th on.
    INLINE Interval operator()(int64_t l, int64_t n) const {
        const Vec<float> score = load(scores + l, n), negative = -score;
        const Vec<float> magnitude = score < negative ? negative : score;
        const Vec<float> centre = score + load(bias + l, n);
        const Vec<float> error =
            p * load(norm + l, n) + q * load(residual + l, n) + (c * magnitude + load(slack + l, n));
        const Vec<float> lower = centre - error, upper = centre + error, infinity = Vec<float>{} + INFINITY;
        return {lower == lower ? lower : -infinity, upper == upper ? upper : infinity};
    }
};

INLINE int64_t append_interval(const Interval& v, float threshold, int32_t latent, int64_t n, float* lower,
                               float* upper, int32_t* latents) {
#if VECTOR_BYTES == 64
    const __mmask16 valid = __mmask16((1u << n) - 1);
    const __mmask16 mask = _mm512_mask_cmp_ps_mask(valid, v.upper, _mm512_set1_ps(threshold), _CMP_GE_OQ);
    if (!mask) return 0;
    const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(latent), iota);
    _mm512_storeu_ps(lower, _mm512_maskz_compress_ps(mask, v.lower));
    _mm512_storeu_ps(upper, _mm512_maskz_compress_ps(mask, v.upper));
    _mm512_storeu_si512(latents, _mm512_maskz_compress_epi32(mask, numbers));
    return __builtin_popcount(mask);
#else
    if (!any<float>(v.upper >= threshold)) return 0;
    int64_t count = 0;
    for (int i = 0; i < n; ++i) {
        lower[count] = v.lower[i];
        upper[count] = v.upper[i];
        latents[count] = latent + i;
        count += v.upper[i] >= threshold;
    }
    return count;
#endif
}

template <class T>
void screen_row(Screen& screen, int64_t row, const T* scores, const Chunk& chunk, Above<float>& above,
                std::vector<float>& lowers) {
    constexpr int W = lanes<float>;
    int64_t count = screen.count[row];
    if (count < 0) return;
    const Intervals<T> interval(screen, row, scores, chunk);
    if (chunk.first == 0 && chunk.size >= screen.k) {
        lowers.resize(chunk.size);
        for (int64_t l = 0; l < chunk.size; l += W) {
            const int64_t n = std::min<int64_t>(W, chunk.size - l);
            store(lowers.data() + l, interval(l, n).lower, n);
        }
        screen.threshold[row] = find_kth_largest(lowers.data(), lowers.data(), chunk.size, screen.k, above);
    }
    float *const lower = &screen.lower[row * screen.capacity], *const upper = &screen.upper[row * screen.capacity];
    int32_t* const latent = &screen.latent[row * screen.capacity];
    float threshold = screen.threshold[row];
    for (int64_t l = 0; l < chunk.size; l += W) {
        if (count + W > screen.capacity) {
            screen.count[row] = count;
            if (!screen.compact(row)) return;
            count = screen.count[row], threshold = screen.threshold[row];
        }
        const int64_t n = std::min<int64_t>(W, chunk.size - l);
        count += append_interval(
            interval(l, n), threshold, chunk.first + l, n, lower + count, upper + count, latent + count);
    }
    screen.count[row] = count;
}

INLINE Vec<double> load_wide(const double* p) { return load(p); }

INLINE Vec<double> load_wide(const float* p) {
#if VECTOR_BYTES == 64
    return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(p));
#else
    typename vector_of<float, VECTOR_BYTES / 2>::type narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, Vec<double>);
#endif
}

INLINE Vec<double> load_wide(const bf16* p) {
    float wide[lanes<double>];
    for (int i = 0; i < lanes<double>; ++i) {
        const uint32_t bits = uint32_t(p[i].bits) << 16;
        std::memcpy(&wide[i], &bits, sizeof bits);
    }
    return load_wide(wide);
}

// The dot products of J rows x with w, while `ahead`, the next weights, come into cache: 256 sums of every 256th product,
// then neighbours two by two. A product of two float32 is exact in float64, one of two float64 is rounded before it is
// added: the same bits at every instruction set, and on every backend.
template <int J, class T, class E>
INLINE void dots_of(const T* const* x, const E* w, int64_t D, const void* ahead, double* dots) {
    constexpr int sums_each = 256, width = 16, W = lanes<double>, V = width / W;
    alignas(64) double sums[J][sums_each];
    const int64_t used = std::min<int64_t>(sums_each, (D + width - 1) / width * width);
    for (int64_t first = 0; first < used; first += width) {
        Vec<double> sum[J][V] = {};
        const auto add = [&](auto row, const E* weights) INLINE_LAMBDA {
            UNROLL for (int v = 0; v < V; ++v) {
                const Vec<double> factor = load_wide(weights + v * W);
                UNROLL for (int j = 0; j < J; ++j) {
                    Vec<double> product = load_wide(row(j) + v * W) * factor;
                    if constexpr (sizeof(T) == sizeof(double)) KEEP_IN_REGISTER(product);
                    sum[j][v] += product;
                }
            }
        };
        int64_t d = first;
        for (; d + width <= D; d += sums_each) {
            __builtin_prefetch(static_cast<const char*>(ahead) + d * sizeof(E), 0, 2);
            add([&](int j) INLINE_LAMBDA { return x[j] + d; }, w + d);
        }
        if (d < D) {
            T rest[J][width] = {};
            E weights[width] = {};
            std::copy(w + d, w + D, weights);
            for (int j = 0; j < J; ++j) std::copy(x[j] + d, x[j] + D, rest[j]);
            add([&](int j) INLINE_LAMBDA { return rest[j]; }, weights);
        }
        for (int j = 0; j < J; ++j) std::memcpy(sums[j] + first, sum[j], sizeof sum[j]);
    }
    for (int j = 0; j < J; ++j) {
        std::fill(sums[j] + used, sums[j] + sums_each, 0.0);
        // two buffers in turn, so that a level is summed in vectors
        alignas(64) double half[sums_each / 2], quarter[sums_each / 4];
        const auto pairs = [](const double* __restrict from, double* __restrict to, int many) INLINE_LAMBDA {
            for (int i = 0; i < many; ++i) to[i] = from[2 * i] + from[2 * i + 1];
        };
        pairs(sums[j], half, 128), pairs(half, quarter, 64), pairs(quarter, half, 32), pairs(half, quarter, 16);
        pairs(quarter, half, 8), pairs(half, quarter, 4), pairs(quarter, half, 2), pairs(half, quarter, 1);
        dots[j] = quarter[0];
    }
}

template <class T, class E>
void exact_dots(const T* const* x, int64_t count, const E* w, int64_t D, const void* ahead, double* dots) {
    constexpr int J = VECTOR_REGISTERS / 8;
    static_assert(J == 2 || J == 4);
    int64_t i = 0;
    for (; i + J <= count; i += J) dots_of<J, T, E>(x + i, w, D, ahead, dots + i);
    if (count - i == 3) dots_of<3, T, E>(x + i, w, D, ahead, dots + i);
    if (count - i == 2) dots_of<2, T, E>(x + i, w, D, ahead, dots + i);
    if (count - i == 1) dots_of<1, T, E>(x + i, w, D, ahead, dots + i);
}

}  // namespace SIMD_LEVEL

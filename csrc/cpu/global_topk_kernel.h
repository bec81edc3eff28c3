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

template <class T>
INLINE Interval interval(const Screen& screen, int64_t row, const T* scores, const Chunk& chunk, int64_t l, int64_t n) {
    const Vec<float> score = load(scores + l, n), negative = -score;
    const Vec<float> magnitude = score < negative ? negative : score;
    const Vec<float> centre = score + load(screen.bias.data() + chunk.first + l, n);
    const Vec<float> error = screen.p[row] * load(chunk.norm + l, n) + screen.q[row] * load(chunk.residual + l, n) +
                             (screen.c * magnitude + load(screen.slack.data() + chunk.first + l, n));
    const Vec<float> lower = centre - error, upper = centre + error, infinity = Vec<float>{} + INFINITY;
    return {lower == lower ? lower : -infinity, upper == upper ? upper : infinity};
}

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
    if (screen.count[row] < 0) return;
    if (chunk.first == 0 && chunk.size >= screen.k) {
        lowers.resize(chunk.size);
        for (int64_t l = 0; l < chunk.size; l += W) {
            const int64_t n = std::min<int64_t>(W, chunk.size - l);
            store(lowers.data() + l, interval(screen, row, scores, chunk, l, n).lower, n);
        }
        screen.threshold[row] = find_kth_largest(lowers.data(), chunk.size, screen.k, above);
    }
    const int64_t offset = row * screen.capacity;
    for (int64_t l = 0; l < chunk.size; l += W) {
        if (screen.count[row] + W > screen.capacity && !screen.compact(row, above.work)) return;
        const int64_t n = std::min<int64_t>(W, chunk.size - l), end = offset + screen.count[row];
        screen.count[row] += append_interval(
            interval(screen, row, scores, chunk, l, n), screen.threshold[row], chunk.first + l, n,
            screen.lower.get() + end, screen.upper.get() + end, screen.latent.get() + end);
    }
}

template <class T>
void widen_row(const T* w, int64_t D, double* wide) {
    for (int64_t d = 0; d < D; ++d) {
        if constexpr (std::is_same_v<T, bf16>) {
            const uint32_t bits = uint32_t(w[d].bits) << 16;
            float value;
            std::memcpy(&value, &bits, sizeof value);
            wide[d] = value;
        } else {
            wide[d] = w[d];
        }
    }
}

INLINE Vec<double> load_wide(const double* p) { return load(p); }

INLINE Vec<double> load_wide(const float* p) {
    typename vector_of<float, VECTOR_BYTES / 2>::type narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(narrow, Vec<double>);
}

// The dot products of J rows x with w, while the rows `ahead` come into cache. A product of two float32 is exact in
// float64, and every sum runs over the same 32 lanes in the same order: the same bits at every instruction set.
template <int J, class T>
INLINE void dots_of(const T* const* x, const T* const* ahead, const double* w, int64_t D, double* dots) {
    constexpr int width = 32, W = lanes<double>, V = width / W;
    double sums[J][width];
    Vec<double> sum[J][V] = {};
    int64_t d = 0;
    for (; d + width <= D; d += width) {
        UNROLL for (int j = 0; j < J; ++j) {
            __builtin_prefetch(ahead[j] + d);
            __builtin_prefetch(ahead[j] + d + width / 2);
            UNROLL for (int v = 0; v < V; ++v) {
                sum[j][v] += load_wide(x[j] + d + v * W) * load(w + d + v * W);
            }
        }
    }
    for (int j = 0; j < J; ++j) {
        std::memcpy(sums[j], sum[j], sizeof sums[j]);
        for (int64_t i = d; i < D; ++i) sums[j][i - d] += double(x[j][i]) * w[i];
        for (int half = width / 2; half; half /= 2)
            for (int i = 0; i < half; ++i) sums[j][i] += sums[j][i + half];
        dots[j] = sums[j][0];
    }
}

template <class T>
void exact_dots(const T* const* x, int64_t count, const double* w, int64_t D, double* dots) {
    constexpr int J = 2;
    int64_t i = 0;
    for (; i + J <= count; i += J) dots_of<J, T>(x + i, x + std::min(i + J, count - J), w, D, dots + i);
    for (; i < count; ++i) dots_of<1, T>(x + i, x + i, w, D, dots + i);
}

}  // namespace SIMD_LEVEL

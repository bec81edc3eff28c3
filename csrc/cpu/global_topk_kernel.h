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
void lower_ends_of_row(const Screen& screen, int64_t row, const T* scores, const Chunk& chunk, float* lower) {
    constexpr int W = lanes<float>;
    const Intervals<T> interval(screen, row, scores, chunk);
    for (int64_t l = 0; l < chunk.size; l += W) {
        const int64_t n = std::min<int64_t>(W, chunk.size - l);
        store(lower + l, interval(l, n).lower, n);
    }
}

template <class T>
void screen_row(Screen& screen, int64_t row, const T* scores, const Chunk& chunk, Above<float>& above,
                std::vector<float>& lowers) {
    constexpr int W = lanes<float>;
    int64_t count = screen.count[row];
    if (count < 0) return;
    const Intervals<T> interval(screen, row, scores, chunk);
    if (screen.among == Among::row && chunk.first == 0 && chunk.size >= screen.k) {
        lowers.resize(chunk.size);
        lower_ends_of_row(screen, row, scores, chunk, lowers.data());
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

// [a0 + a1, b0 + b1, a2 + a3, b2 + b3, ...]
INLINE Vec<double> add_neighbours(Vec<double> a, Vec<double> b) {
#if VECTOR_BYTES == 64
    return (Vec<double>)_mm512_maskz_unpacklo_pd(0xff, a, b) + (Vec<double>)_mm512_maskz_unpackhi_pd(0xff, a, b);
#elif VECTOR_BYTES == 32
    return (Vec<double>)_mm256_unpacklo_pd(a, b) + (Vec<double>)_mm256_unpackhi_pd(a, b);
#else
    return Vec<double>{a[0], b[0]} + Vec<double>{a[1], b[1]};
#endif
}

// The same of pairs of lanes: [a01 + a23, a45 + a67, b01 + b23, b45 + b67].
INLINE Vec<double> add_neighbouring_pairs(Vec<double> a, Vec<double> b) {
#if VECTOR_BYTES == 64
    return (Vec<double>)_mm512_maskz_shuffle_f64x2(0xff, a, b, 0x88) +
           (Vec<double>)_mm512_maskz_shuffle_f64x2(0xff, a, b, 0xdd);
#elif VECTOR_BYTES == 32
    return (Vec<double>)_mm256_permute2f128_pd(a, b, 0x20) + (Vec<double>)_mm256_permute2f128_pd(a, b, 0x31);
#else
    return a + b;  // not called: one pair is a vector
#endif
}

// Each of `many` vectors, `stride` apart, summed neighbours two by two.
template <int many>
INLINE Vec<double> totals(const Vec<double>* v, int stride) {
    if constexpr (many == 2)
        return add_neighbours(v[0], v[stride]);
    else
        return add_neighbouring_pairs(totals<many / 2>(v, stride), totals<many / 2>(v + many / 2 * stride, stride));
}

// Lane i: the sum of `many` neighbouring vectors from the (i stride)-th on, neighbours two by two.
template <int many>
INLINE Vec<double> sums_of_groups(const Vec<double>* v, int stride) {
    if constexpr (many == 1)
        return totals<lanes<double>>(v, stride);
    else
        return sums_of_groups<many / 2>(v, stride) + sums_of_groups<many / 2>(v + many / 2, stride);
}

// The dot product of two rows: 256 sums of every 256th product, then neighbours two by two. A product of two float32 is
// exact in float64, one of two float64 is rounded before it is added: the same bits at every instruction set, and on
// every backend. A narrow w is also written to `wide`, if any. Meanwhile the beginning of `then`, the next row, comes into
// cache, and what lies between `ahead` and `end`.
template <class T, class E>
INLINE double dot_of(
    const T* x, const T* then, const E* w, int64_t D, double* wide, const char* ahead, const char* end) {
    constexpr int W = lanes<double>, vectors = 256 / W, piece = 64, groups = vectors / W;
    constexpr bool widens = sizeof(E) < sizeof(double);
    Vec<double> sum[vectors] = {};  // in registers where there are 32 of 64 bytes
    const auto add = [&](const T* row, const T* next, const E* weights, int64_t at, int64_t columns) INLINE_LAMBDA {
        UNROLL for (int first = 0; first < 256; first += piece) {
            if (first >= columns) break;
            UNROLL for (int c = first; c < first + piece; c += W) {
                // each load is one of 32: the hardware, which fetches ahead by instruction, does not see one stream
                if (!widens && c % (64 / int(sizeof(T))) == 0) __builtin_prefetch(next + c);
                const Vec<double> factor = load_wide(weights + c);
                if (widens && wide) store(wide + at + c, factor);
                Vec<double> product = load_wide(row + c) * factor;
                if constexpr (sizeof(T) == sizeof(double)) KEEP_IN_REGISTER(product);
                sum[c / W] += product;
            }
        }
    };
    int64_t d = 0;
    for (; d + 256 <= D; d += 256) {
        for (const char* stop = end - (end - ahead) * (D - d - 256) / D; ahead < stop; ahead += 64)
            __builtin_prefetch(ahead);
        add(x + d, d + 256 < D ? x + d + 256 : then, w + d, d, 256);
    }
    for (; ahead < end; ahead += 64) __builtin_prefetch(ahead);
    if (d < D) {
        T rest[256] = {};
        E weights[256] = {};
        std::copy(x + d, x + D, rest);
        std::copy(w + d, w + D, weights);
        add(rest, then, weights, d, D - d);
    }
    Vec<double> total = sums_of_groups<groups>(sum, groups);
    total = add_neighbours(total, total);
    for (int i = 2; i < W; i *= 2) total = add_neighbouring_pairs(total, total);
    return total[0];
}

// The dot products of rows x with w, while `ahead`, the next w, comes into cache, a part with each row.
template <class T, class E>
void exact_dots(
    const T* const* x, int64_t count, const E* w, int64_t D, const E* ahead, std::vector<Line>& wide, double* dots) {
    const int64_t lines = (D * sizeof(E) + 63) / 64;
    const auto part = [&](int64_t i) { return reinterpret_cast<const char*>(ahead) + lines * i / count * 64; };
    const bool widens = sizeof(E) < sizeof(double) && count > 1;
    if (widens) wide.resize((D + 255) / 256 * 32);
    double* const copy = widens ? wide[0].lane : nullptr;
    for (int64_t i = 0; i < count; ++i) {
        const T* const then = x[std::min(i + 1, count - 1)];
        if (widens && i > 0)
            dots[i] = dot_of<T, double>(x[i], then, copy, D, nullptr, part(i), part(i + 1));
        else
            dots[i] = dot_of<T, E>(x[i], then, w, D, copy, part(i), part(i + 1));
    }
}

}  // namespace SIMD_LEVEL

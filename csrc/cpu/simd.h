// One vector register of the instruction set being compiled (every_level.h): loads widen, stores narrow.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "tensor.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef INLINE
// Unoptimised code is to be compiled soon: it is there once, not wherever it is called.
#ifdef __OPTIMIZE__
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#else
#define INLINE inline
#define INLINE_LAMBDA
#define UNROLL
#endif
// The compiler would read a row from memory again for each stream that uses it.
#if defined(__x86_64__)
#define KEEP_IN_REGISTER(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define KEEP_IN_REGISTER(vector) asm("" : "+w"(vector))
#else
#define KEEP_IN_REGISTER(vector)
#endif
#endif

namespace SIMD_LEVEL {

template <class E, int bytes>
struct vector_of {
    typedef E type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename vector_of<A, VECTOR_BYTES>::type;
template <class A>
constexpr int lanes = VECTOR_BYTES / sizeof(A);

// One 16-bit number a lane. The compiler would convert halves of a vector and put them together.
using Halves = typename vector_of<uint16_t, VECTOR_BYTES / 2>::type;

INLINE Vec<uint32_t> widened(Halves v) {
#if VECTOR_BYTES == 64
    return (Vec<uint32_t>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v);
#elif VECTOR_BYTES == 32
    return (Vec<uint32_t>)_mm256_cvtepu16_epi32((__m128i)v);
#else
    return __builtin_convertvector(v, Vec<uint32_t>);
#endif
}

INLINE Halves narrowed(Vec<uint32_t> v) {
#if VECTOR_BYTES == 64
    return (Halves)_mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v);
#else
    return __builtin_convertvector(v, Halves);
#endif
}

INLINE Vec<float> load(const float* p) {
    Vec<float> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE Vec<double> load(const double* p) {
    Vec<double> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

INLINE Vec<float> load(const bf16* p) {
    Halves bits;
    std::memcpy(&bits, p, sizeof bits);
    return (Vec<float>)(widened(bits) << 16);
}

// Exact, subnormal numbers too, whatever the processor does with those of float32.
INLINE Vec<float> load(const f16* p) {
    Halves narrow;
    std::memcpy(&narrow, p, sizeof narrow);
#if VECTOR_BYTES == 64
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)narrow);
#endif
    const auto bits = widened(narrow);
    const auto shifted = (bits & 0x7fff) << 13, exponent = shifted & 0x0f800000;
    const auto special = (Vec<uint32_t>)(exponent == 0x0f800000), tiny = (Vec<uint32_t>)(exponent == 0);
    const auto normal = shifted + (112u << 23) + (special & (112u << 23));
    const Vec<float> least = (Vec<float>)(Vec<uint32_t>{} + (113u << 23));  // 2^-14
    const auto subnormal = (Vec<uint32_t>)((Vec<float>)(shifted + (113u << 23)) - least);
    return (Vec<float>)((tiny & subnormal) | (~tiny & normal) | (bits & 0x8000) << 16);
}

INLINE void store(float* p, Vec<float> v) { std::memcpy(p, &v, sizeof v); }
INLINE void store(double* p, Vec<double> v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
INLINE void store(bf16* p, Vec<float> v) {
    const auto bits = (Vec<uint32_t>)v;
    const auto rounded = bits + 0x7fff + (bits >> 16 & 1);
    const auto chosen = ((Vec<uint32_t>)(v == v) & rounded) | ((Vec<uint32_t>)(v != v) & (bits | 0x400000));
    const Halves narrow = narrowed(chosen >> 16);
    std::memcpy(p, &narrow, sizeof narrow);
}

// The first n lanes, the others 0.
template <class T>
INLINE Vec<sum_t<T>> load(const T* p, int64_t n) {
    if (n >= lanes<sum_t<T>>) return load(p);
    T lane[lanes<sum_t<T>>] = {};
    for (int64_t i = 0; i < n; ++i) lane[i] = p[i];
    return load(lane);
}

template <class T>
INLINE void store(T* p, Vec<sum_t<T>> v, int64_t n) {
    if (n >= lanes<sum_t<T>>) return store(p, v);
    T lane[lanes<sum_t<T>>];
    store(lane, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
}

// As store, or past the caches, which would read every line before it is written: `past` only where p is aligned.
// finish_past_caches() before another thread looks.
template <class T>
INLINE void store(T* p, Vec<sum_t<T>> v, int64_t n, [[maybe_unused]] bool past) {
#if defined(__x86_64__)
    if constexpr (std::is_same_v<T, float>) {
        if (past && n >= lanes<float>) {
#if VECTOR_BYTES == 64
            return _mm512_stream_ps(p, (__m512)v);
#elif VECTOR_BYTES == 32
            return _mm256_stream_ps(p, (__m256)v);
#else
            return _mm_stream_ps(p, (__m128)v);
#endif
        }
    }
#endif
    store(p, v, n);
}

INLINE void finish_past_caches() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

INLINE bool aligned(const void* p) { return uintptr_t(p) % VECTOR_BYTES == 0; }

// The sum of all lanes, halves first.
template <class A, int bytes = VECTOR_BYTES>
INLINE A total(typename vector_of<A, bytes>::type v) {
    if constexpr (bytes == 2 * sizeof(A)) {
        return v[0] + v[1];
    } else {
        typename vector_of<A, bytes / 2>::type half[2];
        std::memcpy(half, &v, bytes);
        return total<A, bytes / 2>(half[0] + half[1]);
    }
}

template <class A>
INLINE Vec<A> square_root(Vec<A> v) {
    UNROLL for (int i = 0; i < lanes<A>; ++i) v[i] = std::sqrt(v[i]);
    return v;
}

template <class A>
INLINE Vec<A> magnitude(Vec<A> v) {
    return v < 0 ? -v : v;
}

}  // namespace SIMD_LEVEL

// Floats as they lie in memory.
#pragma once
#include "device.cuh"

struct Float32 {
    using Word = uint32_t;
    __device__ static float value(Word word) { return __uint_as_float(word); }
};

struct BFloat16 {
    using Word = uint16_t;
    __device__ static float value(Word word) { return __uint_as_float(uint32_t(word) << 16); }
    // To nearest, ties to even; any NaN becomes one.
    __device__ static Word word(float value) { return Word(packed_bfloat16(value, 0)); }
    __device__ static uint32_t pair(float first, float second) { return packed_bfloat16(first, second); }
};

struct Float16 {
    using Word = uint16_t;
    __device__ static float value(Word word) { return __half2float(__ushort_as_half(word)); }
    __device__ static Word word(float value) { return Word(packed_float16(value, 0)); }
    __device__ static uint32_t pair(float first, float second) { return packed_float16(first, second); }
};

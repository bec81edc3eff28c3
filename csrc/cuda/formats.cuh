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
    // To nearest, ties to even; any NaN becomes that of torch.
    __device__ static Word word(float value) {
        const uint32_t bits = __float_as_uint(value);
        return value == value ? Word((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : Word(0x7fc0);
    }
};

struct Float16 {
    using Word = uint16_t;
    __device__ static float value(Word word) { return __half2float(__ushort_as_half(word)); }
    __device__ static Word word(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

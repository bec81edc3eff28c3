// Compiles OPERATOR, a file of this folder, once for each instruction set, into a namespace of that name.
#define SIMD_LEVEL baseline
#define VECTOR_BYTES 16
#define VECTOR_REGISTERS 16
#include "simd.h"
#include OPERATOR
#undef SIMD_LEVEL
#undef VECTOR_BYTES
#undef VECTOR_REGISTERS

#ifdef SPARC_FAST_EVERY_LEVEL
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define SIMD_LEVEL avx2
#define VECTOR_BYTES 32
#define VECTOR_REGISTERS 16
#include "simd.h"
#include OPERATOR
#undef SIMD_LEVEL
#undef VECTOR_BYTES
#undef VECTOR_REGISTERS
#ifdef __clang__
#pragma clang attribute pop
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
#endif
#define SIMD_LEVEL avx512
#define VECTOR_BYTES 64
#define VECTOR_REGISTERS 32
#include "simd.h"
#include OPERATOR
#undef SIMD_LEVEL
#undef VECTOR_BYTES
#undef VECTOR_REGISTERS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

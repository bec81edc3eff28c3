// What the kernels are written in: CUDA, or its emulation on the host (tests/cuda_emulation).
#pragma once
#include <cstdint>

#ifdef SPARC_FAST_EMULATE_CUDA

#include "cuda_emulation.h"

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, uintptr_t,
    Arguments... arguments) {
    if (blocks == 0) return;
    const auto run = [&] { kernel(arguments...); };
    emulation::launch({unsigned(blocks), 1, 1}, {unsigned(threads), 1, 1}, shared_bytes, run);
}

__device__ inline char* shared_memory() { return emulation::shared_memory(); }

struct Kept {
    uint4 operator()(const uint4* p) const { return __ldg(p); }
};

__device__ inline void prefetch(const void*) {}

#else

#include <cuda_fp16.h>

#include <stdexcept>
#include <string>

inline void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// kernel<<<blocks, threads, shared_bytes, stream>>>(arguments ...) on the current device; no blocks start nothing.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, uintptr_t stream,
    Arguments... arguments) {
    if (blocks == 0) return;
    if (shared_bytes > 48 << 10)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
    kernel<<<unsigned(blocks), threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
    check(cudaGetLastError());
}

__device__ inline char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

// Reads what other blocks will read again: the L2 cache gives it up last, and the first-level cache is spared. Nothing
// may write there during the kernel.
class Kept {
   public:
    __device__ Kept() { asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy)); }
    __device__ uint4 operator()(const uint4* p) const {
        uint4 v;
        asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
            : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
            : "l"(p), "l"(policy));
        return v;
    }

   private:
    uint64_t policy;
};

// Brings the 128 bytes around p into the L2 cache.
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// 1 / a, at most one unit in the last place off; of numbers beyond 2^126, and below the normal ones, that of infinity
// and that of 0.
__device__ inline float approximate_reciprocal(float a) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
}

// At most one unit in the last place off.
__device__ inline float approximate_root(float a) {
    float result;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
    return result;
}

// Two numbers in 32 bits, the first in the lower half, each rounded to nearest, ties to even.
__device__ inline uint32_t packed_bfloat16(float first, float second) {
    uint32_t result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

__device__ inline uint32_t packed_float16(float first, float second) {
    uint32_t result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(second), "f"(first));
    return result;
}

#endif

constexpr unsigned all_lanes = ~0u;

template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
    return a < b ? a : b;
}

template <class T>
__host__ __device__ constexpr T larger(T a, T b) {
    return a < b ? b : a;
}

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}

// The least power of two that is at least n.
__host__ __device__ constexpr int power_of_two(int n) {
    int size = 1;
    while (size < n) size *= 2;
    return size;
}

// Deals out the shared memory of a block, array by array. Made from nothing it only counts, which the host does to know
// how many bytes to ask for.
class SharedMemory {
   public:
    __host__ __device__ SharedMemory() : counts(true), begin(nullptr) {}
    // From shared_memory(). An address made from a number would be one of any memory to the compiler.
    __device__ explicit SharedMemory(char* memory) : counts(false), begin(memory) {}

    template <class T>
    __host__ __device__ T* take(int count) {
        const size_t first = ceil_div(next, alignof(T)) * alignof(T);
        next = first + count * sizeof(T);
#ifdef SPARC_FAST_EMULATE_CUDA
        if (!counts) emulation::forbid(begin + next, emulation::red_zone);
        next += emulation::red_zone;
#endif
        return counts ? nullptr : reinterpret_cast<T*>(begin + first);
    }

    __host__ __device__ size_t bytes() const { return next; }

   private:
    bool counts;
    char* begin;
    size_t next = 0;
};

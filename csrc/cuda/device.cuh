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

struct TransactionBarrier {
    uint64_t* at;

    void begin(unsigned arrivals) const { emulation::begin_transactions(at, arrivals); }
    void arrive(WHERE) const { emulation::arrive(at, 0, where); }
    void arrive_expecting(unsigned bytes, WHERE) const { emulation::arrive(at, bytes, where); }
    void wait(unsigned parity, WHERE) const { emulation::wait_for_phase(at, parity, where); }
};

inline void fence_barriers() { emulation::fence_transactions(); }

inline void bulk_copy(void* to, const void* from, unsigned bytes, TransactionBarrier barrier, WHERE) {
    emulation::bulk_copy(to, from, bytes, barrier.at, where);
}

inline bool has_bulk_copies() { return true; }

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
    extern __shared__ __align__(1024) char memory[];  // as tiles must begin
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

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define SINCE_SM_90(...) asm volatile(__VA_ARGS__)
#else
#define SINCE_SM_90(...) __trap()
#endif

__device__ inline uint32_t in_shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// An mbarrier in shared memory, since sm_90. A phase ends when all have arrived, and all bytes that they expect. Waiting
// with a parity goes on once a phase of that parity is over: at first 1 waits for nothing.
struct TransactionBarrier {
    uint64_t* at;

    __device__ void begin(unsigned arrivals) const {
        SINCE_SM_90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(in_shared(at)), "r"(arrivals) : "memory");
    }
    __device__ void arrive() const {
        SINCE_SM_90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(in_shared(at)) : "memory");
    }
    __device__ void arrive_expecting(unsigned bytes) const {
        SINCE_SM_90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(at)), "r"(bytes) : "memory");
    }
    __device__ void wait(unsigned parity) const {
        SINCE_SM_90(
            "{\n.reg .pred over;\n"
            "again: mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
            "@!over bra again;\n}" ::"r"(in_shared(at)), "r"(parity)
            : "memory");
    }
};

// After barriers begin, and before __syncthreads: without it bulk copies need not see them.
__device__ inline void fence_barriers() { SINCE_SM_90("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Of whole 16 bytes, on 16 bytes, from memory that is read once to shared memory; the barrier hears of it.
__device__ inline void bulk_copy(void* to, const void* from, unsigned bytes, TransactionBarrier barrier) {
    SINCE_SM_90(
        "{\n.reg .b64 policy;\n"
        "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], policy;\n}"
        ::"r"(in_shared(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(in_shared(barrier.at))
        : "memory");
}

// Of the current device.
inline bool has_bulk_copies() {
    int device, major;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    return major >= 9;
}

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

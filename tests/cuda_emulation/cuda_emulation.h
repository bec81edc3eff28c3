// Enough of CUDA to compile the kernels of csrc/cuda as plain C++ and to run them on the host.
//
// Blocks run one after the other. The threads of a block are fibres of one thread of the host: each runs until it meets
// a barrier or a warp's vote, so a run can be repeated exactly. CUDA_EMULATION_SCHEDULE chooses the order they run in:
// 0 first to last, 1 last to first, any other number a shuffled order, in which they also pause at atomics.
//
// What stops a launch with an error: a bulk copy to a barrier before a fence, or one that nobody waited for; a product
// of tiles before a fence of its sums; a barrier that not every thread of the block meets, or at different lines; a vote
// or shuffle that a lane of its mask never meets; a mask without the lane itself. Sums of products are NaN, and their
// tiles are unread, until they are waited for. Shared memory starts as rubbish, and
// under AddressSanitizer no thread may touch the gaps between its arrays. Under ThreadSanitizer each fibre counts as a
// thread, of blocks that run at once, and only what orders threads on a GPU orders them here: __syncthreads,
// __syncwarp, and the end of a launch. So a missing barrier is found whatever the order, and no race is left to luck.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static  // the blocks of a launch find what the one before left

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct __half {
    uint16_t bits;
};
using cudaStream_t = void*;

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulation {

using Where = std::source_location;
constexpr size_t red_zone = 32;  // bytes after each array in shared memory that nobody may touch

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);
char* shared_memory();
void forbid(const void* begin, size_t bytes);
void pause_at_atomic();

enum class Vote { sync, values };
// Waits for all lanes of the mask, and hands back what each of them brought: an array by lane.
const uint64_t* meet(Vote vote, unsigned mask, uint64_t value, Where where);
// Waits for all threads of the block; the number of those that brought true.
int barrier(bool predicate, Where where);
unsigned lane();

// An mbarrier is known by its address. A phase ends with `count` arrivals and the bytes that were announced with them. A
// bulk copy makes rubbish of its target at once, and arrives when nothing else can go on, or at any time.
void begin_transactions(const uint64_t* at, unsigned count);
void fence_transactions();
void arrive(const uint64_t* at, unsigned bytes, Where where);
void wait_for_phase(const uint64_t* at, unsigned parity, Where where);
void bulk_copy(void* to, const void* from, unsigned bytes, const uint64_t* at, Where where);

// A matrix of 16-bit numbers, cut into tiles of 64 columns.
struct TileMap {
    const char* data;
    int64_t rows, columns, apart;
    int rows_of_tile;
    bool swizzled;
};
TileMap map_tiles(const void* data, int64_t rows, int64_t columns, int64_t apart, int rows_of_tile);
void load_tile(void* to, const TileMap& map, int column, int row, const uint64_t* at, Where where);
uint32_t in_shared(const void* p);  // what a descriptor takes for an address

// Products of tiles by 128 threads, each its own part of the sums when it waits.
void begin_products();
void multiply(float (&sums)[128], uint64_t a, uint64_t b, bool adds, float (*value)(uint16_t), Where where);
void commit_products();
void wait_for_products(unsigned pending, Where where);

template <class T>
uint64_t packed(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    return bits;
}
template <class T>
T unpacked(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <class T, class Combine>
T reduced(unsigned mask, T value, Combine combine, Where where) {
    const uint64_t* all = meet(Vote::values, mask, packed(value), where);
    T result{};
    bool first = true;
    for (unsigned i = 0; i < 32; ++i)
        if (mask >> i & 1) {
            result = first ? unpacked<T>(all[i]) : combine(result, unpacked<T>(all[i]));
            first = false;
        }
    return result;
}

// The value of lane `from`, or this lane's own where that lies outside its group of `width`.
template <class T>
T shuffled(unsigned mask, T value, int from, bool inside, Where where) {
    const uint64_t* all = meet(Vote::values, mask, packed(value), where);
    return inside ? unpacked<T>(all[from & 31]) : value;
}

}  // namespace emulation

#define WHERE emulation::Where where = emulation::Where::current()

inline void __syncthreads(WHERE) { emulation::barrier(false, where); }
inline int __syncthreads_count(int predicate, WHERE) { return emulation::barrier(predicate, where); }
inline int __syncthreads_or(int predicate, WHERE) { return emulation::barrier(predicate, where) > 0; }
inline int __syncthreads_and(int predicate, WHERE) { return emulation::barrier(!predicate, where) == 0; }
inline void __syncwarp(unsigned mask = ~0u, WHERE) { emulation::meet(emulation::Vote::sync, mask, 0, where); }

inline unsigned __ballot_sync(unsigned mask, int predicate, WHERE) {
    return emulation::reduced(
        mask, unsigned(predicate != 0) << emulation::lane(), [](unsigned a, unsigned b) { return a | b; }, where);
}
inline int __any_sync(unsigned mask, int predicate, WHERE) { return __ballot_sync(mask, predicate, where) != 0; }
inline int __all_sync(unsigned mask, int predicate, WHERE) { return __ballot_sync(mask, predicate, where) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, WHERE) {
    const uint64_t* all = emulation::meet(emulation::Vote::values, mask, emulation::packed(value), where);
    unsigned same = 0;
    for (unsigned i = 0; i < 32; ++i) same |= unsigned((mask >> i & 1) && all[i] == emulation::packed(value)) << i;
    return same;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, WHERE) {
    const int base = emulation::lane() & ~(width - 1);
    return emulation::shuffled(mask, value, base + (from & (width - 1)), true, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, WHERE) {
    const int lane = emulation::lane(), from = lane - int(by);
    return emulation::shuffled(mask, value, from, from >= (lane & ~(width - 1)), where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, WHERE) {
    const int lane = emulation::lane(), from = lane + int(by);
    return emulation::shuffled(mask, value, from, from <= (lane | (width - 1)), where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, WHERE) {
    const int lane = emulation::lane(), from = lane ^ by;
    return emulation::shuffled(mask, value, from, from <= (lane | (width - 1)), where);
}

template <class T>
T __reduce_add_sync(unsigned mask, T value, WHERE) {
    return emulation::reduced(mask, value, [](T a, T b) { return T(a + b); }, where);
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, WHERE) {
    return emulation::reduced(mask, value, [](T a, T b) { return a > b ? a : b; }, where);
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, WHERE) {
    return emulation::reduced(mask, value, [](T a, T b) { return a < b ? a : b; }, where);
}

// Atomics order nobody, as on a GPU.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
    emulation::pause_at_atomic();
    if constexpr (std::is_integral_v<T>) {
        return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
    } else {
        T old, sum;
        __atomic_load(at, &old, __ATOMIC_RELAXED);
        do sum = old + value;
        while (!__atomic_compare_exchange(at, &old, &sum, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
        return old;
    }
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
    emulation::pause_at_atomic();
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
    emulation::pause_at_atomic();
    T old = __atomic_load_n(at, __ATOMIC_RELAXED);
    while (value < old && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
    emulation::pause_at_atomic();
    return __atomic_fetch_or(at, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
    emulation::pause_at_atomic();
    return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    emulation::pause_at_atomic();
    __atomic_compare_exchange_n(at, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}

// A hint where the cache should keep it changes nothing; an address that is not aligned stops the kernel on a GPU.
template <class T>
T __ldg(const T* p) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) __builtin_trap();
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return __ldg(p);
}
template <class T>
T __ldcg(const T* p) {
    return __ldg(p);
}
template <class T>
void __stcs(T* p, T value) {
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) __builtin_trap();
    *p = value;
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)(a) * b >> 64); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline float __uint_as_float(unsigned bits) { return emulation::unpacked<float>(bits); }
inline unsigned __float_as_uint(float value) { return unsigned(emulation::packed(value)); }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half value) {
    const unsigned sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    const float small = float(fraction) * 0x1p-24f;
    return sign ? -small : small;
}
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
// To nearest, ties to even.
inline __half __float2half_rn(float value) {
    const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {0x7fff};
    if (magnitude >= 0x47800000u) return {uint16_t(sign | 0x7c00u)};
    // below 2^-14 a step is 2^-24: adding 2^-1 in float32, where a step is that too, rounds
    if (magnitude < 0x38800000u)
        return {uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
    return {uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13)};
}

// One rounding each; the host's compiler fuses none of them.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }

// As far off as a GPU's may be: a unit in the last place up or down, or not at all, by the bits of what comes out.
inline float one_off(float exact) {
    if (!std::isnormal(exact)) return exact;
    const unsigned bits = __float_as_uint(exact), choice = bits * 2654435761u >> 30;
    return choice == 0 ? std::nextafter(exact, 0.0f) : choice == 1 ? std::nextafter(exact, 2 * exact) : exact;
}
inline float approximate_reciprocal(float a) {
    const float exact = std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(HUGE_VALF, a) : 1 / a;
    return std::fpclassify(exact) == FP_SUBNORMAL ? std::copysign(0.0f, a) : one_off(exact);
}
inline float approximate_root(float a) { return one_off(std::sqrt(a)); }

inline uint32_t packed_bfloat16(float first, float second) {
    const auto word = [](float value) {
        const unsigned bits = __float_as_uint(value);
        return value == value ? (bits + 0x7fffu + (bits >> 16 & 1)) >> 16 : 0x7fffu;
    };
    return word(first) | word(second) << 16;
}
inline uint32_t packed_float16(float first, float second) {
    return __float2half_rn(first).bits | uint32_t(__float2half_rn(second).bits) << 16;
}

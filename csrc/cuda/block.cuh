// What the threads of a block do together. blockDim.x is a multiple of 32.
#pragma once
#include "device.cuh"

// The sum of the values of all threads before this one; `total` becomes the sum of all. `of_warps` has 32 places, and
// is free again after the next barrier.
template <class T>
__device__ T sum_before(T value, T* of_warps, T& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    T up_to = value;
    for (int by = 1; by < 32; by *= 2) {
        const T other = __shfl_up_sync(all_lanes, up_to, by);
        if (lane >= by) up_to += other;
    }
    if (lane == 31) of_warps[warp] = up_to;
    __syncthreads();
    T before = 0;
    total = 0;
    for (int w = 0; w < warps; ++w) {
        if (w == warp) before = total;
        total += of_warps[w];
    }
    return before + up_to - value;
}

// The least value of any thread. `of_warps` as above.
__device__ inline unsigned least_in_block(unsigned value, unsigned* of_warps) {
    const unsigned of_warp = __reduce_min_sync(all_lanes, value);
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = of_warp;
    __syncthreads();
    unsigned least = of_warps[0];
    for (int w = 1; w < int(blockDim.x / 32); ++w) least = smaller(least, of_warps[w]);
    return least;
}

// Sorts items[0 ... size), ascending; size is a power of two. A bitonic network: pairs closer than a warp is wide are
// the business of one warp. Begins and ends with a barrier.
template <class T>
__device__ void sort_in_block(T* items, int size) {
    __syncthreads();
    for (int run = 2; run <= size; run *= 2) {
        for (int apart = run / 2; apart > 0; apart /= 2) {
            for (int i = threadIdx.x; i < size; i += blockDim.x) {
                const int other = i ^ apart;
                if (other < i) continue;
                const T low = items[i], high = items[other];
                if ((low > high) == ((i & run) == 0)) items[i] = high, items[other] = low;
            }
            // the next pairs are the next run's, of twice this length, where `apart` is 1
            const int next = apart > 1 ? apart / 2 : run;
            if (larger(apart, next) < 32)
                __syncwarp();
            else
                __syncthreads();
        }
    }
    __syncthreads();
}

// Sums over all threads of a block, the same for all of them: added in an order that depends on the number of threads
// alone. Each sum meets one barrier; two take turns in memory, so that none overtakes another.
class BlockSums {
   public:
    static constexpr int most = 2, places = 2 * most * 32;  // values at once; what `of_warps` must have

    // `of_warps` begins at whole 16 bytes.
    __device__ explicit BlockSums(float* of_warps_) : of_warps(of_warps_) {
        const int warps = blockDim.x / 32;
        for (int i = threadIdx.x; i < places; i += blockDim.x)
            if (i % 32 >= warps) of_warps[i] = 0;  // four are read at once
    }

    // Each value becomes its sum.
    template <int count>
    __device__ void operator()(float (&values)[count]) {
        static_assert(count <= most);
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
        float* const mine = of_warps + turn * most * 32;
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            for (int by = 16; by; by /= 2) values[i] = __fadd_rn(values[i], __shfl_xor_sync(all_lanes, values[i], by));
            if (lane == 0) mine[i * 32 + warp] = values[i];
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < count; ++i) {
            values[i] = 0;
            for (int w = 0; w < warps; w += 4) {
                const float4 four = *reinterpret_cast<const float4*>(mine + i * 32 + w);
                values[i] = __fadd_rn(values[i], __fadd_rn(__fadd_rn(four.x, four.y), __fadd_rn(four.z, four.w)));
            }
        }
    }

   private:
    float* of_warps;
    int turn = 0;
};

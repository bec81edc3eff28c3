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

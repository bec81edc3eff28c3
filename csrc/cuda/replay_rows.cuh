// Decoder rows that update_rows left behind go through the steps they missed, while they are in registers.
#pragma once
#include "decoder_row.cuh"

__device__ inline bool exists(int64_t latent, int64_t L) { return latent >= 0 && latent < L; }

// Block b does latent b % R in stream b / R.
template <bool whole>
__global__ void __launch_bounds__(most_threads, 1) replay_rows_kernel(
    Rows rows, const AdamConstants* constants, const int64_t* latents, int64_t R, int64_t L, const int64_t* last_step,
    int64_t T, Streams streams, bool aligned) {
    SharedMemory memory(shared_memory());
    BlockSums sums(memory.take<float>(BlockSums::places));
    const int64_t l = latents[blockIdx.x % R];
    if (!exists(l, L) || last_step[l] >= T) return;
    const int64_t made = larger<int64_t>(last_step[l], 0);
    const Stream stream(streams, int(blockIdx.x / R), aligned);
    const float none[held] = {};
    if (stream.in_registers()) {
        const Columns<whole> columns(stream, stream.begin);
        Held row;
        load(row, rows, l, columns);
        for (int64_t t = made; t < T; ++t) step_in_registers(row, none, columns, constants[t], sums);
        store(row, rows, l, columns);
        store_copy(row.w, rows.copy, l, columns);
        return;
    }
    const auto no_gradient = [](float (&gradient)[held], const Columns<whole>&) {
#pragma unroll
        for (int i = 0; i < held; ++i) gradient[i] = 0;
    };
    for (int64_t t = made; t < T; ++t) step_in_memory<whole>(rows, l, stream, constants[t], 0, sums, no_gradient);
}

// Not by the kernel above: its blocks of other streams may yet read it.
__global__ void __launch_bounds__(256) note_steps_kernel(
    int64_t* last_step, const int64_t* latents, int64_t R, int64_t L, int64_t T) {
    const int64_t r = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (r < R && exists(latents[r], L)) last_step[latents[r]] = T;
}

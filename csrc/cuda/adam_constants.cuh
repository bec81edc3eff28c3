#pragma once
#include "adam.cuh"

// A thread a step; zeroes counters besides.
__global__ void __launch_bounds__(128) adam_constants_kernel(
    AdamConstants* constants, AdamStep step, const double* history, int64_t T, int* counters, int count) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) counters[i] = 0;
    if (i >= T) return;
    if (history) {
        const double* const at = history + 4 * i;
        step = {at[0], at[1], at[2], at[3], double(i + 1), nullptr, nullptr};
    }
    if (step.lr_at) step.lr = *step.lr_at;
    if (step.step_at) step.step = *step.step_at;
    constants[i] = constants_of(step);
}

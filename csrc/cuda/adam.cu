#include "adam.cuh"

constexpr int threads = 128;

// Worked out in float64 and rounded once.
__device__ static AdamConstants constants_of(const AdamStep& step) {
    const double rate = step.lr / (1 - pow(step.beta_1, step.step)), scale = 1 / sqrt(1 - pow(step.beta_2, step.step));
    return {float(step.beta_1), float(step.beta_2), float(1 - step.beta_1), float(1 - step.beta_2),
            float(step.eps),    float(rate),        float(scale),           int64_t(step.step)};
}

// A thread a step; zeroes counters besides.
__global__ void __launch_bounds__(threads) adam_constants_kernel(
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

void adam_constants(AdamConstants* constants, AdamStep step, int* counters, int count, uintptr_t stream) {
    launch(adam_constants_kernel, 1, threads, 0, stream, constants, step, nullptr, 1, counters, count);
}

void adam_constants(AdamConstants* constants, const double* history, int64_t T, uintptr_t stream) {
    const int64_t blocks = ceil_div<int64_t>(T, threads);
    launch(adam_constants_kernel, blocks, threads, 0, stream, constants, AdamStep{}, history, T, nullptr, 0);
}

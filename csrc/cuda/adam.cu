#include "adam.cuh"

constexpr int threads = 128;

// A thread a step.
__global__ void __launch_bounds__(threads) adam_constants_kernel(
    AdamConstants* constants, const double* history, int64_t T) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= T) return;
    const double* const at = history + 4 * i;
    constants[i] = constants_of({at[0], at[1], at[2], at[3], double(i + 1), nullptr, nullptr});
}

void adam_constants(AdamConstants* constants, const double* history, int64_t T, uintptr_t stream) {
    const int64_t blocks = ceil_div<int64_t>(T, threads);
    launch(adam_constants_kernel, blocks, threads, 0, stream, constants, history, T);
}

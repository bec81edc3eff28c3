#include "adam_constants.cuh"

constexpr int threads = 128;

void adam_constants(AdamConstants* constants, AdamStep step, int* counters, int count, uintptr_t stream) {
    launch(adam_constants_kernel, 1, threads, 0, stream, constants, step, nullptr, 1, counters, count);
}

void adam_constants(AdamConstants* constants, const double* history, int64_t T, uintptr_t stream) {
    const int64_t blocks = ceil_div<int64_t>(T, threads);
    launch(adam_constants_kernel, blocks, threads, 0, stream, constants, AdamStep{}, history, T, nullptr, 0);
}

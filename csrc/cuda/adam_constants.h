#pragma once
#include <cstdint>

// A step of Adam. Where there is an address, the device has the number.
struct AdamStep {
    double lr, beta_1, beta_2, eps, step;
    const double *lr_at, *step_at;
};

struct AdamConstants {
    float beta_1, beta_2, rest_1, rest_2, eps;  // rest = 1 - beta
    float rate, scale;                          // lr / (1 - beta_1^step), 1 / sqrt(1 - beta_2^step)
    int64_t step;
};

// The constants of one step, and counters[0 ... count) = 0 for kernels that follow.
void adam_constants(AdamConstants* constants, AdamStep step, int* counters, int count, uintptr_t stream);

// Those of steps 1 ... T, each with its own (lr, beta_1, beta_2, eps) in history [T, 4].
void adam_constants(AdamConstants* constants, const double* history, int64_t T, uintptr_t stream);

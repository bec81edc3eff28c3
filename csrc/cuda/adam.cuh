// Adam (Kingma & Ba, arXiv 1412.6980). Every rounding is written out, so that no kernel's compiler chooses another, and
// the same instruction approximates the same everywhere: a step that is replayed has the bits of the step that was
// missed. How far a weight moves is off by 2^-21 of it, at most.
#pragma once
#include "device.cuh"
#include "operators.h"

struct AdamConstants {
    float beta_1, beta_2, rest_1, rest_2, eps;  // rest = 1 - beta
    float rate, scale;                          // lr / (1 - beta_1^step), 1 / sqrt(1 - beta_2^step)
    int64_t step;
};

// Worked out in float64 and rounded once.
__device__ inline AdamConstants constants_of(AdamStep step) {
    if (step.lr_at) step.lr = *step.lr_at;
    if (step.step_at) step.step = *step.step_at;
    const double rate = step.lr / (1 - pow(step.beta_1, step.step)), scale = 1 / sqrt(1 - pow(step.beta_2, step.step));
    return {float(step.beta_1), float(step.beta_2), float(1 - step.beta_1), float(1 - step.beta_2),
            float(step.eps),    float(rate),        float(scale),           int64_t(step.step)};
}

// Those of steps 1 ... T, each with its own (lr, beta_1, beta_2, eps) in history [T, 4].
void adam_constants(AdamConstants* constants, const double* history, int64_t T, uintptr_t stream);

// The weight after a step; moves its moments.
__device__ inline float adam(float w, float gradient, float& m, float& v, const AdamConstants& a) {
    m = __fmaf_rn(m, a.beta_1, __fmul_rn(a.rest_1, gradient));
    v = __fmaf_rn(v, a.beta_2, __fmul_rn(__fmul_rn(a.rest_2, gradient), gradient));
    const float inverse = approximate_reciprocal(__fmaf_rn(approximate_root(v), a.scale, a.eps));
    return __fmaf_rn(-__fmul_rn(a.rate, m), inverse, w);
}

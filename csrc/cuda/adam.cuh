// Adam (Kingma & Ba, arXiv 1412.6980). Every rounding is written out, so that no kernel's compiler chooses another: a
// step that is replayed has the bits of the step that was missed.
#pragma once
#include "adam_constants.h"
#include "device.cuh"

// Worked out in float64 and rounded once.
__device__ inline AdamConstants constants_of(const AdamStep& step) {
    const double rate = step.lr / (1 - pow(step.beta_1, step.step)), scale = 1 / sqrt(1 - pow(step.beta_2, step.step));
    return {float(step.beta_1), float(step.beta_2), float(1 - step.beta_1), float(1 - step.beta_2),
            float(step.eps),    float(rate),        float(scale),           int64_t(step.step)};
}

// The weight after a step; moves its moments.
__device__ inline float adam(float w, float gradient, float& m, float& v, const AdamConstants& a) {
    m = __fmaf_rn(m, a.beta_1, __fmul_rn(a.rest_1, gradient));
    v = __fmaf_rn(v, a.beta_2, __fmul_rn(__fmul_rn(a.rest_2, gradient), gradient));
    return __fsub_rn(w, __fdiv_rn(__fmul_rn(a.rate, m), __fmaf_rn(__fsqrt_rn(v), a.scale, a.eps)));
}

// One training step of one decoder row, in one stream.
#include "adam.h"

namespace SIMD_LEVEL {

// The bfloat16 copy of a row, or nothing.
struct CopyRow {
    bf16* data;

    CopyRow(const Tensor& tensor, int64_t l, int64_t column)
        : data(tensor.data ? tensor.at<bf16>(l) + column : nullptr) {}
};

// Rounds v into a bfloat16 copy; a double has none.
INLINE void copy_to(bf16* p, Vec<float> v, int64_t n) { store(p, v, n); }
INLINE void copy_to(bf16*, Vec<double>, int64_t) {}

template <class A>
void copy_row(CopyRow copy, const A* w, int64_t width) {
    if (copy.data)
        for (int64_t d = 0; d < width; d += lanes<A>) copy_to(copy.data + d, load(w + d, width - d), width - d);
}

// Adam on w along the sphere: what the gradient has along w is taken out before, and w has unit norm after. Returns
// the norm that w had before that. Never inlined: a step that is replayed has the same bits.
template <class A, class M>
__attribute__((noinline)) A update_decoder(
    Row<A> w, const Moments<M>& moments, const A* grad, int64_t width, const Adam<A>& adam) {
    Vec<A> gw = {}, ww = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        w.prefetch(d);
        const Vec<A> old = load(w + d, width - d);
        gw += load(grad + d, width - d) * old;
        ww += old * old;
    }
    const A along = total<A>(gw) / std::max(total<A>(ww), std::numeric_limits<A>::min());
    const Noise noise = moments.noise(adam.noise);
    Vec<A> squares = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        moments.prefetch(d);
        const Vec<A> old = load(w + d, n);
        Vec<A> moved = adam(old, load(grad + d, n) - along * old, moments, noise, d, n);
        store(w + d, moved, n);
        if (n < lanes<A>) moved = load(w + d, n);  // with eps = 0 the lanes beside the row are 0 / 0
        squares += moved * moved;
    }
    const A norm = std::max(std::sqrt(total<A>(squares)), std::numeric_limits<A>::min());
    for (int64_t d = 0; d < width; d += lanes<A>) store(w + d, load(w + d, width - d) / norm, width - d);
    return norm;
}

}  // namespace SIMD_LEVEL

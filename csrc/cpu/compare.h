// Errors of a reconstruction and their gradient, a run of columns at a time.
namespace SIMD_LEVEL {

// recon -> gradient, in place and into grad, and added to grad_sum where there is one; returns the squared error. With
// `follows`, the gradient of what is made of the reconstruction, `after`, is added to its own.
template <bool follows, class T, class A>
INLINE A compare(
    A* recon, const A* bias, const T* target, A factor, [[maybe_unused]] const A* after, T* grad, A* grad_sum,
    int64_t width, bool large) {
    const bool past = large && aligned(grad);
    Vec<A> squares = {};
    for (int64_t d = 0; d < width; d += lanes<A>) {
        const int64_t n = width - d;
        const Vec<A> error = load(recon + d, n) + (load(bias + d, n) - load(target + d, n));
        squares += error * error;
        Vec<A> gradient = factor * error;
        if constexpr (follows) gradient += load(after + d, n);
        store(recon + d, gradient, n);
        store(grad + d, gradient, n, past);
        if (grad_sum) store(grad_sum + d, load(grad_sum + d, n) + gradient, n);
    }
    return total<A>(squares);
}

}  // namespace SIMD_LEVEL

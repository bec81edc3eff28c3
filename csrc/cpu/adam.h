// Adam (Kingma & Ba, arXiv 1412.6980) on one vector of weights, its moments in memory.
#include <algorithm>
#include <limits>

#include "rows.h"

namespace SIMD_LEVEL {

template <class A>
class Adam {
   public:
    explicit Adam(const AdamStep& step)
        : noise(Noise().then(uint32_t(step.seed)).then(uint32_t(step.seed >> 32)).then(uint32_t(step.step))),
          beta1(step.beta1),
          beta2(step.beta2),
          rest1(1 - step.beta1),
          rest2(1 - step.beta2),
          eps(step.eps),
          rate(step.lr / (1 - std::pow(step.beta1, step.step))),
          scale(1 / std::sqrt(1 - std::pow(step.beta2, step.step))) {}

    // The weights after the step; moves the moments of columns d ... d + n, which are rounded when w has moved.
    template <class M>
    INLINE Vec<A> operator()(
        Vec<A> w, Vec<A> grad, const Moments<M>& moments, Noise row_noise, int64_t d, int64_t n) const {
        Vec<A> mean, square;
        moments.read(d, n, mean, square);
        decay(mean, square, grad);
        const Vec<A> moved = w - rate * mean / (square_root<A>(square) * scale + eps);
        moments.write(row_noise, d, n, mean, square);
        return moved;
    }

    INLINE void decay(Vec<A>& mean, Vec<A>& square, Vec<A> grad) const {
        mean = mean * beta1 + rest1 * grad;
        square = square * beta2 + rest2 * grad * grad;
    }

    // At least how far a step moves a weight, for a first moment of 1 and none that is second.
    A most_per_moment() const { return A(1.01) * std::abs(rate) / eps; }

    Noise noise;  // of the step

   private:
    A beta1, beta2, rest1, rest2, eps, rate, scale;
};

}  // namespace SIMD_LEVEL

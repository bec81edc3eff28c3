// Rows of weights and of their moments in memory, a register of columns at a time.
#include "rounding.h"

namespace SIMD_LEVEL {

// Columns of a row, and of the row that comes after, which is fetched meanwhile.
template <class T>
struct Row {
    T* data;
    int64_t next;  // distance to the row that comes after

    Row(const Tensor& tensor, int64_t l, int64_t after, int64_t column)
        : data(tensor.at<T>(l) + column), next((after - l) * tensor.stride[0]) {}
    T* operator+(int64_t d) const { return data + d; }
    void prefetch(int64_t d) const { __builtin_prefetch(data + next + d, 1, 2); }
};

// Adam's moments of a row: of the type A that sums have, or bfloat16.
template <class M>
struct Moments {
    using A = sum_t<M>;

    Row<M> first, second;
    uint32_t word;  // what noise knows the row by
    int64_t column;

    // matrix: 0 for W_enc, 1 for W_dec
    Moments(const Tensor* moments, int64_t matrix, int64_t l, int64_t after, int64_t column)
        : first(moments[0], l, after, column),
          second(moments[1], l, after, column),
          word(uint32_t(2 * l + matrix)),
          column(column) {}

    Noise noise(Noise of_step) const { return of_step.then(word).from(column); }

    void prefetch(int64_t d) const {
        first.prefetch(d);
        second.prefetch(d);
    }

    INLINE void read(int64_t d, int64_t n, Vec<A>& mean, Vec<A>& square) const {
        mean = load(first + d, n);
        square = load(second + d, n);
    }

    // What is kept of moments, with the noise of their row; exact ones are kept as they are.
    static INLINE void round(Noise noise, int64_t d, Vec<A>& mean, Vec<A>& square) {
        if constexpr (sizeof(M) < sizeof(A)) {
            const auto bits = noise.at(d);
            mean = upper_halves(rounded(mean, bits));
            square = upper_halves(rounded(square, bits >> 16));
        }
    }

    // Rounds; what was rounded before stays as it is, with any noise.
    INLINE void write(Noise noise, int64_t d, int64_t n, Vec<A> mean, Vec<A> square) const {
        if constexpr (sizeof(M) < sizeof(A)) {
            const auto bits = noise.at(d);
            store_upper(first + d, rounded(mean, bits), n);
            store_upper(second + d, rounded(square, bits >> 16), n);
        } else {
            store(first + d, mean, n);
            store(second + d, square, n);
        }
    }
};

}  // namespace SIMD_LEVEL

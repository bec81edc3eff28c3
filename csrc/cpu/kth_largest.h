// The k-th largest of a few numbers, and what selection needs beside it. Included once for each instruction set, after
// simd.h.
namespace SIMD_LEVEL {

// The integers as wide as T: what comparing two vectors gives.
template <class T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

template <class T>
INLINE bool any(Mask<T> mask) {
    uint64_t words[VECTOR_BYTES / 8], all = 0;
    std::memcpy(words, &mask, sizeof words);
    UNROLL for (int i = 0; i < VECTOR_BYTES / 8; ++i) all |= words[i];
    return all != 0;
}

// NaN ranks with +inf.
template <class T>
INLINE Vec<T> ranked(Vec<T> v) {
    return v == v ? v : Vec<T>{} + std::numeric_limits<T>::infinity();
}

template <class T>
INLINE T ranked_value(T v) {
    return v == v ? v : std::numeric_limits<T>::infinity();
}

// Numbers in the order of the floats they come from, and back.
template <class T>
INLINE int64_t order_of(T value) {
    integer_t<T> bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? bits ^ std::numeric_limits<integer_t<T>>::max() : bits;
}

template <class T>
INLINE T value_at(int64_t order) {
    const integer_t<T> number = order, bits = number < 0 ? number ^ std::numeric_limits<integer_t<T>>::max() : number;
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// The smallest of n values, none NaN, that is not below `least`, and the largest of all.
template <class T>
std::pair<T, T> ends(const T* values, int64_t n, T least) {
    constexpr int W = lanes<T>;
    constexpr T infinity = std::numeric_limits<T>::infinity();
    Vec<T> lowest = Vec<T>{} + infinity, highest = -lowest;
    T low = infinity, high = -infinity;
    int64_t i = 0;
    for (; i + W <= n; i += W) {
        const Vec<T> v = load(values + i);
        lowest = ((v >= least) & (v < lowest)) ? v : lowest;
        highest = v > highest ? v : highest;
    }
    UNROLL for (int lane = 0; lane < W; ++lane) {
        low = std::min(low, lowest[lane]);
        high = std::max(high, highest[lane]);
    }
    for (; i < n; ++i) {
        if (values[i] >= least) low = std::min(low, values[i]);
        high = std::max(high, values[i]);
    }
    return {low, high};
}

// The k-th, ... or most-th largest of n values, none NaN, by bisection: a pass of comparisons halves the range, until k
// to `most` are left.
template <class T>
T kth_largest(const T* values, int64_t n, int64_t k, int64_t most) {
    constexpr int W = lanes<T>;
    const int64_t whole = n / W * W;
    const auto [smallest, largest] = ends(values, n, -std::numeric_limits<T>::infinity());
    int64_t low = order_of(smallest), high = order_of(largest);
    while (low < high) {
        const int64_t middle = low + int64_t((uint64_t(high) - uint64_t(low) + 1) / 2);
        const T least = value_at<T>(middle);
        Mask<T> counts = {};
        for (int64_t i = 0; i < whole; i += W) counts -= load(values + i) >= least;
        int64_t count = 0;
        UNROLL for (int i = 0; i < W; ++i) count += counts[i];
        for (int64_t i = whole; i < n; ++i) count += values[i] >= least;
        if (k <= count && count <= most) return ends(values, n, least).first;
        (count > most ? low : high) = count > most ? middle : middle - 1;
    }
    return value_at<T>(low);
}

}  // namespace SIMD_LEVEL

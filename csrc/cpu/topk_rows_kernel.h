// The rows of topk_rows: exact selection by group maxima.
//
// A block of the row is cut into one group a lane, so that all its group maxima cost one comparison per vector. The
// (k + 1)-th to (k + 16)-th largest maximum, whichever is found first, is the threshold: at least k entries exceed it,
// ties aside, and few more; all lie in groups whose maximum exceeds it, so only blocks with such a group are read again.
// The k-th largest of these few is exact. Where ties leave fewer than k above the threshold, its equals fill up from the
// left.
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
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    Bits bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? bits ^ std::numeric_limits<Bits>::max() : bits;
}

template <class T>
INLINE T value_at(int64_t order) {
    using Bits = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    const Bits bits = order < 0 ? Bits(order) ^ std::numeric_limits<Bits>::max() : Bits(order);
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

// Appends the lanes of v that exceed the threshold, and their columns; returns how many.
template <class T>
INLINE int64_t append_above(Vec<T> v, T threshold, int32_t column, T* values, int32_t* columns) {
#if VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
        // compressed in a register, then stored: compressing to memory is very slow on Zen 4
        const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(threshold), _CMP_GT_OQ);
        if (!mask) return 0;
        const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(column), iota);
        _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, v));
        _mm512_storeu_si512(columns, _mm512_maskz_compress_epi32(mask, numbers));
        return __builtin_popcount(mask);
    }
#endif
    if (!any<T>(v > threshold)) return 0;
    int64_t count = 0;
    for (int i = 0; i < lanes<T>; ++i) {
        values[count] = v[i];
        columns[count] = column + i;
        count += v[i] > threshold;
    }
    return count;
}

// Collects what may be among the k largest of row[0, L) into `above`, and returns the k-th largest.
// All entries above it have been collected; if fewer than k were, its equals have not. While they are collected, which
// leaves memory idle, `next` is fetched: what will be read next.
template <class T>
T find_kth_largest(const T* row, const T* next, int64_t L, int64_t k, Above<T>& above) {
    constexpr int W = lanes<T>, chains = 4, spare = 16, bytes_ahead = 4096;
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    const int64_t enough = 4 * chains * (k + spare / 2);  // 4 groups of `chains` entries to one above the threshold
    const int64_t steps = std::clamp<int64_t>(L / enough, 1, 16);
    const bool grouped = L >= enough;
    const int64_t block = chains * W * steps, whole = L / block, blocks = (L + block - 1) / block;
    const int64_t most = grouped ? (k + spare) * chains * steps : L;
    if (int64_t(above.values.size()) < most + W) above.values.resize(most + W), above.columns.resize(most + W);
    if (blocks > whole) {
        above.padded.assign(block, lowest);
        std::copy(row + whole * block, row + L, above.padded.begin());
    }
    const auto start = [&](int64_t b) { return b < whole ? row + b * block : above.padded.data(); };

    above.threshold = lowest;
    if (grouped) {
        above.maxima.resize(blocks * W);
        for (int64_t b = 0; b < blocks; ++b) {
            const T* entries = start(b);
            Vec<T> maxima[chains];
            UNROLL for (int c = 0; c < chains; ++c) maxima[c] = ranked<T>(load(entries + c * W));
            for (int64_t i = 1; i < steps; ++i) {
                UNROLL for (int c = 0; c < chains; ++c) {
                    // hardware stops fetching ahead at the end of a page
                    __builtin_prefetch(entries + (i * chains + c) * W + bytes_ahead / sizeof(T));
                    const Vec<T> v = ranked<T>(load(entries + (i * chains + c) * W));
                    maxima[c] = maxima[c] < v ? v : maxima[c];
                }
            }
            UNROLL for (int c = 1; c < chains; ++c) maxima[0] = maxima[0] < maxima[c] ? maxima[c] : maxima[0];
            store(above.maxima.data() + b * W, maxima[0]);
        }
        above.threshold = kth_largest(above.maxima.data(), blocks * W, k + 1, k + spare);
    }
    T* const values = above.values.data();
    const T threshold = above.threshold;
    int64_t count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (grouped && !any<T>(load(above.maxima.data() + b * W) > threshold)) continue;
        const T* entries = start(b);
        for (int64_t i = 0; i < block; i += W, next += W) {
            __builtin_prefetch(next);
            count += append_above<T>(
                ranked<T>(load(entries + i)), threshold, b * block + i, values + count, above.columns.data() + count);
        }
    }
    above.count = count;
    return count < k ? threshold : kth_largest(values, count, k, k);
}

template <class T>
void topk_row(const T* row, const T* next, int64_t L, int64_t k, Above<T>& above, int32_t* indices) {
    const T kth = find_kth_largest(row, next, L, k, above);
    int64_t greater = 0;
    for (int64_t i = 0; i < above.count; ++i) greater += above.values[i] > kth;
    int64_t room = k - greater;
    if (above.count >= k) {
        for (int64_t i = 0; i < above.count; ++i)
            if (above.values[i] > kth || (above.values[i] == kth && room-- > 0)) *indices++ = above.columns[i];
        return;
    }
    int32_t* const end = indices + k;
    int32_t* equal = std::copy_n(above.columns.begin(), greater, indices);
    for (int32_t l = 0; equal != end; ++l)
        if (ranked_value(row[l]) == kth) *equal++ = l;
    std::inplace_merge(indices, indices + greater, end);
}

}  // namespace SIMD_LEVEL

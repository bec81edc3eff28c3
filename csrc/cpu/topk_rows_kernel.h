// The rows of topk_rows: exact selection by group maxima.
//
// A block of the row is cut into one group a lane, so that all its group maxima cost one comparison per vector. The
// (k + 8)-th largest maximum is the threshold: k + 7 entries exceed it, ties aside, and few more; all lie in groups
// whose maximum exceeds it, so only blocks with such a group are read again. The k-th largest of these few is exact.
// Where ties leave fewer than k above the threshold, its equals fill up from the left.
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

template <class T>
INLINE void append_above(Vec<T> v, int32_t column, Above<T>& above) {
    constexpr int W = lanes<T>;
#if VECTOR_BYTES == 64
    if constexpr (std::is_same_v<T, float>) {
        // compressed in a register, then stored: compressing to memory is very slow on Zen 4
        const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_set1_ps(above.threshold), _CMP_GT_OQ);
        const __m512i iota = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const __m512i columns = _mm512_add_epi32(_mm512_set1_epi32(column), iota);
        _mm512_storeu_ps(above.values.data() + above.count, _mm512_maskz_compress_ps(mask, v));
        _mm512_storeu_si512(above.columns.data() + above.count, _mm512_maskz_compress_epi32(mask, columns));
        above.count += __builtin_popcount(mask);
        return;
    }
#endif
    if (!any<T>(v > above.threshold)) return;
    for (int i = 0; i < W; ++i) {
        above.values[above.count] = v[i];
        above.columns[above.count] = column + i;
        above.count += v[i] > above.threshold;
    }
}

// Collects what may be among the k largest of row[0, L) into `above`, and returns the k-th largest.
// All entries above it have been collected; if fewer than k were, its equals have not.
template <class T>
T find_kth_largest(const T* row, int64_t L, int64_t k, Above<T>& above) {
    constexpr int W = lanes<T>, chains = 4;
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    const int64_t rank = k + 8, steps = std::clamp<int64_t>(L / (4 * chains * rank), 1, 16);
    const bool grouped = L >= 4 * chains * rank;  // at least 4 rank groups of chains * steps entries
    const int64_t block = chains * W * steps, whole = L / block, blocks = (L + block - 1) / block;
    const int64_t most = grouped ? rank * chains * steps : L;
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
            const T* values = start(b);
            Vec<T> maxima[chains];
            UNROLL for (int c = 0; c < chains; ++c) maxima[c] = ranked<T>(load(values + c * W));
            for (int64_t i = 1; i < steps; ++i) {
                UNROLL for (int c = 0; c < chains; ++c) {
                    const Vec<T> v = ranked<T>(load(values + (i * chains + c) * W));
                    maxima[c] = maxima[c] < v ? v : maxima[c];
                }
            }
            UNROLL for (int c = 1; c < chains; ++c) maxima[0] = maxima[0] < maxima[c] ? maxima[c] : maxima[0];
            store(above.maxima.data() + b * W, maxima[0]);
        }
        above.threshold = kth_largest(above.maxima.data(), blocks * W, rank, above.work);
    }
    above.count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (grouped && !any<T>(load(above.maxima.data() + b * W) > above.threshold)) continue;
        const T* values = start(b);
        for (int64_t i = 0; i < block; i += W) append_above<T>(ranked<T>(load(values + i)), b * block + i, above);
    }
    if (above.count < k) return above.threshold;
    return kth_largest(above.values.data(), above.count, k, above.work);
}

template <class T>
void topk_row(const T* row, int64_t L, int64_t k, Above<T>& above, int32_t* indices) {
    const T kth = find_kth_largest(row, L, k, above);
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

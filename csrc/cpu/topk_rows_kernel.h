// The rows of topk_rows: exact selection by group maxima.
//
// A block of the row is cut into one group a lane, so that all its group maxima cost one comparison per vector. The
// (k + 1)-th to (k + 16)-th largest maximum, whichever is found first, is the threshold: at least k entries exceed it,
// ties aside, and few more; all lie in groups whose maximum exceeds it, so only blocks with such a group are read again.
// In a long row most of these hold one such entry, the maximum itself: a second one shows in the second largest entry
// of its group. So each group keeps this and the place of its maximum, and a block without a second is not read again.
// The k-th largest of these few is exact. Where ties leave fewer than k above the threshold, its equals fill up from the
// left.
#include "kth_largest.h"

namespace SIMD_LEVEL {

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

// The largest entry of each lane of a block; where `placed` its place too, and the largest of the others.
template <class T>
struct Best {
    Vec<T> first, second;
    Mask<T> place;
};

template <bool placed, class T>
INLINE void insert(Best<T>& best, Vec<T> value, Mask<T> place) {
    const Mask<T> greater = value > best.first;
    if (placed) {
        const Vec<T> lesser = greater ? best.first : value;
        best.second = best.second < lesser ? lesser : best.second;
        best.place = greater ? place : best.place;
    }
    best.first = greater ? value : best.first;
}

// Of `steps` times `chains` vectors.
template <bool placed, int chains, class T>
INLINE Best<T> best_of(const T* entries, int64_t steps) {
    constexpr int W = lanes<T>, bytes_ahead = placed ? 8192 : 4096;
    const Vec<T> lowest = Vec<T>{} - std::numeric_limits<T>::infinity();
    Best<T> best[chains];
    UNROLL for (int c = 0; c < chains; ++c) best[c] = {ranked<T>(load(entries + c * W)), lowest, Mask<T>{} + c * W};
    Mask<T> place = {};
    for (int64_t i = 1; i < steps; ++i) {
        entries += chains * W, place += chains * W;
        UNROLL for (int c = 0; c < chains; ++c) {
            // hardware stops fetching ahead at the end of a page
            __builtin_prefetch(entries + c * W + bytes_ahead / sizeof(T));
            insert<placed>(best[c], ranked<T>(load(entries + c * W)), place + c * W);
        }
    }
    UNROLL for (int c = 1; c < chains; ++c) {
        insert<placed>(best[0], best[c].first, best[c].place);
        best[0].second = best[0].second < best[c].second ? best[c].second : best[0].second;
    }
    return best[0];
}

// Appends the maxima above the threshold of the block that begins at `column`, in order of column.
template <class T>
void append_maxima(int64_t block, int32_t column, Above<T>& above) {
    constexpr int W = lanes<T>;
    const int64_t begin = above.count;
    for (int64_t group = block * W; group < (block + 1) * W; ++group) {
        const T value = above.first[group];
        if (!(value > above.threshold)) continue;
        const int32_t at = column + above.place[group] + group % W;
        int64_t i = above.count++;
        for (; i > begin && above.columns[i - 1] > at; --i) {
            above.values[i] = above.values[i - 1];
            above.columns[i] = above.columns[i - 1];
        }
        above.values[i] = value;
        above.columns[i] = at;
    }
}

// Collects what may be among the k largest of row[0, L) into `above`, and returns the k-th largest.
// All entries above it have been collected; if fewer than k were, its equals have not. While they are collected, which
// leaves memory idle, `next` is fetched: what will be read next.
template <class T>
T find_kth_largest(const T* row, const T* next, int64_t L, int64_t k, Above<T>& above) {
    constexpr int W = lanes<T>, chains = 4, spare = 16, line = 64 / sizeof(T), lines_a_block = 16;
    constexpr T lowest = -std::numeric_limits<T>::infinity();
    const int64_t share = L / (4 * chains * (k + spare / 2));  // steps for 4 groups to one above the threshold
    // with places 16 groups to one, so that few have a second: too many in a short row. The first reading must wait for
    // memory all the same, which one of 16-byte vectors does not.
    const bool grouped = share > 0, placed = VECTOR_BYTES > 16 && share >= 48;
    const int64_t steps = placed ? std::clamp<int64_t>(share / 4, 16, 64) : std::clamp<int64_t>(share, 1, 16);
    const int64_t block = chains * W * steps, whole = L / block, blocks = (L + block - 1) / block;
    const int64_t most = grouped ? (k + spare) * chains * steps : L;
    if (int64_t(above.values.size()) < most + W) above.values.resize(most + W), above.columns.resize(most + W);
    if (blocks > whole) {
        above.padded.assign(block, lowest);
        std::copy(row + whole * block, row + L, above.padded.begin());
    }
    const auto start = [&](int64_t b) { return b < whole ? row + b * block : above.padded.data(); };

    above.threshold = lowest;
    if (grouped) above.first.resize(blocks * W);
    if (placed) {
        above.second.resize(blocks * W), above.place.resize(blocks * W);
        for (int64_t b = 0; b < blocks; ++b) {
            const Best<T> best = best_of<true, chains>(start(b), steps);
            store(above.first.data() + b * W, best.first);
            store(above.second.data() + b * W, best.second);
            std::memcpy(above.place.data() + b * W, &best.place, sizeof best.place);
        }
    } else if (grouped) {
        for (int64_t b = 0; b < blocks; ++b)
            store(above.first.data() + b * W, best_of<false, chains>(start(b), steps).first);
    }
    if (grouped) above.threshold = kth_largest(above.first.data(), blocks * W, k + 1, k + spare);

    T* const values = above.values.data();
    int32_t* const columns = above.columns.data();
    const T threshold = above.threshold;
    above.count = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        if (placed) UNROLL for (int i = 0; i < lines_a_block; ++i, next += line) __builtin_prefetch(next);
        if (grouped && !any<T>(load(above.first.data() + b * W) > threshold)) continue;
        if (placed && !any<T>(load(above.second.data() + b * W) > threshold)) {
            append_maxima(b, b * block, above);
            continue;
        }
        const T* entries = start(b);
        int64_t count = above.count;
        for (int64_t i = 0; i < block; i += W, next += W) {
            __builtin_prefetch(next);
            count += append_above<T>(
                ranked<T>(load(entries + i)), threshold, b * block + i, values + count, columns + count);
        }
        above.count = count;
    }
    return above.count < k ? threshold : kth_largest(values, above.count, k, k);
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

#include "topk_rows.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <stdexcept>
#include <string>
#include <type_traits>

#include "level.h"
#include "parallel.h"

#define OPERATOR "topk_rows_kernel.h"
#include "every_level.h"

template <class T>
static void select_row(const T* row, const T* next, int64_t L, int64_t k, Above<T>& above, int32_t* indices) {
    AT_SIMD_LEVEL(topk_row(row, next, L, k, above, indices))
}

void topk_rows(Tensor indices, Tensor scores, int64_t k, int threads) {
    const int64_t N = scores.size[0], L = scores.size[1];
    if (k < 1 || k > L) throw std::out_of_range("topk_rows: k must lie in 1 ... " + std::to_string(L));
    const int64_t rows = std::clamp<int64_t>(N / (4 * threads), 1, 16);  // of a task, which share their buffers
    with_type(scores.item_size, [&](auto type) {
        using T = sum_t<decltype(type)>;
        parallel_for((N + rows - 1) / rows, threads, [&](int64_t task) {
            Above<T> above;
            for (int64_t n = task * rows; n < std::min(N, (task + 1) * rows); ++n) {
                const T* const next = scores.at<const T>(std::min(n + 1, N - 1));
                select_row(scores.at<const T>(n), next, L, k, above, indices.at<int32_t>(n));
            }
        });
    });
}

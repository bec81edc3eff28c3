#pragma once
#include <cstdint>

#include "matrix.h"

// How the rows of topk_rows are selected. Nothing here changes a result, unless it makes no sense.
struct TopkPlan {
    int threads;   // of a block
    int capacity;  // candidates a block can hold, at least k + threads
    int parts;     // a row is cut in so many, each the work of a block; their results are merged
    int sample;    // scores looked at to guess a threshold, at most 2 capacity; 0: none is needed
    int rank;      // which of the sample is the threshold

    // For rows of L columns on a device of so many multiprocessors, which run together all of N rows' blocks.
    static TopkPlan of(int64_t N, int64_t L, int k, int multiprocessors);
    // Of another length, as the parts of a row or their results are.
    TopkPlan for_length(int64_t length, int k) const;

    int64_t span(int64_t L) const;  // columns of a part
};

// Bytes of workspace that topk_rows needs.
int64_t topk_rows_workspace(TopkPlan plan, int64_t N, int k);

// indices[n] (int32) = columns of the k largest of scores[n], ascending. Ties go to the lower column; NaN ranks with
// +inf. 1 <= k <= most_k, k <= L < 2^31. Rows lie `stride` scores apart. Nothing waits, nothing is allocated.
void topk_rows(
    TopkPlan plan, int32_t* indices, const void* scores, Floats type, int64_t stride, int64_t N, int64_t L, int k,
    void* workspace, uintptr_t stream);

constexpr int most_k = 2048;

#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "tensor.h"

// indices[n] = columns of the k largest of scores[n], ascending. Ties go to the lower column; NaN ranks with +inf.
void topk_rows(Tensor indices, Tensor scores, int64_t k, int threads);

// The entries of a row above some threshold, in order of column, and room to work on them.
template <class T>
struct Above {
    std::vector<T> values, first, second, padded;
    std::vector<integer_t<T>> place;
    std::vector<int32_t> columns;
    int64_t count = 0;
    T threshold = 0;
};

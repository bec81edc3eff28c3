#include "invert_indices.h"

#include <algorithm>

#include "operators.h"

void invert_indices(const int32_t* indices, int64_t n, int64_t L, int64_t* offsets, int64_t* entries) {
    std::fill(offsets, offsets + L + 1, int64_t{0});
    for (int64_t p = 0; p < n; ++p) ++offsets[indices[p] + 1];
    offsets[0] = 0;  // it counted the empty slots
    for (int64_t l = 0; l < L; ++l) offsets[l + 1] += offsets[l];
    std::vector<int64_t> next(offsets, offsets + L + 1);
    for (int64_t p = 0; p < n; ++p) entries[next[indices[p] < 0 ? L : indices[p]]++] = p;
}

void invert_indices(Tensor offsets, Tensor entries, Tensor indices, int64_t L) {
    const Support support(indices, indices.size[1], L);
    if (entries.size[0] != support.entries()) throw std::invalid_argument("entries must be as many as indices");
    invert_indices(support.indices, entries.size[0], L, offsets.at<int64_t>(0), entries.at<int64_t>(0));
}

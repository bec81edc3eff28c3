#pragma once
#include <cstdint>

// A stable counting sort: entries[offsets[l] .. offsets[l + 1]) are the positions p with indices[p] == l, ascending, and
// entries[offsets[L] .. n) those with indices[p] == -1.
void invert_indices(const int32_t* indices, int64_t n, int64_t L, int64_t* offsets, int64_t* entries);

#pragma once
#include <cstdint>

// Bytes of workspace that invert_indices needs.
int64_t invert_indices_workspace(int64_t n, int64_t L);

// entries[offsets[l] ... offsets[l + 1]) (int64) = the positions p < n with indices[p] == l, ascending. Latents outside
// 0 ... L - 1 are in no segment: their positions follow behind offsets[L]. n and L + 1 below 2^31. Nothing waits,
// nothing is allocated.
void invert_indices(
    int64_t* offsets, int64_t* entries, const int32_t* indices, int64_t n, int64_t L, void* workspace,
    uintptr_t stream);

#pragma once
#include "update_rows.h"

// Bytes of workspace that replay_rows needs for T steps.
int64_t replay_rows_workspace(int64_t T);

// Decoder rows of R latents through steps last_step + 1 ... T, each with a gradient of 0, in place; then their
// last_step is T. history is [T, 4]: (lr, beta_1, beta_2, eps) of each step. Latents outside 0 ... L - 1 are left
// alone. Nothing waits, nothing is allocated.
void replay_rows(
    const Rows& decoder, const int64_t* latents, int64_t R, int64_t L, int64_t* last_step, const double* history,
    int64_t T, const Streams& streams, void* workspace, uintptr_t stream);

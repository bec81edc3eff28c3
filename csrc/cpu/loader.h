// What sparc_fast.data asks for: spans of a file, read and looked at, and rows of a window, gathered into a batch.
#pragma once
#include <tuple>
#include <vector>

#include "tensor.h"

// The position of the first number of contiguous rows that is NaN or infinite; -1 where there is none.
int64_t first_not_finite(Tensor rows, bool bfloat16);

// Tells the system that bytes begins[i] ... begins[i] + lengths[i] of a file are wanted soon.
void will_need(int file, std::vector<int64_t> begins, std::vector<int64_t> lengths);

// Reads these spans of a file one after the other to out, and looks for NaN and infinity while they are in cache.
// Returns (bytes read, errno, the first number that is not finite or -1): fewer bytes with errno 0 where the file ends.
std::tuple<int64_t, int, int64_t> read_spans(
    int file, std::vector<int64_t> begins, std::vector<int64_t> lengths, Tensor out, bool bfloat16, bool look);

// out[i] <- buffer[rows[i]], as it is, or widened to float32 from bfloat16 or float16.
enum Widening : int { as_it_is, from_bfloat16, from_float16 };
void gather_rows(Tensor out, Tensor buffer, Tensor rows, int widening, int threads);

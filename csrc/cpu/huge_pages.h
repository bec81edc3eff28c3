// Rows gathered from a large matrix cost fewer page walks where the system grants huge pages.
#pragma once
#include "tensor.h"

// Bytes of a result that is not in cache any more when it is read.
constexpr int64_t beyond_caches = 4 << 20;

// Asks for huge pages for a contiguous tensor that nobody has written yet. A wish; nothing depends on it.
void prefer_huge_pages(Tensor tensor);

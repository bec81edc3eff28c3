// Rows gathered from a large matrix cost fewer page walks where the system grants huge pages.
#pragma once
#include "tensor.h"

// Asks for huge pages for a contiguous tensor that nobody has written yet. A wish; nothing depends on it.
void prefer_huge_pages(Tensor tensor);

#include "huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

void prefer_huge_pages(Tensor tensor) {
#ifdef MADV_HUGEPAGE
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(tensor.data), end = begin + tensor.bytes();
    const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)tensor;
#endif
}

// Uninitialised room for numbers, in huge pages where the system grants them.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

// How much operators take, which the binding tells and plans of memory count with.
constexpr int64_t strip_width = 64;     // columns of which sums of gradients copy their operands
constexpr int64_t run_bytes = 4 << 20;  // of gradients that a thread sums before it moves the rows
constexpr int64_t block_samples = 16;   // of a task of decode_loss, and of one sum of its gradient

template <class A>
class Scratch {
   public:
    explicit Scratch(int64_t count) {
        const size_t page = count * sizeof(A) < (size_t(1) << 20) ? 64 : size_t(2) << 20;
        const size_t bytes = (count * sizeof(A) / page + 1) * page;
        data = static_cast<A*>(std::aligned_alloc(page, bytes));
        if (!data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
        if (page > 64) madvise(data, bytes, MADV_HUGEPAGE);  // a wish; nothing depends on it
#endif
    }
    Scratch(Scratch&& other) noexcept : data(other.data) { other.data = nullptr; }
    ~Scratch() { std::free(data); }

    A& operator[](int64_t i) const { return data[i]; }

   private:
    A* data;
};

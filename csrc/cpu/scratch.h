// Uninitialised room for numbers.
#pragma once
#include <cstdint>

#include "lent_memory.h"

// How much operators take, which the binding tells and plans of memory count with.
constexpr int64_t strip_width = 64;     // columns of which sums of gradients copy their operands
constexpr int64_t run_bytes = 4 << 20;  // of gradients that a thread sums before it moves the rows
constexpr int64_t block_samples = 16;   // of a task of decode_loss, and of one sum of its gradient

template <class A>
class Scratch {
   public:
    explicit Scratch(int64_t count) : memory(count * sizeof(A), false) {}

    A& operator[](int64_t i) const { return static_cast<A*>(memory.data())[i]; }

   private:
    LentMemory memory;
};

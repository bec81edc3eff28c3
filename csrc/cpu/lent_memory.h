// Large pieces of memory, lent again when they are free: fresh pages cost more than filling them.
#pragma once
#include <cstddef>

// Bytes from which memory is kept for others.
constexpr size_t large_memory = size_t(1) << 20;
// What so many others did not fit into is given back to the system; and whatever is more than this beyond what was lent
// at once of late.
constexpr int others_before_let_go = 256;
constexpr size_t spare_memory = size_t(64) << 20;

// Uninitialised memory, if it is large in huge pages where the system grants them.
class LentMemory {
   public:
    // What is not had `for_long` may be part of a larger piece.
    LentMemory(size_t n, bool for_long);
    LentMemory(LentMemory&& other) noexcept;
    ~LentMemory();

    void* data() const { return memory; }
    size_t size() const { return bytes; }  // n or more

   private:
    size_t asked, bytes;
    void* memory;
};

// Gives back all that nobody has.
void let_memory_go();

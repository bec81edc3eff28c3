// Large pieces of memory, lent again when they are free: fresh pages cost more than filling them.
#pragma once
#include <cstddef>

// Bytes from which memory is kept for others.
constexpr size_t large_memory = size_t(1) << 20;
// What so many others did not fit into is given back to the system.
constexpr int others_before_let_go = 256;

// Uninitialised memory, if it is large in huge pages where the system grants them.
class LentMemory {
   public:
    explicit LentMemory(size_t bytes);
    LentMemory(LentMemory&& other) noexcept;
    ~LentMemory();

    void* data() const { return memory; }
    size_t size() const { return bytes; }  // what was asked for, or more

   private:
    size_t bytes;
    void* memory;
};

// Gives back all that nobody has.
void let_memory_go();

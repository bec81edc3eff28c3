#include "lent_memory.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifndef _WIN32
#include <pthread.h>
#endif

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr bool is_kept = false;  // so that who uses what is not theirs any more is seen
#else
constexpr bool is_kept = true;
#endif

// What nobody has.
class Kept {
   public:
    // The smallest that fits without much waste, of equal ones the last that was used, which may be in cache; or none.
    void* take(size_t& bytes) {
        const std::lock_guard lock(mutex);
        ++takes;
        auto best = pieces.end();
        for (auto piece = pieces.begin(); piece != pieces.end(); ++piece) {
            const bool fits = bytes <= piece->bytes && piece->bytes <= bytes + bytes / 2;
            if (fits && (best == pieces.end() || piece->bytes <= best->bytes)) best = piece;
        }
        void* found = nullptr;
        if (best != pieces.end()) {
            found = best->data, bytes = best->bytes;
            pieces.erase(best);
        }
        drop([&](const Piece& piece) { return takes - piece.since > others_before_let_go; });
        return found;
    }

    void keep(void* data, size_t bytes) noexcept try {
        const std::lock_guard lock(mutex);
        pieces.push_back({data, bytes, takes});
    } catch (const std::bad_alloc&) {
        std::free(data);
    }

    void let_go() {
        const std::lock_guard lock(mutex);
        drop([](const Piece&) { return true; });
    }

   private:
    struct Piece {
        void* data;
        size_t bytes;
        int64_t since;
    };

    template <class F>
    void drop(F is_dropped) {
        const auto first = std::stable_partition(
            pieces.begin(), pieces.end(), [&](const Piece& piece) { return !is_dropped(piece); });
        std::for_each(first, pieces.end(), [](const Piece& piece) { std::free(piece.data); });
        pieces.erase(first, pieces.end());
    }

    std::mutex mutex;
    std::vector<Piece> pieces;  // those that came last at the end
    int64_t takes = 0;
};

// Never destroyed, since memory may come back after all else ended. A child of a fork begins with none: there, nobody
// may be left to unlock the mutex.
Kept*& kept() {
    static Kept* pieces = [] {
#ifndef _WIN32
        pthread_atfork(nullptr, nullptr, [] { kept() = new Kept; });
#endif
        return new Kept;
    }();
    return pieces;
}

bool is_large(size_t bytes) { return bytes >= large_memory; }

size_t in_pages(size_t bytes, size_t page) { return (bytes + page - 1) / page * page; }

}  // namespace

LentMemory::LentMemory(size_t asked) : bytes(in_pages(std::max<size_t>(asked, 1), 64)) {
    const size_t page = is_large(bytes) ? size_t(2) << 20 : 64;
    bytes = in_pages(bytes, page);
    memory = is_large(bytes) ? kept()->take(bytes) : nullptr;
    if (memory) return;
    memory = std::aligned_alloc(page, bytes);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (is_large(bytes)) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; nothing depends on it
#endif
}

LentMemory::LentMemory(LentMemory&& other) noexcept
    : bytes(other.bytes), memory(std::exchange(other.memory, nullptr)) {}

LentMemory::~LentMemory() {
    if (memory && is_kept && is_large(bytes))
        kept()->keep(memory, bytes);
    else
        std::free(memory);
}

void let_memory_go() { kept()->let_go(); }

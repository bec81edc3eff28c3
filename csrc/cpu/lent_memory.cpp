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

// What nobody has. With all that is lent it is little more than was asked for at once of late: `spare_memory`.
class Kept {
   public:
    // The smallest that fits, of equal ones the last that was used, which may be in cache; or none. What is had for long
    // must fit without much waste. The caller has so many bytes then, which count.
    void* take(size_t& bytes, bool for_long) {
        const std::lock_guard lock(mutex);
        asked += bytes;
        auto best = pieces.end();
        for (auto piece = pieces.begin(); piece != pieces.end(); ++piece) {
            const bool fits = bytes <= piece->bytes && (!for_long || piece->bytes <= bytes + bytes / 4);
            if (fits && (best == pieces.end() || piece->bytes <= best->bytes)) best = piece;
        }
        void* found = nullptr;
        if (best != pieces.end()) {
            found = best->data, bytes = best->bytes;
            remove(best);
        }
        lent += bytes;
        if (++takes % others_before_let_go == 0) most_before = most, most = 0;
        most = std::max(most, asked);
        while (!pieces.empty() && takes - pieces.front().since > others_before_let_go) drop(pieces.begin());
        const size_t room = std::max(most, most_before) + spare_memory;
        while (!pieces.empty() && lent + idle > room) drop(least_beyond(lent + idle - room));
        return found;
    }

    void keep(void* data, size_t bytes, size_t of_these) noexcept {
        const std::lock_guard lock(mutex);
        lent -= std::min(lent, bytes);  // a child of a fork has never heard of what it was left
        asked -= std::min(asked, of_these);
        try {
            pieces.push_back({data, bytes, takes});
            idle += bytes;
        } catch (const std::bad_alloc&) {
            std::free(data);
        }
    }

    void let_go() {
        const std::lock_guard lock(mutex);
        while (!pieces.empty()) drop(pieces.end() - 1);
    }

   private:
    struct Piece {
        void* data;
        size_t bytes;
        int64_t since;
    };
    using Place = std::vector<Piece>::iterator;

    // The smallest of at least so many bytes, or the largest.
    Place least_beyond(size_t bytes) {
        return std::min_element(pieces.begin(), pieces.end(), [&](const Piece& a, const Piece& b) {
            const bool enough = a.bytes >= bytes, also = b.bytes >= bytes;
            return enough && also ? a.bytes < b.bytes : enough || also ? enough : a.bytes > b.bytes;
        });
    }

    void drop(Place place) {
        std::free(place->data);
        remove(place);
    }

    void remove(Place place) {
        idle -= place->bytes;
        pieces.erase(place);
    }

    std::mutex mutex;
    std::vector<Piece> pieces;  // those that came last at the end
    size_t lent = 0, idle = 0, asked = 0, most = 0, most_before = 0;
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

LentMemory::LentMemory(size_t n, bool for_long) : bytes(in_pages(std::max<size_t>(n, 1), 64)) {
    const size_t page = is_large(bytes) ? size_t(2) << 20 : 64;
    asked = bytes = in_pages(bytes, page);
    memory = is_large(bytes) ? kept()->take(bytes, for_long) : nullptr;
    if (memory) return;
    memory = std::aligned_alloc(page, bytes);
    if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (is_large(bytes)) madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; nothing depends on it
#endif
}

LentMemory::LentMemory(LentMemory&& other) noexcept
    : asked(other.asked), bytes(other.bytes), memory(std::exchange(other.memory, nullptr)) {}

LentMemory::~LentMemory() {
    if (memory && is_kept && is_large(bytes))
        kept()->keep(memory, bytes, asked);
    else
        std::free(memory);
}

void let_memory_go() { kept()->let_go(); }

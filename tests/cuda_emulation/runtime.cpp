// The fibres behind cuda_emulation.h. Never instrumented: ThreadSanitizer is told when another fibre goes on, and must
// not see how that comes about.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_emulation.h"

#define IF_THERE __attribute__((weak))
extern "C" {
IF_THERE void* __tsan_get_current_fiber();
IF_THERE void* __tsan_create_fiber(unsigned flags);
IF_THERE void __tsan_switch_to_fiber(void* fiber, unsigned flags);
IF_THERE void __tsan_acquire(void* at);
IF_THERE void __tsan_release(void* at);
IF_THERE void __asan_poison_memory_region(const volatile void* at, size_t bytes);
IF_THERE void __asan_unpoison_memory_region(const volatile void* at, size_t bytes);
IF_THERE void* __asan_region_is_poisoned(const volatile void* at, size_t bytes);
IF_THERE void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
IF_THERE void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* bytes);
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t stack_bytes = 256 << 10, page = 4096;
constexpr uint32_t shared_begin = 1024;  // what shared memory is aligned to, and its first address in descriptors
constexpr unsigned no_order = 1;  // ThreadSanitizer: a switch orders nothing

// Where ThreadSanitizer keeps what happened before.
struct Order {
    char at = 0;
    void release() {
        if (__tsan_release) __tsan_release(&at);
    }
    void acquire() {
        if (__tsan_acquire) __tsan_acquire(&at);
    }
};

// A product of tiles that is begun; `group` is how many were committed before it.
struct Product {
    uint64_t a, b;
    bool adds;
    float (*value)(uint16_t);
    unsigned group;
};

// Where a flow of control goes on, as __builtin_setjmp leaves it: swapcontext would ask the system for signals at every
// switch, and AddressSanitizer's forget the red zones of the whole stack.
using Place = void* [5];

struct Fibre {
    Place place;
    char* stack = nullptr;
    void *tsan = nullptr, *asan = nullptr;
    dim3 index;
    enum { ready, at_barrier, at_vote, at_phase, done } state = ready;
    Where where;
    Vote vote;
    unsigned mask;
    uint64_t value, brought[32];
    bool voted;  // the vote it waits for is complete
    bool begun = false;
    const uint64_t* phase_of;
    unsigned parity;
    Product products[16];
    unsigned pending, groups;
    float *sums, held[128];  // where sums go, and what they are
    bool fenced;
};

struct Copy {
    char* to;
    const char* from;
    unsigned bytes;
    const uint64_t* barrier;
    TileMap tile;  // without rows: it is of single bytes
    int column, row;
};

// An mbarrier.
struct Transactions {
    const uint64_t* at;
    Order order[2];
    unsigned count, missing;  // arrivals that end a phase
    int64_t bytes = 0;        // that are still to come in this phase
    unsigned phase = 0;       // how many are over
    bool fenced = false;
};

struct Warp {
    Order order[2];
    int meetings = 0;
};

std::vector<std::vector<Fibre>> teams;  // one for all blocks, or one each: to ThreadSanitizer they run at once
Fibre* fibres;                          // of the block that runs
std::vector<Warp> warps;
Order starts, ends, barriers[2];
int at_barrier, agreeing, counted, barriers_met;
Fibre* current;
// Of the block that runs. Arrays, as ThreadSanitizer sees what containers do with their memory.
Transactions transactions[32];
Copy copies[64];
unsigned set_up, on_their_way;
Place host;
void *host_tsan, *host_asan;
const void* host_stack;
size_t host_stack_bytes;
const std::function<void()>* running;
std::vector<char> shared;
std::vector<std::vector<char>> retired;  // shared memory of blocks that may still run, as ThreadSanitizer sees it
// Not one of <random>: of a template that a kernel's program uses too, the linker may take the instrumented copy.
struct Random {
    using result_type = uint32_t;
    uint64_t state = 1;
    static constexpr uint32_t min() { return 0; }
    static constexpr uint32_t max() { return ~0u; }
    uint32_t operator()() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 32); }
} shuffle;
int schedule;
std::string error;

[[noreturn, gnu::noinline]] void jump(Place& to) { __builtin_longjmp(to, 1); }

// Its callers find their registers on the stack that they come back to.
[[gnu::noipa]] void switch_over(Place& from, Place& to) {
    if (!__builtin_setjmp(from)) jump(to);
}

[[gnu::noipa]] void begin(Place& from, const ucontext_t& to) {
    if (!__builtin_setjmp(from)) setcontext(&to);
}

void switch_to_host() {
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(host_tsan, no_order);
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&current->asan, host_stack, host_stack_bytes);
    switch_over(current->place, host);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(current->asan, nullptr, nullptr);
}

// Block after block, a fibre is a thread of each.
void run_fibre() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
    for (;; switch_to_host()) {
        starts.acquire();
        (*running)();
        ends.release();
        current->state = Fibre::done;
    }
}

void switch_to(Fibre& fibre) {
    current = &fibre;
    threadIdx = fibre.index;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fibre.tsan, no_order);
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&host_asan, fibre.stack + page, stack_bytes);
    if (fibre.begun) {
        switch_over(host, fibre.place);
    } else {
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = fibre.stack + page;
        context.uc_stack.ss_size = stack_bytes;
        context.uc_link = nullptr;
        makecontext(&context, run_fibre, 0);
        fibre.begun = true;
        begin(host, context);
    }
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(host_asan, nullptr, nullptr);
}

void prepare(Fibre& fibre, unsigned i) {
    if (!fibre.stack) {
        const int rights = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
        void* const memory = mmap(nullptr, stack_bytes + page, rights, flags, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        fibre.stack = static_cast<char*>(memory);
        mprotect(memory, page, PROT_NONE);  // a stack that overflows is noticed
    }
    if (fibre.begun && fibre.state != Fibre::done) {  // in a launch that failed, which left frames behind
        fibre.begun = false;
        if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fibre.stack + page, stack_bytes);
    }
    if (__tsan_create_fiber && !fibre.tsan) fibre.tsan = __tsan_create_fiber(0);
    fibre.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fibre.state = Fibre::ready;
    fibre.pending = fibre.groups = fibre.fenced = 0;
}

std::string described(const Where& where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

[[noreturn]] void fail(const std::string& message) {
    error = message + " in block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
    switch_to_host();
    std::abort();
}

std::string waiting(unsigned threads) {
    std::string message = "threads wait for others that never come:";
    int mentioned = 0;
    for (unsigned i = 0; i < threads && mentioned < 4; ++i) {
        const Fibre& fibre = fibres[i];
        if (fibre.state == Fibre::done || fibre.state == Fibre::ready) continue;
        message += (mentioned++ ? ", thread " : " thread ") + std::to_string(i) + " at " + described(fibre.where);
    }
    return message + " in block " + std::to_string(blockIdx.x);
}

// Not by memcpy, which sanitizers would take for the host's.
void move(char* to, const char* from, unsigned bytes) {
    for (unsigned i = 0; i < bytes; ++i) const_cast<volatile char*>(to)[i] = from ? from[i] : char(0xa5);
}

// Where 16 bytes of a tile lie that would lie there.
char* swizzled(uint32_t address, bool is) {
    return shared_memory() + (is ? address ^ (address >> 7 & 7) << 4 : address) - shared_begin;
}

void move_tile(const Copy& copy) {
    const TileMap& tile = copy.tile;
    for (int r = 0; r < tile.rows_of_tile; ++r)
        for (int c = 0; c < 64; c += 8) {
            char* const to = swizzled(in_shared(copy.to) + r * 128 + c * 2, tile.swizzled);
            const bool is_row = copy.row + r < tile.rows;
            const char* const from = tile.data + (copy.row + r) * tile.apart + (copy.column + c) * 2;
            const int64_t inside = is_row ? std::clamp<int64_t>(tile.columns - copy.column - c, 0, 8) * 2 : 0;
            move(to, from, inside);
            for (int i = inside; i < 16; ++i) const_cast<volatile char*>(to)[i] = 0;
        }
}

// 16 columns of a row of the tile that a descriptor describes.
void read_row(float (&numbers)[16], uint64_t tile, int row, float (*value)(uint16_t)) {
    const uint32_t begin = (tile & 0x3fff) << 4, apart = (tile >> 32 & 0x3fff) << 4;
    for (int half = 0; half < 2; ++half) {
        const char* const from = swizzled(begin + row / 8 * apart + row % 8 * 128 + half * 16, tile >> 62 == 1);
        for (int i = 0; i < 8; ++i) {
            uint16_t word;
            __builtin_memcpy(&word, from + 2 * i, 2);
            numbers[8 * half + i] = value(word);
        }
    }
}

// As tensor cores may add: 16 products and the sum so far, each cut to 24 bits of the largest.
float cut_sum(float sum, const float (&a)[16], const float (&b)[16]) {
    double terms[17], largest = 0, plain = 0;
    for (int i = 0; i < 17; ++i) {
        terms[i] = i < 16 ? double(a[i]) * b[i] : sum;
        largest = std::max(largest, std::abs(terms[i])), plain += terms[i];
    }
    if (!(std::abs(plain) < HUGE_VAL) || largest == 0) return float(plain);
    const int unit = std::ilogb(largest) - 23;
    const double scale = std::ldexp(1.0, -unit);
    int64_t total = 0;
    for (const double term : terms) total += int64_t(term * scale);
    return float(std::ldexp(double(total), unit));
}

// The sums of the thread that runs.
void multiply_now(const Product& product) {
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 % 4 * 16 + lane / 4;
    float a[2][16], b[16];
    for (int half = 0; half < 2; ++half) read_row(a[half], product.a, first + 8 * half, product.value);
    for (int j = 0; j < 32; ++j)
        for (int i = 0; i < 2; ++i) {
            read_row(b, product.b, 8 * j + lane % 4 * 2 + i, product.value);
            for (int half = 0; half < 2; ++half) {
                float& sum = current->held[4 * j + 2 * half + i];
                sum = cut_sum(product.adds ? sum : 0, a[half], b);
            }
        }
}

Transactions* transactions_at(const uint64_t* at) {
    for (unsigned i = 0; i < set_up; ++i)
        if (transactions[i].at == at) return &transactions[i];
    return nullptr;
}

void end_phase(Transactions& of) {
    if (of.missing || of.bytes) return;
    ++of.phase, of.missing = of.count;
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    for (int i = 0; i < threads; ++i) {
        Fibre& fibre = fibres[i];
        if (fibre.state == Fibre::at_phase && fibre.phase_of == of.at && (of.phase & 1) != fibre.parity)
            fibre.state = Fibre::ready;
    }
}

// One of the copies arrives, in whatever order.
bool deliver() {
    if (!on_their_way) return false;
    Copy& next = copies[schedule > 1 ? shuffle() % on_their_way : 0];
    const Copy copy = next;
    next = copies[--on_their_way];
    copy.tile.rows ? move_tile(copy) : move(copy.to, copy.from, copy.bytes);
    Transactions& of = *transactions_at(copy.barrier);
    of.bytes -= copy.bytes;
    end_phase(of);
    return true;
}

void run_block(unsigned threads) {
    set_up = on_their_way = 0;
    for (unsigned i = 0; i < threads; ++i) prepare(fibres[i], i);
    warps.assign((threads + 31) / 32, Warp{});
    at_barrier = agreeing = barriers_met = 0;
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; ++i) order[i] = schedule == 1 ? threads - 1 - i : i;
    for (unsigned left = threads; left && error.empty();) {
        if (schedule > 1) std::shuffle(order.begin(), order.end(), shuffle);
        bool progress = false;
        for (unsigned i : order) {
            if (fibres[i].state != Fibre::ready) continue;
            progress = true;
            switch_to(fibres[i]);
            left -= fibres[i].state == Fibre::done;
            if (!error.empty()) break;
        }
        // as late as may be, or at any time
        if (error.empty() && (!progress || (schedule > 1 && shuffle() % 2))) progress |= deliver();
        if (!progress && error.empty()) error = waiting(threads);
    }
    if (error.empty() && on_their_way) error = "a block ends before a bulk copy that it began";
}

}  // namespace

// For those who count launches, with the kernels left out or run as ever.
extern "C" {
__attribute__((visibility("default"))) int cuda_emulation_launches = 0;
__attribute__((visibility("default"))) int cuda_emulation_leaves_out = 0;
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z) throw std::runtime_error("invalid launch");
    ++cuda_emulation_launches;
    if (cuda_emulation_leaves_out) return;
    const char* const chosen = std::getenv("CUDA_EMULATION_SCHEDULE");
    schedule = chosen ? std::atoi(chosen) : 0;
    shuffle.state = unsigned(schedule);
    gridDim = grid, blockDim = block;
    running = &kernel;
    error.clear();
    if (__tsan_get_current_fiber) host_tsan = __tsan_get_current_fiber();
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned b = 0; b < blocks && error.empty(); ++b) {
        const unsigned at = schedule == 1 ? blocks - 1 - b : b;
        blockIdx = {at % grid.x, at / grid.x % grid.y, at / grid.x / grid.y};
        // new memory for each block: two of them never share it
        std::vector<char> rubbish(shared_bytes + shared_begin, char(0xa5));
        rubbish.swap(shared);
        if (__tsan_create_fiber) retired.push_back(std::move(rubbish));
        const size_t team = __tsan_create_fiber ? b : 0;
        if (teams.size() <= team) teams.resize(team + 1);
        if (teams[team].size() < threads) teams[team].resize(threads);
        fibres = teams[team].data();
        starts.release();
        run_block(threads);
        if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(shared.data(), shared.size());
    }
    ends.acquire();
    retired.clear();
    if (!error.empty()) throw std::runtime_error(error);
}

char* shared_memory() {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(shared.data());
    return shared.data() + (shared_begin - begin % shared_begin) % shared_begin;
}

void forbid(const void* begin, size_t bytes) {
    if (__asan_poison_memory_region) __asan_poison_memory_region(begin, bytes);
}

void pause_at_atomic() {
    if (schedule > 1 && shuffle() % 4 == 0) switch_to_host();
}

unsigned lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32; }

int barrier(bool predicate, Where where) {
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    Fibre& self = *current;
    self.where = where;
    for (int i = 0; i < threads; ++i)
        if (fibres[i].state == Fibre::at_barrier && fibres[i].where.line() != where.line())
            fail("threads of a block wait at different barriers, " + described(fibres[i].where) + " and " +
                 described(where));
    Order& order = barriers[barriers_met & 1];
    order.release();
    agreeing += predicate;
    if (++at_barrier == threads) {
        for (int i = 0; i < threads; ++i)
            if (&fibres[i] != &self) fibres[i].state = Fibre::ready;
        counted = agreeing;
        at_barrier = agreeing = 0;
        ++barriers_met;
    } else {
        self.state = Fibre::at_barrier;
    }
    // all go on in the order of the schedule, the last to arrive as well
    switch_to_host();
    order.acquire();
    return counted;
}

const uint64_t* meet(Vote vote, unsigned mask, uint64_t value, Where where) {
    Fibre& self = *current;
    const unsigned i = unsigned(current - fibres), first = i / 32 * 32;
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    self.where = where, self.vote = vote, self.mask = mask, self.value = value, self.voted = false;
    if (!(mask >> (i - first) & 1)) fail("a mask without the lane itself at " + described(where));
    Warp& warp = warps[i / 32];
    Order& order = warp.order[warp.meetings & 1];
    if (vote == Vote::sync) order.release();
    self.state = Fibre::at_vote;
    bool complete = true;
    for (unsigned l = 0; l < 32; ++l) {
        if (!(mask >> l & 1)) continue;
        if (first + l >= threads) complete = false;
        if (!complete) break;
        const Fibre& other = fibres[first + l];
        complete = other.state == Fibre::at_vote && !other.voted && other.mask == mask && other.vote == vote &&
                   other.where.line() == where.line();
    }
    if (complete) {
        warp.meetings += vote == Vote::sync;
        for (unsigned l = 0; l < 32; ++l) {
            if (!(mask >> l & 1)) continue;
            Fibre& other = fibres[first + l];
            other.voted = true, other.state = Fibre::ready;
            for (unsigned j = 0; j < 32; ++j)
                if (mask >> j & 1) other.brought[j] = fibres[first + j].value;
        }
    }
    switch_to_host();
    if (vote == Vote::sync) order.acquire();
    return self.brought;
}

static Transactions& known(const uint64_t* at, Where where) {
    Transactions* const found = transactions_at(at);
    if (!found) fail("a barrier that nobody set up at " + described(where));
    return *found;
}

void begin_transactions(const uint64_t* at, unsigned count) {
    if (!transactions_at(at) && set_up == std::size(transactions)) fail("too many barriers");
    Transactions& of = transactions_at(at) ? *transactions_at(at) : transactions[set_up++];
    of.at = at, of.count = of.missing = count, of.bytes = 0, of.phase = 0, of.fenced = false;
}

void fence_transactions() {
    for (unsigned i = 0; i < set_up; ++i) transactions[i].fenced = true;
}

void arrive(const uint64_t* at, unsigned bytes, Where where) {
    Transactions& of = known(at, where);
    if (of.missing == 0) fail("more arrivals than a barrier counts at " + described(where));
    of.order[of.phase & 1].release();
    of.bytes += bytes, --of.missing;
    end_phase(of);
}

void wait_for_phase(const uint64_t* at, unsigned parity, Where where) {
    Transactions& of = known(at, where);
    if ((of.phase & 1) == parity) {
        current->where = where, current->phase_of = at, current->parity = parity;
        current->state = Fibre::at_phase;
        switch_to_host();
    } else {
        pause_at_atomic();  // others may overtake it
    }
    of.order[parity].acquire();
}

void bulk_copy(void* to, const void* from, unsigned bytes, const uint64_t* at, Where where) {
    if (!known(at, where).fenced) fail("a bulk copy to a barrier before any fence at " + described(where));
    if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes) % 16)
        fail("a bulk copy not of whole 16 bytes at " + described(where));
    if (__asan_region_is_poisoned &&
        (__asan_region_is_poisoned(to, bytes) || __asan_region_is_poisoned(const_cast<void*>(from), bytes)))
        fail("a bulk copy beyond an array at " + described(where));
    if (on_their_way == std::size(copies)) fail("too many copies at once");
    move(static_cast<char*>(to), nullptr, bytes);  // nobody may read there any more
    copies[on_their_way++] = {static_cast<char*>(to), static_cast<const char*>(from), bytes, at, {}, 0, 0};
}

uint32_t in_shared(const void* p) {
    return uint32_t(static_cast<const char*>(p) - shared_memory()) + shared_begin;
}

TileMap map_tiles(const void* data, int64_t rows, int64_t columns, int64_t apart, int rows_of_tile) {
    const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && apart % 16 == 0 && apart < int64_t(1) << 40;
    if (!fits || rows < 1 || columns < 1 || rows_of_tile < 1 || rows_of_tile > 256)
        throw std::runtime_error("no tiles of such a matrix");
    return {static_cast<const char*>(data), rows, columns, apart, rows_of_tile, true};
}

void load_tile(void* to, const TileMap& map, int column, int row, const uint64_t* at, Where where) {
    const unsigned bytes = map.rows_of_tile * 128;
    if (!known(at, where).fenced) fail("a tile to a barrier before any fence at " + described(where));
    if (in_shared(to) % 1024) fail("a tile that does not begin at whole 1024 bytes at " + described(where));
    bool outside = __asan_region_is_poisoned && __asan_region_is_poisoned(to, bytes);
    const int64_t width = std::min<int64_t>(map.columns - column, 64) * 2;
    for (int64_t r = row; r < std::min<int64_t>(map.rows, row + map.rows_of_tile) && __asan_region_is_poisoned; ++r)
        outside |= width > 0 && __asan_region_is_poisoned(
            const_cast<char*>(map.data + r * map.apart + column * 2), width) != nullptr;
    if (outside) fail("a tile beyond its matrix or its place at " + described(where));
    if (on_their_way == std::size(copies)) fail("too many copies at once");
    move(static_cast<char*>(to), nullptr, bytes);
    copies[on_their_way++] = {static_cast<char*>(to), nullptr, bytes, at, map, column, row};
}

void begin_products() { current->fenced = true; }

void multiply(float (&sums)[128], uint64_t a, uint64_t b, bool adds, float (*value)(uint16_t), Where where) {
    Fibre& self = *current;
    meet(Vote::values, ~0u, 0, where);
    if (!self.fenced) fail("a product of sums that no fence precedes at " + described(where));
    if (self.pending == std::size(self.products)) fail("too many products at once at " + described(where));
    if (self.pending && self.sums != sums) fail("products of two threads' sums at " + described(where));
    if (!self.pending) std::copy_n(sums, 128, self.held);
    self.sums = sums;
    std::fill_n(sums, 128, NAN);
    self.products[self.pending++] = {a, b, adds, value, self.groups};
}

void commit_products() { ++current->groups; }

void wait_for_products(unsigned pending, Where where) {
    Fibre& self = *current;
    unsigned done = 0;
    while (done < self.pending && self.products[done].group + pending < self.groups) multiply_now(self.products[done++]);
    self.pending -= done;
    for (unsigned i = 0; i < self.pending; ++i) self.products[i] = self.products[i + done];
    if (done && !self.pending) std::copy_n(self.held, 128, self.sums), self.fenced = false;
    meet(Vote::values, ~0u, 0, where);
}

}  // namespace emulation

// The fibres behind cuda_emulation.h. Never instrumented: ThreadSanitizer is told when another fibre goes on, and must
// not see how that comes about.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
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
IF_THERE void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t bytes);
IF_THERE void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* bytes);
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr size_t stack_bytes = 256 << 10, page = 4096;
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

struct Fibre {
    ucontext_t context;
    char* stack = nullptr;
    void *tsan = nullptr, *asan = nullptr;
    dim3 index;
    enum { ready, at_barrier, at_vote, done } state;
    Where where;
    Vote vote;
    unsigned mask;
    uint64_t value, brought[32];
    bool voted;  // the vote it waits for is complete
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
ucontext_t host;
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

void switch_to_host(bool leaving) {
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(host_tsan, no_order);
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(leaving ? nullptr : &current->asan, host_stack, host_stack_bytes);
    swapcontext(&current->context, &host);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(current->asan, nullptr, nullptr);
}

void switch_to(Fibre& fibre) {
    current = &fibre;
    threadIdx = fibre.index;
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fibre.tsan, no_order);
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&host_asan, fibre.stack + page, stack_bytes);
    swapcontext(&host, &fibre.context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(host_asan, nullptr, nullptr);
}

void run_fibre() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
    starts.acquire();
    (*running)();
    ends.release();
    current->state = Fibre::done;
    switch_to_host(true);
}

void prepare(Fibre& fibre, unsigned i) {
    if (!fibre.stack) {
        const int rights = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS;
        void* const memory = mmap(nullptr, stack_bytes + page, rights, flags, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        fibre.stack = static_cast<char*>(memory);
        mprotect(memory, page, PROT_NONE);  // a stack that overflows is noticed
    }
    // frames that a failed launch left behind
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(fibre.stack + page, stack_bytes);
    if (__tsan_create_fiber && !fibre.tsan) fibre.tsan = __tsan_create_fiber(0);
    fibre.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    fibre.state = Fibre::ready;
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = fibre.stack + page;
    fibre.context.uc_stack.ss_size = stack_bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, run_fibre, 0);
}

std::string described(const Where& where) {
    const std::string file = where.file_name();
    return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

[[noreturn]] void fail(const std::string& message) {
    error = message + " in block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x);
    switch_to_host(true);
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

void run_block(unsigned threads) {
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
        if (!progress && error.empty()) error = waiting(threads);
    }
}

}  // namespace

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    const unsigned threads = block.x * block.y * block.z;
    if (!threads || threads > 1024 || !grid.x || !grid.y || !grid.z) throw std::runtime_error("invalid launch");
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
        std::vector<char> rubbish(shared_bytes + 16, char(0xa5));
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

char* shared_memory() { return shared.data() + (16 - reinterpret_cast<uintptr_t>(shared.data()) % 16) % 16; }

void forbid(const void* begin, size_t bytes) {
    if (__asan_poison_memory_region) __asan_poison_memory_region(begin, bytes);
}

void pause_at_atomic() {
    if (schedule > 1 && shuffle() % 4 == 0) switch_to_host(false);
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
    switch_to_host(false);
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
    switch_to_host(false);
    if (vote == Vote::sync) order.acquire();
    return self.brought;
}

}  // namespace emulation

// Small kernels, each with one fault of the kind that kernels have, and sound ones beside them: what the emulation must
// find, and what it must not. `faults <case>` runs the faulty kernel, `faults` all the sound ones; exits with 1 where a
// result is wrong or a launch fails, with 2 where there is no such case.
#include <cstdio>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiles.cuh"

constexpr int threads = 64, capacity = 16;

// Every thread reads what its neighbour wrote.
__global__ void turn_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int* const values = memory.take<int>(threads);
    values[threadIdx.x] = threadIdx.x;
    if (!fault) __syncthreads();
    out[threadIdx.x] = values[(threadIdx.x + 1) % threads];
}

__global__ void turn_in_warp_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int* const values = memory.take<int>(threads);
    const unsigned neighbour = threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32;
    values[threadIdx.x] = threadIdx.x;
    if (!fault) __syncwarp();
    out[threadIdx.x] = values[neighbour];
}

// The sum of 0 ... threads - 1; the fault is in shared memory that nobody cleared.
__global__ void sum_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int* const sum = memory.take<int>(1);
    if (threadIdx.x == 0 && !fault) *sum = 0;
    __syncthreads();
    atomicAdd(sum, int(threadIdx.x));
    __syncthreads();
    if (threadIdx.x == 0) *out = *sum;
}

__global__ void static_sum_kernel(int* out, bool) {
    __shared__ int sum;
    if (threadIdx.x == 0) sum = 0;
    __syncthreads();
    const int of_warp = __reduce_add_sync(all_lanes, int(threadIdx.x));
    if (threadIdx.x % 32 == 0) atomicAdd(&sum, of_warp);
    __syncthreads();
    if (threadIdx.x == 0) *out = sum;
}

// One place too far, in shared memory and in a tensor.
__global__ void fill_shared_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int *const values = memory.take<int>(threads - 1), *const last = memory.take<int>(1);
    if (int(threadIdx.x) < threads - !fault) values[threadIdx.x] = 1;
    if (threadIdx.x == 0) *last = 2;
    __syncthreads();
    if (threadIdx.x < threads - 1) out[threadIdx.x] = values[threadIdx.x] + *last;
}

__global__ void fill_kernel(int* out, bool fault) {
    if (int(threadIdx.x) < threads - !fault) out[threadIdx.x] = 3;
}

// The number of all even threads, gathered where only `capacity` have room.
__global__ void gather_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int *const found = memory.take<int>(capacity), *const count = memory.take<int>(1), *const sum = memory.take<int>(1);
    if (threadIdx.x == 0) *count = *sum = 0;
    __syncthreads();
    bool waiting = threadIdx.x % 2 == 0;
    do {
        const int slot = waiting ? atomicAdd(count, 1) : capacity;
        if (slot < capacity) found[slot] = threadIdx.x, waiting = false;
        __syncthreads();
        if (threadIdx.x < smaller<unsigned>(*count, capacity)) atomicAdd(sum, found[threadIdx.x]);
        __syncthreads();
        if (threadIdx.x == 0) *count = 0;
    } while (__syncthreads_or(waiting && !fault));
    if (threadIdx.x == 0) *out = *sum;
}

// The odd numbers of a tensor are moved to its front, over others that must have been read before.
__global__ void compact_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int* const kept = memory.take<int>(1);
    if (threadIdx.x == 0) *kept = 0;
    out[threadIdx.x] = threadIdx.x % 2;
    __syncthreads();
    const bool odd = out[threadIdx.x];
    if (!fault) __syncthreads();
    if (odd) out[atomicAdd(kept, 1)] = 3;
}

__global__ void half_barrier_kernel(int* out, bool fault) {
    if (!fault || threadIdx.x < threads / 2) __syncthreads();
    out[threadIdx.x] = 1;
}

__global__ void two_barriers_kernel(int* out, bool fault) {
    if (fault && threadIdx.x < threads / 2)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}

__global__ void half_vote_kernel(int* out, bool fault) {
    if (fault && threadIdx.x % 32 == 7) return;
    out[threadIdx.x] = __popc(__ballot_sync(all_lanes, threadIdx.x % 2 == 0));
}

__global__ void other_mask_kernel(int* out, bool fault) {
    const unsigned mask = threadIdx.x % 32 < 16 ? 0xffffu : fault ? 0xffffu : 0xffff0000u;
    out[threadIdx.x] = __popc(__ballot_sync(mask, 1));
}

// Blocks that add to one number.
__global__ void add_kernel(int* out, bool fault) {
    if (threadIdx.x != blockIdx.x) return;
    if (fault)
        *out += 1;
    else
        atomicAdd(out, 1);
}

__global__ void vector_kernel(int* out, bool fault) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(out + (fault ? 1 : 4)));
    if (threadIdx.x == 0) out[0] = four.x + 1;
}

__global__ void vector_store_kernel(int* out, bool fault) {
    if (threadIdx.x == 0) __stcs(reinterpret_cast<int4*>(out + (fault ? 2 : 4)), int4{1, 2, 3, 4});
}

// What the thread of the other half has, both halves by the same line.
__global__ void swap_kernel(int* out, bool fault) {
    out[threadIdx.x] = __shfl_xor_sync(fault && threadIdx.x % 2 ? 0x55555555u : all_lanes, int(threadIdx.x), 16);
}

enum class Flaw { fence, phase, empty, bytes, tile_edge, swizzle, sums_fence, sums_early, tile_early };
constexpr int rows = 4, stages = 2;
alignas(16) static int numbers[rows * threads];

// Sums of rows that bulk copies bring, the next one while this one is read; the second warp is the slower one.
template <Flaw flaw>
__global__ void staged_kernel(int* out, bool fault) {
    SharedMemory memory(shared_memory());
    int* const row = reinterpret_cast<int*>(memory.take<int4>(stages * threads / 4));
    uint64_t* const barriers = memory.take<uint64_t>(2 * stages);
    const auto has = [=](Flaw what) { return fault && flaw == what; };
    const auto full = [=](int r) { return TransactionBarrier{barriers + r % stages}; };
    const auto empty = [=](int r) { return TransactionBarrier{barriers + stages + r % stages}; };
    if (threadIdx.x == 0) {
        for (int r = 0; r < stages; ++r) full(r).begin(1), empty(r).begin(threads / 32);
        if (!has(Flaw::fence)) fence_barriers();
    }
    __syncthreads();
    const auto ask = [=](int r) {
        if (threadIdx.x != 0) return;
        const unsigned bytes = threads * sizeof(int);
        if (!has(Flaw::empty)) empty(r).wait((r / stages & 1) ^ 1);
        full(r).arrive_expecting(has(Flaw::bytes) ? bytes - 16 : bytes);
        bulk_copy(row + r % stages * threads, numbers + r * threads, bytes, full(r));
    };
    ask(0);
    int sum = 0;
    for (int r = 0; r < rows; ++r) {
        if (r + 1 < rows) ask(r + 1);
        full(r).wait((r / stages & 1) ^ has(Flaw::phase));
        if (threadIdx.x >= 32) __syncwarp();
        sum += row[r % stages * threads + (threadIdx.x + 1) % threads];
        __syncwarp();
        if (threadIdx.x % 32 == 0) empty(r).arrive();
    }
    out[threadIdx.x] = sum;
}

// A B^T, of matrices that end within tiles: a producer brings them, four warps multiply.
constexpr int multipliers = 128, rows_of_a = 50, rows_of_b = 250, columns = 280, columns_in_memory = 288;
alignas(16) static uint16_t matrix_a[rows_of_a * columns_in_memory], matrix_b[rows_of_b * columns_in_memory];

struct alignas(tile_alignment) Tiles {
    uint16_t a[product_rows * tile_columns], b[product_columns * tile_columns];
};

struct TileShared {
    Tiles* tiles;
    uint64_t* barriers;

    explicit TileShared(SharedMemory&& memory)
        : tiles(memory.take<Tiles>(stages)), barriers(memory.take<uint64_t>(2 * stages)), bytes(memory.bytes()) {}
    size_t bytes;
};

template <Flaw flaw>
__global__ void multiply_kernel(int* out, bool fault) {
    const TileShared shared{SharedMemory(shared_memory())};
    const auto has = [=](Flaw what) { return fault && flaw == what; };
    const auto full = [=](int step) { return TransactionBarrier{shared.barriers + step % stages}; };
    const auto empty = [=](int step) { return TransactionBarrier{shared.barriers + stages + step % stages}; };
    const auto tiles = [=](int step) -> Tiles& { return shared.tiles[step % stages]; };
    if (threadIdx.x == 0) {
        for (int s = 0; s < stages; ++s) full(s).begin(1), empty(s).begin(multipliers / 32);
        if (!has(Flaw::fence)) fence_barriers();
    }
    __syncthreads();
    constexpr int steps = ceil_div(columns, tile_columns), in_bytes = columns_in_memory * 2;
    if (threadIdx.x >= multipliers) {
        TileMap a = map_tiles(matrix_a, rows_of_a, columns, in_bytes, product_rows);
        TileMap b = map_tiles(matrix_b, rows_of_b + has(Flaw::tile_edge), columns, in_bytes, product_columns);
        b.swizzled = !has(Flaw::swizzle);
        for (int step = 0; step < steps && threadIdx.x == multipliers; ++step) {
            empty(step).wait((step / stages & 1) ^ 1);
            full(step).arrive_expecting(sizeof(Tiles) - (has(Flaw::bytes) ? 128 : 0));
            load_tile(tiles(step).a, a, step * tile_columns, 0, full(step));
            load_tile(tiles(step).b, b, step * tile_columns, 0, full(step));
        }
        return;
    }
    const auto release = [=](int step) {
        if (threadIdx.x % 32 == 0) empty(step).arrive();
    };
    float sums[products_of_thread];
    for (int step = 0; step < steps; ++step) {
        full(step).wait((step / stages & 1) ^ has(Flaw::phase));
        if (!has(Flaw::sums_fence)) begin_products();
        const uint64_t a = descriptor(tiles(step).a), b = descriptor(tiles(step).b);
        for (int d = 0; d < tile_columns / product_depth; ++d)
            multiply<BFloat16>(sums, a + d * next_columns, b + d * next_columns, step > 0 || d > 0);
        commit_products();
        if (has(Flaw::tile_early)) release(step);
        if (step == 0) continue;
        wait_for_products<1>();
        if (!has(Flaw::tile_early)) release(step - 1);
    }
    if (!has(Flaw::sums_early)) wait_for_products<0>();
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
    for (int i = 0; i < products_of_thread; ++i) {
        const int r = row + i % 4 / 2 * 8, c = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (r < rows_of_a && c < rows_of_b) out[r * rows_of_b + c] = int(sums[i]);
    }
}

static std::vector<int> multiplied() {
    const auto number = [](int i) { return float(i * 7 % 5 - 2); };
    for (int i = 0; i < rows_of_a * columns_in_memory; ++i) matrix_a[i] = BFloat16::word(number(i + i / 31));
    for (int i = 0; i < rows_of_b * columns_in_memory; ++i) matrix_b[i] = BFloat16::word(number(i + i / 57));
    std::vector<int> values(rows_of_a * rows_of_b);
    for (int r = 0; r < rows_of_a; ++r)
        for (int c = 0; c < rows_of_b; ++c)
            for (int d = 0; d < columns; ++d)
                values[r * rows_of_b + c] += int(
                    BFloat16::value(matrix_a[r * columns_in_memory + d]) *
                    BFloat16::value(matrix_b[c * columns_in_memory + d]));
    return values;
}

struct Case {
    const char* name;
    void (*kernel)(int*, bool);
    int64_t blocks;
    std::vector<int> expected;
    int threads = ::threads;
};

static std::vector<int> same(int value, int count) { return std::vector<int>(count, value); }

static std::vector<int> swapped() {
    std::vector<int> values;
    for (int i = 0; i < threads; ++i) values.push_back(i ^ 16);
    return values;
}

static std::vector<int> turned(int width) {
    std::vector<int> values;
    for (int i = 0; i < threads; ++i) values.push_back(i / width * width + (i + 1) % width);
    return values;
}

static std::vector<int> summed() {
    std::vector<int> values(threads);
    for (int i = 0; i < rows * threads; ++i) values[(i + threads - 1) % threads] += numbers[i] = i * i;
    return values;
}

static std::vector<int> compacted() {
    std::vector<int> values = same(3, threads);
    for (int i = threads / 2; i < threads; ++i) values[i] = i % 2;
    return values;
}

// What went wrong, or nothing.
static std::string failure(const Case& chosen, bool fault) {
    SharedMemory memory;
    memory.take<int>(threads), memory.take<int>(1), memory.take<int>(1);
    memory.take<int4>(stages * threads / 4), memory.take<uint64_t>(2 * stages);
    const size_t bytes = chosen.threads == threads ? memory.bytes() : TileShared(SharedMemory()).bytes;
    std::vector<int> out(chosen.expected.size());
    try {
        launch(chosen.kernel, chosen.blocks, chosen.threads, bytes, 0, out.data(), fault);
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return out == chosen.expected ? "" : "wrong result";
}

int main(int count, char** arguments) {
    std::vector<Case> cases{
        {"barrier", turn_kernel, 1, turned(threads)},
        {"warp barrier", turn_in_warp_kernel, 1, turned(32)},
        {"clear", sum_kernel, 1, {threads * (threads - 1) / 2}},
        {"static", static_sum_kernel, 1, {threads * (threads - 1) / 2}},
        {"shared end", fill_shared_kernel, 1, same(3, threads - 1)},
        {"tensor end", fill_kernel, 1, same(3, threads - 1)},
        {"overflow", gather_kernel, 1, {threads / 2 * (threads / 2 - 1)}},
        {"compact", compact_kernel, 1, compacted()},
        {"half barrier", half_barrier_kernel, 1, same(1, threads)},
        {"two barriers", two_barriers_kernel, 1, same(1, threads)},
        {"half vote", half_vote_kernel, 1, same(16, threads)},
        {"other mask", other_mask_kernel, 1, same(16, threads)},
        {"blocks", add_kernel, 2, {2}},
        {"aligned", vector_kernel, 1, {1, 0, 0, 0, 0, 0, 0, 0}},
        {"aligned store", vector_store_kernel, 1, {0, 0, 0, 0, 1, 2, 3, 4}},
        {"swap", swap_kernel, 1, swapped()},
        {"fence", staged_kernel<Flaw::fence>, 1, summed()},
        {"phase", staged_kernel<Flaw::phase>, 1, summed()},
        {"empty", staged_kernel<Flaw::empty>, 1, summed()},
        {"bytes", staged_kernel<Flaw::bytes>, 1, summed()},
    };
    const std::vector<int> product = multiplied();
    const auto add = [&](const char* name, void (*kernel)(int*, bool)) {
        cases.push_back({name, kernel, 1, product, multipliers + 32});
    };
    add("tile fence", multiply_kernel<Flaw::fence>);
    add("tile phase", multiply_kernel<Flaw::phase>);
    add("tile bytes", multiply_kernel<Flaw::bytes>);
    add("tile edge", multiply_kernel<Flaw::tile_edge>);
    add("swizzle", multiply_kernel<Flaw::swizzle>);
    add("sums fence", multiply_kernel<Flaw::sums_fence>);
    add("sums early", multiply_kernel<Flaw::sums_early>);
    add("tile early", multiply_kernel<Flaw::tile_early>);
    int failures = 0, run = 0;
    for (const Case& chosen : cases) {
        if (count > 1 && std::string(arguments[1]) != chosen.name) continue;
        const std::string what = failure(chosen, count > 1);
        if (!what.empty()) std::fprintf(stderr, "%s: %s\n", chosen.name, what.c_str());
        failures += !what.empty();
        ++run;
    }
    return run == 0 ? 2 : failures != 0;
}

// The scores of global_topk by tiles, filtered where they are summed: none but those of candidates meet memory.
// kernels/global_topk.py says what intervals are and why they hold the scores.
//
// Of every 4^i-th latent the scores are filtered already (global_topk.cuh). Each step then takes in those of a quarter of
// that distance, three times as many as before, so that about three k of them pass the k-th largest lower end of those
// before: there is room for more. A threshold is an end and a latent, below which no latent is among the k largest,
// wherever it lies. Sorted latents and equal scores are thus met like others. Where there is no room the sample is given
// up, whatever the order of the threads.
//
// A block stays on its multiprocessor and does tile after tile of 128 samples by 256 latents. One thread brings the
// operands, 64 columns a stage, into a ring of stages; eight warps multiply, each four of them 64 samples, and test what
// came out. A test of few instructions never fails a latent whose interval passes; for those that it does not fail, the
// interval decides. Candidates gather in a queue of their warp, and are appended 32 at a time.
#pragma once
#include "candidates.cuh"
#include "tiles.cuh"

// What the latents of a sample are tested by.
struct RowTest {
    SampleBounds sample{};
    float wide = 0, reach = 0;
    Candidate below = ~Candidate(0);  // what an upper end must be above; the largest number: the sample is done with

    RowTest() = default;

    // a + b + E, rounded at each of its steps, is at most 1 + 2^-21 of p ||w|| + q ||w - W|| above a + b + 2^-20 |b|, and
    // 2^-20 |a| and the slack: |a| <= q (||w|| + ||w - W||). So a + raised(b) + wide ||w|| < reach, with its two
    // roundings, means that a + b + E is under the threshold. No comparison fails NaN.
    __device__ RowTest(const SampleBounds& sample_, Candidate below_) : sample(sample_), below(below_) {
        wide = sample.p + 0x1p-20f * (sample.p + sample.q);
        const float threshold = float_of(key_in(below));
        const float more = 0x1p-22f * fabsf(threshold) + 2 * (sample.slack + sample.q * sample.flushed);
        reach = fabsf(threshold) < infinity() ? threshold - more : threshold;
    }
    __device__ bool is_done() const { return below == ~Candidate(0); }
};

// A latent's bias as the test takes it.
__device__ inline float raised(float b) {
    const float size = fabsf(b);
    return size < largest_norm ? b + 0x1p-20f * size : size < infinity() ? infinity() : b;
}

// Candidates of one sample after a step: those that cannot be among the k largest are dropped, and the next step's
// latents will be tested by the k-th largest lower end. Latents were counted `apart`. A warp a sample.
__global__ void __launch_bounds__(32) tighten_kernel(
    Candidates all, RowTest* tests, SampleNorms samples, Bounds bounds, int k, int apart) {
    SharedMemory memory(shared_memory());
    const SelectionShared shared(memory);
    const int64_t n = blockIdx.x;
    const RowCandidates candidates(all, n);
    int count = all.counts[n];
    if (count > candidates.capacity) count = -1;
    if (apart > 1)
        for (int i = threadIdx.x; i < count; i += blockDim.x) candidates.latents[i] *= apart;
    __syncthreads();
    Candidate below = count < 0 ? ~Candidate(0) : 0;
    if (count >= k) {
        const auto lower = [&](int i) { return candidates.lower(i); };
        below = kth_largest<false, 8>(lower, count, k, shared) - 1;
        count = drop(candidates, count, below, shared);
    }
    if (threadIdx.x != 0) return;
    all.counts[n] = count;
    tests[n] = RowTest(SampleBounds(samples, n, bounds), below);
}

constexpr int tile_samples = 2 * product_rows, tile_latents = product_columns;
constexpr int stages = 4, multiplying_warps = 8, screen_threads = 32 * multiplying_warps + 128;
constexpr int part_scores = 16, parts = products_of_thread / part_scores;  // of a thread, tested together
constexpr int queue_length = 64, appended = 32;

// The latents `apart` (4 i + r + 1), for r = 0, 1, 2: those of a step, as three matrices.
struct ScreenArguments {
    TileMap samples, latents[3];
    int widths[3];  // latents
    int N, D, apart;
    const RowTest* tests;
    const float *bias, *norm;
    Candidates candidates;

    // Samples beyond the last are done with.
    __device__ RowTest test(int n) const { return n < N ? tests[n] : RowTest{}; }
    __host__ __device__ int tiles_of(int r) const { return ceil_div(widths[r], tile_latents); }
    __host__ __device__ int row_tiles() const { return ceil_div(N, tile_samples); }
    __host__ __device__ int tiles() const { return (tiles_of(0) + tiles_of(1) + tiles_of(2)) * row_tiles(); }
};

// Where a tile lies. Tiles that run together share latents, and few latents at a time meet all samples.
struct ScreenTile {
    int residue = 0, first_sample, first_latent;

    __device__ ScreenTile(const ScreenArguments& a, int tile) {
        const int rows = a.row_tiles();
        int of_latents = tile / rows;
        first_sample = (tile - of_latents * rows) * tile_samples;
        for (; of_latents >= a.tiles_of(residue); ++residue) of_latents -= a.tiles_of(residue);
        first_latent = of_latents * tile_latents;
    }
    __device__ int latent(const ScreenArguments& a, int column) const {
        return a.apart * (4 * (first_latent + column) + residue + 1);
    }
    __device__ bool has(const ScreenArguments& a, int column) const {
        return first_latent + column < a.widths[residue];
    }
};

struct alignas(tile_alignment) Stage {
    uint16_t samples[tile_samples * tile_columns], latents[tile_latents * tile_columns];
};

struct Columns {
    float tested[2 * tile_latents];  // norm and raised bias in turn
    float bias[tile_latents];
};

struct QueuedCandidate {
    int sample, latent, low, high;
};

struct ScreenShared {
    Stage* stage;
    float4* scores;          // [multiplying_warps, part_scores / 4, 32]
    QueuedCandidate* queue;  // [multiplying_warps, queue_length]
    Columns* columns;        // of this tile and the next
    uint64_t* barriers;
    size_t bytes;

    __host__ __device__ explicit ScreenShared(SharedMemory memory) {
        stage = memory.take<Stage>(stages);
        scores = memory.take<float4>(multiplying_warps * part_scores / 4 * 32);
        queue = memory.take<QueuedCandidate>(multiplying_warps * queue_length);
        columns = memory.take<Columns>(2);
        barriers = memory.take<uint64_t>(2 * stages + 2);
        bytes = memory.bytes();
    }
    // A step's stage is full, or empty again; a tile's columns are there.
    __device__ TransactionBarrier full(unsigned step) const { return {barriers + step % stages}; }
    __device__ TransactionBarrier empty(unsigned step) const { return {barriers + stages + step % stages}; }
    __device__ TransactionBarrier described(unsigned turn) const { return {barriers + 2 * stages + turn % 2}; }

    __device__ void begin() const {
        for (int s = 0; s < stages; ++s) full(s).begin(1), empty(s).begin(multiplying_warps);
        for (int turn = 0; turn < 2; ++turn) described(turn).begin(multiplying_warps);
        fence_barriers();
    }
};

// By one thread: the operands of all tiles of the block.
__device__ inline void bring_tiles(const ScreenArguments& a, const ScreenShared& shared) {
    unsigned step = 0;
    for (int tile = blockIdx.x; tile < a.tiles(); tile += gridDim.x) {
        const ScreenTile at(a, tile);
        for (int d = 0; d < a.D; d += tile_columns, ++step) {
            Stage& stage = shared.stage[step % stages];
            const TransactionBarrier full = shared.full(step);
            shared.empty(step).wait((step / stages & 1) ^ 1);
            full.arrive_expecting(sizeof(Stage));
            load_tile(stage.samples, a.samples, d, at.first_sample, full);
            load_tile(stage.latents, a.latents[at.residue], d, at.first_latent, full);
        }
    }
}

// The candidates that a warp has found.
class Queue {
   public:
    __device__ Queue(QueuedCandidate* entries_, const Candidates& all_) : entries(entries_), all(all_) {}

    // A candidate of each lane that has one.
    __device__ void push(bool has_one, const QueuedCandidate& mine) {
        const unsigned lanes = __ballot_sync(all_lanes, has_one);
        if (has_one) entries[length + __popc(lanes & ((1u << threadIdx.x % 32) - 1))] = mine;
        length += __popc(lanes);
        if (length >= appended) append(appended);
    }
    __device__ void finish() { append(length); }

   private:
    // The last `count`; those without room are counted.
    __device__ void append(int count) {
        __syncwarp();
        length -= count;
        if (int(threadIdx.x % 32) < count) {
            const QueuedCandidate one = entries[length + threadIdx.x % 32];
            const int slot = atomicAdd(all.counts + one.sample, 1);
            if (slot < all.capacity) {
                const RowCandidates row(all, one.sample);
                row.lows[slot] = one.low, row.highs[slot] = one.high, row.latents[slot] = one.latent;
            }
        }
        __syncwarp();
    }

    QueuedCandidate* entries;
    const Candidates& all;
    int length = 0;
};

// What a warp knows of its part of a tile.
struct TileTests {
    const ScreenArguments& a;
    const ScreenTile& at;
    const Columns& columns;
    const RowTest (&tests)[2];  // of the two rows whose sums a thread has
    float4* scores;             // of this thread, 32 apart

    __device__ int row(int lower) const {
        return at.first_sample + int(threadIdx.x) / 32 * 16 + int(threadIdx.x) % 32 / 4 + 8 * lower;
    }

    // Of 16 scores, a bit for each that the quick test does not fail.
    __device__ unsigned reaching(const float* sums, int part) const {
        unsigned bits = 0;
#pragma unroll
        for (int g = 0; g < part_scores / 4; ++g) {
            const float4 two =
                reinterpret_cast<const float4*>(columns.tested)[(part * part_scores / 4 + g) * 4 + threadIdx.x % 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const RowTest& test = tests[i / 2];
                const float norm = i % 2 ? two.z : two.x, bias = i % 2 ? two.w : two.y;
                const float end =
                    __fmaf_rn(sums[4 * g + i], test.sample.inverse, __fmaf_rn(test.wide, norm, bias));
                set_unless_under(bits, 1u << (4 * g + i), end, test.reach);
            }
        }
        return bits & ~((tests[0].is_done() ? 0x3333u : 0) | (tests[1].is_done() ? 0xccccu : 0));
    }

    // Finds out by their intervals.
    __device__ void take_in(const float* sums, int part, unsigned bits, Queue& queue) const {
#pragma unroll
        for (int g = 0; g < part_scores / 4; ++g)
            scores[g * 32] = {sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]};
        for (; __any_sync(all_lanes, bits); bits &= bits - 1) {
            QueuedCandidate found{};
            bool passes = false;
            if (bits) {
                const int bit = __ffs(bits) - 1, lower = bit / 2 % 2;
                const int column = (part * part_scores / 4 + bit / 4) * 8 + threadIdx.x % 4 * 2 + bit % 2;
                const RowTest test = lower ? tests[1] : tests[0];
                const Interval ends = of(test, column, bit);
                const uint32_t high = key_of(ends.upper);
                found = {row(lower), at.latent(a, column), stored(key_of(ends.lower)), stored(high)};
                passes = at.has(a, column) && candidate(high, found.latent) > test.below;
            }
            queue.push(passes, found);
        }
    }

   private:
    __device__ Interval of(const RowTest& test, int column, int bit) const {
        const float product = reinterpret_cast<const float*>(scores + bit / 4 * 32)[bit % 4];
        const SampleBounds& sample = test.sample;
        return sample.of(product, columns.bias[column], columns.tested[2 * column], sample.flushed, 1);
    }
};

// By eight warps: all tiles of the block.
template <class Format>
__device__ void take_in_tiles(const ScreenArguments& a, const ScreenShared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Queue queue(shared.queue + warp * queue_length, a.candidates);
    float sums[products_of_thread];
    unsigned step = 0, turn = 0;
    const auto release = [&](unsigned done) {
        if (lane == 0) shared.empty(done).arrive();
    };
    for (int tile = blockIdx.x; tile < a.tiles(); tile += gridDim.x, ++turn) {
        const ScreenTile at(a, tile);
        Columns& columns = shared.columns[turn % 2];
        const int mine = threadIdx.x;  // a column
        const bool there = at.has(a, mine);
        const float norm = there ? __ldg(a.norm + at.latent(a, mine)) : 0;
        const float bias = there ? __ldg(a.bias + at.latent(a, mine)) : -infinity();
        for (int d = 0; d < a.D; d += tile_columns, ++step) {
            const Stage& stage = shared.stage[step % stages];
            shared.full(step).wait(step / stages & 1);
            begin_products();
            const uint64_t of_samples = descriptor(stage.samples + warp / 4 * product_rows * tile_columns);
            const uint64_t of_latents = descriptor(stage.latents);
#pragma unroll
            for (int i = 0; i < tile_columns / product_depth; ++i)
                multiply<Format>(sums, of_samples + i * next_columns, of_latents + i * next_columns, d > 0 || i > 0);
            commit_products();
            if (d > 0) {
                wait_for_products<1>();
                release(step - 1);
            } else {  // of the tile before the last, all have read what is overwritten now
                columns.tested[2 * mine] = norm, columns.tested[2 * mine + 1] = raised(bias);
                columns.bias[mine] = bias;
                __syncwarp();
                if (lane == 0) shared.described(turn).arrive();
            }
        }
        wait_for_products<0>();
        hand_over(sums);
        release(step - 1);
        const int first_row = at.first_sample + warp * 16 + lane / 4;
        const RowTest tests[] = {a.test(first_row), a.test(first_row + 8)};
        shared.described(turn).wait(turn / 2 & 1);
        const TileTests tile_tests{a, at, columns, tests, shared.scores + warp * part_scores / 4 * 32 + lane};
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            const float* const of_part = sums + part * part_scores;
            const unsigned bits = tile_tests.reaching(of_part, part);
            if (__any_sync(all_lanes, bits)) tile_tests.take_in(of_part, part, bits, queue);
        }
    }
    queue.finish();
}

template <class Format>
__global__ void __launch_bounds__(screen_threads, 1) screen_scores_kernel(const __grid_constant__ ScreenArguments a) {
    const ScreenShared shared{SharedMemory(shared_memory())};
    if (threadIdx.x == 0) shared.begin();
    __syncthreads();
    if (threadIdx.x < 32 * multiplying_warps) {
        take_registers<240>();
        take_in_tiles<Format>(a, shared);
    } else {
        give_registers<24>();
        if (threadIdx.x == 32 * multiplying_warps) bring_tiles(a, shared);
    }
}

// The scores of global_topk by tiles, filtered where they are summed: none but those of candidates meet memory.
// kernels/global_topk.py says what intervals are and why they hold the scores.
//
// Of every 2^i-th latent the scores are filtered already (global_topk.cuh). Each step then takes in those halfway
// between, as many as before, so that about k of them pass the k-th largest lower end of those before: there is room for
// more. A threshold is an end and a latent, below which no latent is among the k largest, wherever it lies. Sorted
// latents and equal scores are thus met like others. Where there is no room the sample is given up, whatever the order
// of the threads.
//
// A block stays on its multiprocessor and does tile after tile of 128 samples by 256 latents. One thread brings the
// operands, 64 columns a stage, into a ring of stages; eight warps multiply, each four of them 64 samples, and test what
// came out, while the other four still multiply. A test of three instructions never fails a latent whose interval
// passes; for those that it does not fail, the interval decides, of 32 at a time, which gather in a queue of their warp.
#pragma once
#include "candidates.cuh"
#include "tiles.cuh"

// What the latents of a sample are tested by.
struct RowTest {
    SampleBounds sample;
    float wide, reach;
    Candidate below;  // what an upper end must be above; the largest number: the sample is done with

    // a + b + E, rounded at each of its steps, is at most 2^-20 of p ||w|| + |a| + |b|, and twice the slack and
    // q ||w - W||, above a + b + p ||w||; and |a| <= q (||w|| + ||w - W||). So a + raised(b) < reach - wide M with any
    // M >= ||w||, each side rounded, means that a + b + E is under the threshold. No comparison fails NaN.
    __device__ RowTest(const SampleBounds& sample_, Candidate below_) : sample(sample_), below(below_) {
        wide = sample.p + 0x1p-20f * (sample.p + sample.q);
        const float threshold = float_of(key_in(below));
        const float more = 0x1p-22f * fabsf(threshold) + 2 * (sample.slack + sample.q * sample.flushed);
        reach = fabsf(threshold) < infinity() ? threshold - more : threshold;
    }
};

// What a thread keeps of it while it tests.
struct QuickTest {
    float inverse = 0, wide = 0, reach = 0;
    unsigned open = 0;  // bits of the sample's scores in a part, or none

    __device__ QuickTest(const RowTest* tests, int n, int N) {
        if (n >= N) return;
        inverse = tests[n].sample.inverse, wide = tests[n].wide, reach = tests[n].reach;
        open = tests[n].below == ~Candidate(0) ? 0 : 0x3333;
    }
};

// A latent's bias as the test takes it.
__device__ inline float raised(float b) {
    const float size = fabsf(b);
    return size < largest_norm ? b + 0x1p-20f * size : size < infinity() ? infinity() : b;
}

// Candidates of one sample after a step: those that cannot be among the k largest are dropped, and the next step's
// latents will be tested by the k-th largest lower end, or one that few more reach. Latents were counted `apart`. A warp
// a sample.
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
        below = kth_largest<false, 8, 16>(lower, count, k, shared, k / 8) - 1;
        count = drop(candidates, count, below, shared);
    }
    if (threadIdx.x != 0) return;
    all.counts[n] = count;
    tests[n] = RowTest(SampleBounds(samples, n, bounds), below);
}

constexpr int tile_samples = 2 * product_rows;
static_assert(tile_latents == product_columns);
constexpr int stages = 4, multiplying_warps = 8, screen_threads = 32 * multiplying_warps + 128;
constexpr int part_scores = 16, parts = products_of_thread / part_scores;  // of a thread, tested together
static_assert(parts == multiplying_warps && tile_latents == 32 * parts);  // a warp describes the columns of a part
constexpr int queue_length = 64, taken_in = 32;

// The latents of a step are `apart` (2 i + 1).
struct ScreenArguments {
    TileMap samples, latents;
    int N, L, D, apart, many;  // latents of the step
    const RowTest* tests;
    const float *bias, *norm;
    Candidates candidates;

    __host__ __device__ int row_tiles() const { return ceil_div(N, tile_samples); }
    __host__ __device__ int tiles() const { return ceil_div(many, tile_latents) * row_tiles(); }
};

// Where a tile lies. Tiles that run together share latents, and few latents at a time meet all samples.
struct ScreenTile {
    int first_sample, first_latent;

    __device__ ScreenTile(const ScreenArguments& a, int tile) {
        const int rows = a.row_tiles(), of_latents = tile / rows;
        first_sample = (tile - of_latents * rows) * tile_samples;
        first_latent = of_latents * tile_latents;
    }
    // Beyond the last, L and more.
    __device__ int latent(const ScreenArguments& a, int column) const {
        return a.apart * (2 * (first_latent + column) + 1);
    }
};

struct alignas(tile_alignment) Stage {
    uint16_t samples[tile_samples * tile_columns], latents[tile_latents * tile_columns];
};

// Raised biases of a tile's latents, those of one thread of each 16 side by side; the largest norm of each part.
struct alignas(16) Columns {
    float biases[tile_latents], norms[parts];

    __device__ static int place(int column) {
        return column / 16 * 16 + column % 8 / 2 * 4 + column / 8 % 2 * 2 + column % 2;
    }
};

struct alignas(16) QueuedLatent {
    float product;
    int sample, latent;
};

struct ScreenShared {
    Stage* stage;
    float4* scores;          // [multiplying_warps, part_scores / 4, 32]
    QueuedLatent* queue;     // [multiplying_warps, queue_length]
    Columns* columns;        // of this tile and the next
    uint64_t* barriers;
    size_t bytes;

    __host__ __device__ explicit ScreenShared(SharedMemory memory) {
        stage = memory.take<Stage>(stages);
        scores = memory.take<float4>(multiplying_warps * part_scores / 4 * 32);
        queue = memory.take<QueuedLatent>(multiplying_warps * queue_length);
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
            load_tile(stage.latents, a.latents, d, at.first_latent, full);
        }
    }
}

// The latents of a warp that the quick test does not fail, until there are enough to keep all lanes busy.
class Queue {
   public:
    __device__ Queue(QueuedLatent* entries_, const ScreenArguments& a_) : entries(entries_), a(a_) {}

    // One of each lane that has one.
    __device__ void push(bool has_one, const QueuedLatent& mine) {
        const unsigned lanes = __ballot_sync(all_lanes, has_one);
        if (has_one) entries[length + __popc(lanes & ((1u << threadIdx.x % 32) - 1))] = mine;
        length += __popc(lanes);
        if (length >= taken_in) take_in(taken_in);
    }
    __device__ void finish() { take_in(length); }

   private:
    // The last `count`: an interval decides which become candidates. Those without room are counted.
    __device__ void take_in(int count) {
        __syncwarp();
        length -= count;
        if (int(threadIdx.x % 32) < count) {
            const QueuedLatent one = entries[length + threadIdx.x % 32];
            if (one.latent < a.L) append(one, a.tests[one.sample]);
        }
        __syncwarp();
    }
    __device__ void append(const QueuedLatent& one, const RowTest& test) const {
        const float norm = __ldg(a.norm + one.latent), bias = __ldg(a.bias + one.latent);
        const Interval ends = test.sample.of(one.product, bias, norm, test.sample.flushed, 1);
        const uint32_t high = key_of(ends.upper);
        if (candidate(high, one.latent) <= test.below) return;
        const int slot = atomicAdd(a.candidates.counts + one.sample, 1);
        if (slot >= a.candidates.capacity) return;
        const RowCandidates row(a.candidates, one.sample);
        row.lows[slot] = stored(key_of(ends.lower)), row.highs[slot] = stored(high), row.latents[slot] = one.latent;
    }

    QueuedLatent* entries;
    const ScreenArguments& a;
    int length = 0;
};

// The part of a tile whose sums a thread has: of the samples `row` and row + 8, the columns `column` and the next of
// each eight.
struct TileTests {
    const ScreenArguments& a;
    const ScreenTile& at;
    const Columns& columns;
    int row, column;
    const QuickTest (&tests)[2];
    float4* scores;  // of this thread, 32 apart

    // Of 16 scores, a bit for each that the quick test does not fail.
    __device__ unsigned reaching(const float* sums, int part) const {
        const float4* const biases = reinterpret_cast<const float4*>(columns.biases) + part * 8 + column / 2;
        const float norm = columns.norms[part];
        const float reach[] = {__fmaf_rn(-tests[0].wide, norm, tests[0].reach),
                               __fmaf_rn(-tests[1].wide, norm, tests[1].reach)};
        unsigned bits = 0;
#pragma unroll
        for (int g = 0; g < part_scores / 4; ++g) {
            const float4 four = biases[g / 2 * 4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float bias = g % 2 ? (i % 2 ? four.w : four.z) : i % 2 ? four.y : four.x;
                const float end = __fmaf_rn(sums[4 * g + i], tests[i / 2].inverse, bias);
                set_unless_under(bits, 1u << (4 * g + i), end, reach[i / 2]);
            }
        }
        return bits & (tests[0].open | tests[1].open << 2);
    }

    __device__ void push(const float* sums, int part, unsigned bits, Queue& queue) const {
#pragma unroll
        for (int g = 0; g < part_scores / 4; ++g)
            scores[g * 32] = {sums[4 * g], sums[4 * g + 1], sums[4 * g + 2], sums[4 * g + 3]};
        for (; __any_sync(all_lanes, bits); bits &= bits - 1) {
            QueuedLatent one{};
            if (bits) {
                const unsigned bit = __ffs(bits) - 1, group = bit / 4;
                one.product = reinterpret_cast<const float*>(scores + group * 32)[bit % 4];
                one.sample = row + int(bit / 2 % 2 * 8);
                one.latent = at.latent(a, column + (part * part_scores / 4 + group) * 8 + bit % 2);
            }
            queue.push(bits, one);
        }
    }
};

// By eight warps: all tiles of the block.
template <class Format>
__device__ void take_in_tiles(const ScreenArguments& a, const ScreenShared& shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Queue queue(shared.queue + warp * queue_length, a);
    float sums[products_of_thread];
    unsigned step = 0, turn = 0;
    const auto release = [&](unsigned done) {
        if (lane == 0) shared.empty(done).arrive();
    };
    for (int tile = blockIdx.x; tile < a.tiles(); tile += gridDim.x, ++turn) {
        const ScreenTile at(a, tile);
        Columns& columns = shared.columns[turn % 2];
        const int latent = at.latent(a, threadIdx.x);  // a column a thread
        const float norm = latent < a.L ? __ldg(a.norm + latent) : 0;
        const float bias = latent < a.L ? __ldg(a.bias + latent) : -infinity();
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
                columns.biases[Columns::place(threadIdx.x)] = raised(bias);
                const unsigned largest = __reduce_max_sync(all_lanes, __float_as_uint(norm));
                if (lane == 0) columns.norms[warp] = __uint_as_float(largest);
                __syncwarp();
                if (lane == 0) shared.described(turn).arrive();
            }
        }
        wait_for_products<0>();
        hand_over(sums);
        release(step - 1);
        const int row = at.first_sample + warp * 16 + lane / 4;
        const QuickTest tests[] = {{a.tests, row, a.N}, {a.tests, row + 8, a.N}};
        shared.described(turn).wait(turn / 2 & 1);
        const TileTests tile_tests{a, at, columns, row, lane % 4 * 2, tests,
                                   shared.scores + warp * part_scores / 4 * 32 + lane};
#pragma unroll
        for (int part = 0; part < parts; ++part) {
            const float* const of_part = sums + part * part_scores;
            const unsigned bits = tile_tests.reaching(of_part, part);
            if (__any_sync(all_lanes, bits)) tile_tests.push(of_part, part, bits, queue);
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

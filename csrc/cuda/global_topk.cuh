// The filter and the final choice of global_topk, in the place of Triton's: kernels/global_topk.py says what intervals
// are, why they hold the scores, and what is done between the kernels.
//
// Filter: a block takes in the chunk's scores of one sample. A latent is a candidate if its upper end is above what k
// lower ends reach. Before there are candidates, the k-th largest lower end in a sample of the first chunk is such a
// threshold, however the latents are ordered: k of them do reach it, so it is never too high. When the room would
// overflow in a step, the k-th largest lower end among all candidates and the step is found exactly, candidates below
// are dropped, and the step is read again. Where intervals are so wide that even so there is no room, the sample is
// given up, whatever the order of the threads. Ends are compared together with the latent, so that of equals the lower
// wins, as in the support; then candidates may be in any order.
//
// Choice: a block a sample. Candidates that may be on either side of the k-th place get a sum in float32, those still
// undecided the score of the specification. Both are summed by a warp: a lane adds up 8 columns of each 256, which are
// added by halving, neighbours first.
#pragma once
#include "candidates.cuh"
#include "row_part.cuh"

struct Four {
    float of[4];

    // numbers[i ... i + 3], those before `end`; 16 bytes at once where that is `aligned`
    __device__ Four(const float* __restrict__ numbers, int i, int end, bool aligned, bool once) {
        if (aligned && i + 4 <= end) {
            const auto at = reinterpret_cast<const float4*>(numbers + i);
            const float4 all = once ? __ldcs(at) : __ldg(at);
            of[0] = all.x, of[1] = all.y, of[2] = all.z, of[3] = all.w;
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) of[j] = i + j < end ? __ldg(numbers + i + j) : 0;
        }
    }
};

__device__ inline bool on_16_bytes(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// The scores of a chunk of latents of one sample, as intervals.
struct RowScores : SampleBounds {
    const float* scores;
    LatentNorms latents;
    int first;  // latent
    bool scores_aligned, latents_aligned;

    __device__ RowScores(
        const float* scores_, int first_, const LatentNorms& latents_, const SampleNorms& samples, int64_t n,
        const Bounds& bounds)
        : SampleBounds(samples, n, bounds), scores(scores_), latents(latents_), first(first_) {
        scores_aligned = on_16_bytes(scores);
        latents_aligned = on_16_bytes(latents.bias) && on_16_bytes(latents.norm) && on_16_bytes(latents.residual) &&
                          on_16_bytes(latents.inverse);
    }
    __device__ Interval operator[](int i) const {
        const bool copied = latents.residual;
        return of(
            scores[i], latents.bias[i], latents.norm[i], copied ? latents.residual[i] : flushed,
            copied ? latents.inverse[i] : 1);
    }
    __device__ Candidate lower(int i) const { return candidate(key_of((*this)[i].lower), first + i); }

    // Of the columns i ... i + 3 before `end`, a bit for each whose upper end is not under the threshold.
    __device__ unsigned reaching(int i, int end, float threshold) const {
        const Four a(scores, i, end, scores_aligned, true), b(latents.bias, i, end, latents_aligned, false);
        const Four norm(latents.norm, i, end, latents_aligned, false);
        unsigned bits = 0;
        const auto test = [&](int j, float residual, float scale) {
            const bool under = of(a.of[j], b.of[j], norm.of[j], residual, scale).upper < threshold;
            bits |= unsigned(i + j < end && !under) << j;
        };
        if (latents.residual) {
            const Four residual(latents.residual, i, end, latents_aligned, false);
            const Four scale(latents.inverse, i, end, latents_aligned, false);
#pragma unroll
            for (int j = 0; j < 4; ++j) test(j, residual.of[j], scale.of[j]);
        } else {
#pragma unroll
            for (int j = 0; j < 4; ++j) test(j, flushed, 1);
        }
        return bits;
    }
};

constexpr int fours = 4;  // of a thread in a step

// Appends the columns of a step whose upper ends are above `below`; how many candidates there are now, with those that
// found no room.
__device__ inline int append(
    const RowScores& row, const RowCandidates& candidates, int begin, int end, Candidate below, int count,
    const SelectionShared& shared) {
    __syncthreads();
    if (threadIdx.x == 0) *shared.count = count;
    __syncthreads();
    const float threshold = float_of(key_in(below));
    const int mine = begin + 4 * int(threadIdx.x), apart = 4 * int(blockDim.x);
    unsigned bits = 0;
#pragma unroll
    for (int u = 0; u < fours; ++u) bits |= row.reaching(mine + u * apart, end, threshold) << 4 * u;
    for (; bits; bits &= bits - 1) {
        const int bit = __ffs(bits) - 1, column = mine + bit / 4 * apart + bit % 4, latent = row.first + column;
        const Interval ends = row[column];
        const uint32_t high = key_of(ends.upper);
        if (candidate(high, latent) <= below) continue;
        const int slot = atomicAdd(shared.count, 1);
        if (slot >= candidates.capacity) continue;
        candidates.lows[slot] = stored(key_of(ends.lower));
        candidates.highs[slot] = stored(high);
        candidates.latents[slot] = latent;
    }
    __syncthreads();
    return *shared.count;
}

// A threshold is the number just below those that reach it, so that nothing but a candidate above it is kept.
__global__ void __launch_bounds__(512, 2) filter_scores_kernel(
    FilterPlan plan, Candidates all, const float* scores, int first, int chunk, LatentNorms latents,
    SampleNorms samples, int k, Bounds bounds) {
    SharedMemory memory(shared_memory());
    const SelectionShared shared(memory);
    const int64_t n = blockIdx.x;
    const RowScores row(scores + n * chunk, first, latents, samples, n, bounds);
    const RowCandidates candidates(all, n);
    int count = first ? all.counts[n] : row.start_count();
    // later latents are behind all that reach a threshold, and lose ties
    Candidate below = first ? candidate(key_from(all.thresholds[n]), 0) : 0;
    if (count >= 0 && first == 0 && plan.sample) {
        const int apart = chunk / (plan.sample / 32);
        const auto sampled = [&](int i) { return row.lower(i / 32 * apart + i % 32); };
        below = kth_largest(sampled, plan.sample, k, shared) - 1;
    }
    const int step = 4 * fours * int(blockDim.x);
    for (int begin = 0; count >= 0 && begin < chunk; begin += step) {
        const int end = smaller(step, chunk - begin) + begin;
        int more = append(row, candidates, begin, end, below, count, shared);
        if (more > candidates.capacity) {
            const auto lower = [&](int i) { return i < count ? candidates.lower(i) : row.lower(begin + i - count); };
            // of later latents `below` may ask more than of the candidates
            const Candidate risen = kth_largest(lower, count + end - begin, k, shared) - 1;
            count = drop(candidates, count, risen, shared);
            below = larger(below, risen);
            more = append(row, candidates, begin, end, below, count, shared);
        }
        count = more <= candidates.capacity ? more : -1;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        all.counts[n] = count;
        all.thresholds[n] = stored(key_in(below));
    }
}

__device__ inline float value_of(const Matrix& numbers, int64_t i) {
    switch (numbers.type) {
        case Floats::float32: return static_cast<const float*>(numbers.data)[i];
        case Floats::bfloat16: return BFloat16::value(static_cast<const uint16_t*>(numbers.data)[i]);
        default: return Float16::value(static_cast<const uint16_t*>(numbers.data)[i]);
    }
}

constexpr int staged_columns = 8192;  // of a sample, in shared memory; estimated, not measured: 32 KB

// What a block shares that settles a support.
struct SettleShared : SelectionShared {
    int* chosen;    // [power_of_two(k)]
    float* sample;  // [D], centred, or nothing where D is larger than staged_columns
    size_t bytes;

    __host__ __device__ SettleShared(SharedMemory memory, int k, int D) : SelectionShared(memory) {
        chosen = memory.take<int>(power_of_two(k));
        sample = memory.take<float>(D <= staged_columns ? D : 0);
        bytes = memory.bytes();
    }
};

// A sample minus pre_bias.
struct Centred {
    Matrix x, pre_bias;
    int64_t begin;  // of the sample
    const float* staged;
    int D;

    __device__ float computed(int d) const { return value_of(x, begin + d) - value_of(pre_bias, d); }
    __device__ float operator[](int d) const { return D <= staged_columns ? staged[d] : computed(d); }
};

constexpr int side_by_side = 8;  // columns of a lane

// row[0 ... 7], 0 from `length` on.
template <class Format>
__device__ void load_eight(float (&values)[side_by_side], const typename Format::Word* row, int length) {
    using Part = RowPart<Format>;
    if (length >= side_by_side && on_16_bytes(row)) {
#pragma unroll
        for (int v = 0; v < side_by_side / Part::width; ++v) {
            const uint4 vector = __ldg(reinterpret_cast<const uint4*>(row) + v);
#pragma unroll
            for (int i = 0; i < Part::width; ++i) values[v * Part::width + i] = Part::in(vector, i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < side_by_side; ++i) values[i] = i < length ? Format::value(row[i]) : 0;
    }
}

// The products of a sample and of rows of W, for every lane of a warp; the order of a sum depends on D alone.
template <class Format, class Sum, int many>
__device__ void dots(Sum (&sums)[many], const Centred& sample, const typename Format::Word* const (&rows)[many]) {
    Sum parts[many][side_by_side] = {};
    for (int d = side_by_side * int(threadIdx.x % 32); d < sample.D; d += 32 * side_by_side) {
        float x[side_by_side];
#pragma unroll
        for (int i = 0; i < side_by_side; ++i) x[i] = d + i < sample.D ? sample[d + i] : 0;
#pragma unroll
        for (int r = 0; r < many; ++r) {
            float w[side_by_side];
            load_eight<Format>(w, rows[r] + d, sample.D - d);
#pragma unroll
            for (int i = 0; i < side_by_side; ++i) parts[r][i] += Sum(w[i]) * Sum(x[i]);
        }
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < many; ++r) {
#pragma unroll
        for (int half = 1; half < side_by_side; half *= 2)
#pragma unroll
            for (int i = 0; i < side_by_side; i += 2 * half) parts[r][i] += parts[r][i + half];
        sums[r] = parts[r][0];
        for (int by = 1; by < 32; by *= 2) sums[r] += __shfl_xor_sync(all_lanes, sums[r], by);
    }
}

// Calls place(i, latent, product) in one lane for each of the `marked` candidates at places[0 ... marked - 1].
template <class Format, class Sum, int many, class Place>
__device__ void multiply_marked(
    const RowCandidates& candidates, int marked, const Centred& sample, const Operands& operands, Place place) {
    using Word = typename Format::Word;
    const int lane = threadIdx.x % 32;
    for (int begin = int(threadIdx.x / 32) * many; begin < marked; begin += int(blockDim.x / 32) * many) {
        const Word* rows[many];
#pragma unroll
        for (int r = 0; r < many; ++r) {
            const int64_t latent = candidates.latents[candidates.places[smaller(begin + r, marked - 1)]];
            rows[r] = static_cast<const Word*>(operands.W.data) + latent * operands.W.stride;
        }
        Sum sums[many];
        dots<Format>(sums, sample, rows);
#pragma unroll
        for (int r = 0; r < many; ++r) {
            if (lane != r || begin + r >= marked) continue;
            const int i = candidates.places[begin + r];
            place(i, candidates.latents[i], sums[r]);
        }
    }
    __syncthreads();
}

// Lists the intervals that are not points with lower end <= `above` and upper end >= `below`; how many.
__device__ inline int mark(
    const RowCandidates& candidates, int count, uint32_t above, uint32_t below, const SelectionShared& shared) {
    __syncthreads();
    if (threadIdx.x == 0) *shared.kept = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const uint32_t low = key_from(candidates.lows[i]), high = key_from(candidates.highs[i]);
        if (low < high && low <= above && high >= below) candidates.places[atomicAdd(shared.kept, 1)] = i;
    }
    __syncthreads();
    return *shared.kept;
}

// The support of one sample from its candidates, or its number among those given up.
template <class Format>
__global__ void __launch_bounds__(128, 4) settle_supports_kernel(
    Candidates all, Operands operands, int64_t first_row, const float* x_norm, const float* w_norm, int k,
    float rounding, float slack, int32_t* indices, int32_t* given_up, int32_t* total) {
    const SettleShared shared(SharedMemory(shared_memory()), k, operands.D);
    const int64_t n = blockIdx.x, row = first_row + n;
    const int count = all.counts[n];
    indices += row * k;
    if (count == -1) {
        if (threadIdx.x == 0) given_up[atomicAdd(total, 1)] = int32_t(row);
        return;
    }
    if (count == -2) {  // every score is NaN
        for (int i = threadIdx.x; i < k; i += blockDim.x) indices[i] = i;
        return;
    }
    const RowCandidates candidates(all, n);
    const auto lower = [&](int i) { return key_from(candidates.lows[i]); };
    const auto upper = [&](int i) { return key_from(candidates.highs[i]); };
    // what is above `rival` is in the support, what is under `least` is not
    uint32_t rival = ~0u, least = 0;
    if (count > k) {
        const Centred sample{operands.x, operands.pre_bias, row * operands.x.stride, shared.sample, operands.D};
        if (operands.D <= staged_columns)
            for (int d = threadIdx.x; d < operands.D; d += blockDim.x) shared.sample[d] = sample.computed(d);
        // the k-th score is between these: intervals around it become narrow by a sum in float32
        least = kth_largest(lower, count, k, shared), rival = kth_largest<true>(upper, count, k, shared);
        const uint32_t kth = least + (rival - least) / 2;
        int marked = mark(candidates, count, kth, kth, shared);
        const float size_of_x = x_norm[n];
        multiply_marked<Format, float, 4>(candidates, marked, sample, operands, [&](int i, int latent, float a) {
            const float norm = w_norm[latent], bound = rounding * size_of_x * norm;
            const Interval ends =
                interval(a, float(operands.bias[latent]), bound, slack, norm == 0 || size_of_x == 0);
            candidates.lows[i] = larger(candidates.lows[i], stored(key_of(ends.lower)));
            candidates.highs[i] = smaller(candidates.highs[i], stored(key_of(ends.upper)));
        });
        // few are left on both sides of these: they get the score of the specification
        least = kth_largest(lower, count, k, shared), rival = kth_largest<true>(upper, count, k + 1, shared);
        marked = mark(candidates, count, rival, least, shared);
        multiply_marked<Format, double, 2>(candidates, marked, sample, operands, [&](int i, int latent, double sum) {
            candidates.lows[i] = candidates.highs[i] = stored(key_of(float(sum + operands.bias[latent])));
        });
    }
    const auto final = [&](int i) {
        const uint32_t low = lower(i);
        return candidate(low > rival ? ~0u : upper(i) < least ? 0 : low, candidates.latents[i]);
    };
    const Candidate last = count > k ? kth_largest(final, count, k, shared) : 0;
    const int size = power_of_two(k);
    if (threadIdx.x == 0) *shared.kept = 0;
    for (int i = threadIdx.x; i < size; i += blockDim.x) shared.chosen[i] = INT32_MAX;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        if (final(i) >= last) shared.chosen[atomicAdd(shared.kept, 1)] = candidates.latents[i];
    }
    sort_in_block(shared.chosen, size);
    for (int i = threadIdx.x; i < k; i += blockDim.x) indices[i] = shared.chosen[i];
}

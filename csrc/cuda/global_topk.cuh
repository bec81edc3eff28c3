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
// Choice: a block a sample. Candidates that may be on either side of the k-th place get a sum in float32, stream by
// stream as their values are summed (gather.cuh), those still undecided the score of the specification. Of the support
// only rows that were not summed so are read again for its values.
#pragma once
#include "candidates.cuh"
#include "gather.cuh"

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

constexpr int most_known = 32;  // rows of W, summed for the choice, whose products are kept for the values

// What a block shares that settles a support.
struct SettleShared : SelectionShared {
    int* chosen;    // [power_of_two(k)]
    int* missing;   // [k], places of the support whose products are not known; the histogram's
    int* latents;   // [most_known]
    float* products;  // [most_known, S], of these latents
    float4* sample;
    size_t bytes;

    __host__ __device__ SettleShared(SharedMemory memory, int k, int D, int S) : SelectionShared(memory) {
        chosen = memory.take<int>(power_of_two(k));
        missing = histogram;
        latents = memory.take<int>(most_known);
        products = memory.take<float>(most_known * S);
        sample = memory.take<float4>(staged_fours(D));
        bytes = memory.bytes();
    }
};
static_assert(most_k <= digits);

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

// The support of one sample from its candidates, and its values if there is room for them; or its number among those
// given up.
template <class Format>
__global__ void __launch_bounds__(128, 4) settle_supports_kernel(
    Candidates all, Operands operands, int64_t first_row, const float* x_norm, const float* w_norm, int k,
    float rounding, float slack, Streams streams, Activations to, int32_t* indices, int32_t* given_up,
    int32_t* total) {
    const SettleShared shared(SharedMemory(shared_memory()), k, operands.D, streams.count);
    const int64_t n = blockIdx.x, row = first_row + n;
    const int count = all.counts[n];
    if (count == -1) {
        if (threadIdx.x == 0) given_up[atomicAdd(total, 1)] = int32_t(row);
        return;
    }
    const Centred sample(operands.x, operands.pre_bias, row, operands.D, shared.sample);
    const int size = power_of_two(k);
    for (int i = threadIdx.x; i < size; i += blockDim.x) shared.chosen[i] = count == -2 ? i : INT32_MAX;
    int known = 0;
    if (count != -2) {  // else every score is NaN
        const RowCandidates candidates(all, n);
        const auto lower = [&](int i) { return key_from(candidates.lows[i]); };
        const auto upper = [&](int i) { return key_from(candidates.highs[i]); };
        const auto marked_latent = [&](int i) { return candidates.latents[candidates.places[i]]; };
        // what is above `rival` is in the support, what is under `least` is not
        uint32_t rival = ~0u, least = 0;
        if (count > k) {
            // the k-th score is between these: intervals around it become narrow by a sum in float32
            least = kth_largest(lower, count, k, shared), rival = kth_largest<true>(upper, count, k, shared);
            const uint32_t kth = least + (rival - least) / 2;
            int marked = mark(candidates, count, kth, kth, shared);
            known = to.values.data ? smaller(marked, most_known) : 0;
            const float size_of_x = x_norm[n];
            float a = 0;
            const auto narrow = [&](int r, int s, int latent, float product) {
                if (r < known) shared.latents[r] = latent, shared.products[r * streams.count + s] = product;
                a = s ? a + product : product;
                if (s < streams.count - 1) return;
                const int i = candidates.places[r];
                const float norm = w_norm[latent], bound = rounding * size_of_x * norm;
                const Interval ends =
                    interval(a, float(operands.bias[latent]), bound, slack, norm == 0 || size_of_x == 0);
                candidates.lows[i] = larger(candidates.lows[i], stored(key_of(ends.lower)));
                candidates.highs[i] = smaller(candidates.highs[i], stored(key_of(ends.upper)));
            };
            multiply_rows<Format, float>(
                marked, marked_latent, 0, streams.count, begin_in(streams), sample, operands.W, narrow);
            // few are left on both sides of these: they get the score of the specification
            least = kth_largest(lower, count, k, shared), rival = kth_largest<true>(upper, count, k + 1, shared);
            marked = mark(candidates, count, rival, least, shared);
            const auto settle = [&](int r, int, int latent, double sum) {
                const int i = candidates.places[r];
                candidates.lows[i] = candidates.highs[i] = stored(key_of(float(sum + operands.bias[latent])));
            };
            const auto whole = [&](int s) { return s ? operands.D : 0; };
            multiply_rows<Format, double>(marked, marked_latent, 0, 1, whole, sample, operands.W, settle);
        }
        const auto final = [&](int i) {
            const uint32_t low = lower(i);
            return candidate(low > rival ? ~0u : upper(i) < least ? 0 : low, candidates.latents[i]);
        };
        const Candidate last = count > k ? kth_largest(final, count, k, shared) : 0;
        if (threadIdx.x == 0) *shared.kept = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            if (final(i) >= last) shared.chosen[atomicAdd(shared.kept, 1)] = candidates.latents[i];
        }
        sort_in_block(shared.chosen, size);
    }
    for (int i = threadIdx.x; i < k; i += blockDim.x) indices[row * k + i] = shared.chosen[i];
    if (!to.values.data) return;
    if (threadIdx.x == 0) *shared.kept = 0;
    __syncthreads();
    const int64_t place = row * streams.count * k;
    for (int j = threadIdx.x; j < k; j += blockDim.x) {
        int r = 0;
        while (r < known && shared.latents[r] != shared.chosen[j]) ++r;
        if (r == known)
            shared.missing[atomicAdd(shared.kept, 1)] = j;
        else
            for (int s = 0; s < streams.count; ++s)
                activate(to, place + s * k + j, s, shared.chosen[j], shared.products[r * streams.count + s]);
    }
    __syncthreads();
    const auto missing_latent = [&](int i) { return shared.chosen[shared.missing[i]]; };
    const auto write = [&](int i, int s, int latent, float product) {
        activate(to, place + s * k + shared.missing[i], s, latent, product);
    };
    multiply_rows<Format, float>(
        *shared.kept, missing_latent, 0, streams.count, begin_in(streams), sample, operands.W, write);
}

#include "global_topk.cuh"

#include <stdexcept>

FilterPlan FilterPlan::of(int64_t chunk, int k, int capacity) {
    // estimated, not measured: a chunk of 2048 scores in one step of 128 threads. A sample of more than k latents lets
    // fewer pass at first, and is itself read once more; each time the room is used up, few pass from then on
    const int64_t threads = ceil_div<int64_t>(ceil_div<int64_t>(chunk, 4 * fours), 32) * 32;
    FilterPlan plan{int(smaller<int64_t>(threads, 512)), larger(1024, ceil_div(2 * k, 32) * 32)};
    if (chunk <= capacity || chunk < plan.sample) plan.sample = 0;
    return plan;
}

void filter_scores(
    FilterPlan plan, Candidates candidates, const float* scores, int64_t N, int64_t first, int64_t chunk,
    LatentNorms latents, SampleNorms samples, int k, Bounds bounds, uintptr_t stream) {
    const bool samples_enough = plan.sample == 0 || (plan.sample % 32 == 0 && k <= plan.sample && plan.sample <= chunk);
    if (plan.threads < 32 || plan.threads > 512 || plan.threads % 32 || !samples_enough)
        throw std::invalid_argument("the plan does not fit the chunk");
    SharedMemory memory;
    const SelectionShared shared(memory);
    launch(
        filter_scores_kernel, N, plan.threads, memory.bytes(), stream, plan, candidates, scores, int(first), int(chunk),
        latents, samples, k, bounds);
}

void settle_supports(
    Candidates candidates, Operands operands, const Streams& streams, Activations to, int64_t first_row, int64_t N,
    const float* x_norm, const float* w_norm, int k, float rounding, float slack, int32_t* indices, int32_t* given_up,
    int32_t* total, uintptr_t stream) {
    if (k < 1 || k > most_k || k > candidates.capacity) throw std::invalid_argument("k does not fit the candidates");
    const auto kernel = operands.W.type == Floats::float32    ? settle_supports_kernel<Float32>
                        : operands.W.type == Floats::bfloat16 ? settle_supports_kernel<BFloat16>
                                                              : settle_supports_kernel<Float16>;
    launch(
        kernel, N, 128, SettleShared(SharedMemory(), k, operands.D, streams.count).bytes, stream, candidates, operands,
        first_row, x_norm, w_norm, k, rounding, slack, streams, to, indices, given_up, total);
}

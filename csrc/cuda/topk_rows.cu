#include "topk_rows.cuh"

#include <cmath>
#include <stdexcept>

TopkPlan TopkPlan::of(int64_t N, int64_t L, int k, int multiprocessors) {
    // estimated, not measured: small blocks, so that some of a multiprocessor read while others choose; where rows are
    // cut in parts, 2 blocks a multiprocessor
    TopkPlan plan{};
    plan.threads = L >= 65536 ? 512 : L >= 4096 ? 256 : 128;
    const int64_t wanted = 2 * multiprocessors / larger<int64_t>(N, 1), room = L / larger<int64_t>(16 * k, 16384);
    plan.parts = int(larger<int64_t>(1, smaller<int64_t>(smaller(wanted, room), 64)));
    return plan.for_length(plan.span(L), k);
}

TopkPlan TopkPlan::for_length(int64_t length, int k) const {
    TopkPlan plan = *this;
    const int64_t spare = larger<int64_t>(larger<int64_t>(2048, threads), smaller<int64_t>(length / 64, 4096));
    plan.capacity = int(4 * k + spare);
    // a larger sample is a better guess, so that fewer candidates are enough; it has their place
    plan.sample = int(smaller<int64_t>(smaller<int64_t>(2 * plan.capacity, 16384), length / 8)) / 32 * 32;
    // how many of the k largest are expected in the sample, and 6 standard deviations more
    const double expected = plan.sample ? double(k) * plan.sample / double(length) : 0;
    plan.rank = int(std::ceil(expected + 6 * std::sqrt(expected) + 6));
    if (length <= plan.capacity || plan.rank > plan.sample) plan.sample = 0;
    return plan;
}

int64_t TopkPlan::span(int64_t L) const { return ceil_div<int64_t>(ceil_div<int64_t>(L, parts), 8) * 8; }

static bool whole(const TopkPlan& plan) { return plan.parts == 1; }

int64_t topk_rows_workspace(TopkPlan plan, int64_t N, int k) {
    return whole(plan) ? 0 : N * plan.parts * k * int64_t(sizeof(float) + sizeof(int32_t));
}

template <class Format>
static void select_rows(
    TopkPlan plan, int32_t* indices, float* values, const void* scores, int64_t stride, int64_t N, int64_t L, int k,
    const int32_t* names, uintptr_t stream) {
    const size_t shared_bytes = TopkShared(SharedMemory(), plan.capacity, k).bytes;
    launch(
        topk_rows_kernel<Format>, N * plan.parts, plan.threads, shared_bytes, stream, plan, indices, values,
        static_cast<const typename Format::Word*>(scores), stride, L, plan.span(L), k, names);
}

void topk_rows(
    TopkPlan plan, int32_t* indices, const void* scores, Floats type, int64_t stride, int64_t N, int64_t L, int k,
    void* workspace, uintptr_t stream) {
    const auto select = type == Floats::float32    ? select_rows<Float32>
                        : type == Floats::bfloat16 ? select_rows<BFloat16>
                                                   : select_rows<Float16>;
    if (k < 1 || k > most_k || k > plan.span(L) || plan.capacity < k + plan.threads || 2 * plan.capacity < plan.sample)
        throw std::invalid_argument("the plan does not fit the rows");
    if (whole(plan)) return select(plan, indices, nullptr, scores, stride, N, L, k, nullptr, stream);
    const int64_t results = N * plan.parts * k, merged = int64_t(plan.parts) * k;
    const auto values = static_cast<float*>(workspace);
    const auto columns = reinterpret_cast<int32_t*>(values + results);
    select(plan, columns, values, scores, stride, N, L, k, nullptr, stream);
    TopkPlan merge = plan.for_length(merged, k);
    merge.parts = 1;
    select_rows<Float32>(merge, indices, nullptr, values, merged, N, merged, k, columns, stream);
}

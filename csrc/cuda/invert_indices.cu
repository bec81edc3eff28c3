#include "invert_indices.cuh"

constexpr int threads = 256;

// Blocks that sum counts; there are L + 1 counts, one for latents outside.
static int64_t summing(int64_t L) { return ceil_div<int64_t>(L + 1, threads * counts_each); }

int64_t invert_indices_workspace(int64_t n, int64_t L) {
    return summing(L) * int64_t(sizeof(int64_t)) + (L + 1 + n) * int64_t(sizeof(int));
}

void invert_indices(
    int64_t* offsets, int64_t* entries, const int32_t* indices, int64_t n_, int64_t L_, bool few, void* workspace,
    uintptr_t stream) {
    const int n = int(n_), L = int(L_), buckets = L + 1;
    const auto sums = static_cast<int64_t*>(workspace);
    const auto counts = reinterpret_cast<int*>(sums + summing(L)), numbers = counts + buckets;
    if (few) {
        launch(
            invert_few_kernel, ceil_div<int64_t>(buckets, threads), threads, InvertShared(SharedMemory()).bytes, stream,
            offsets, entries, indices, n, L);
        return;
    }
    const int64_t positions = ceil_div<int64_t>(n, threads);
    SharedMemory memory, of_segments;
    memory.take<int64_t>(32);
    const SegmentsShared shared(of_segments);
    const size_t for_sums = memory.bytes(), for_segments = of_segments.bytes();
    launch(clear_counts_kernel, ceil_div<int64_t>(buckets, threads), threads, 0, stream, counts, buckets);
    launch(draw_numbers_kernel, positions, threads, 0, stream, counts, numbers, indices, n, L);
    launch(sum_counts_kernel, summing(L), threads, for_sums, stream, sums, counts, buckets);
    launch(offsets_kernel, summing(L), threads, for_sums, stream, offsets, sums, counts, buckets);
    launch(place_entries_kernel, positions, threads, 0, stream, entries, offsets, numbers, indices, n, L);
    const int64_t segments = n ? ceil_div<int64_t>(buckets, threads) : 0;
    launch(sort_segments_kernel, segments, threads, for_segments, stream, entries, offsets, indices, n, L);
}

#include "screen_scores.cuh"

#include <stdexcept>

bool screens_scores() { return has_tiles(); }

int64_t screen_scores_workspace(int64_t N) { return N * int64_t(sizeof(RowTest)); }

void screen_scores(
    Candidates candidates, Matrix X, Matrix W, int N, int L, int D, const float* bias, const float* norm,
    SampleNorms samples, int apart, int k, Bounds bounds, int multiprocessors, void* workspace, uintptr_t stream) {
    if (!has_tiles()) throw std::invalid_argument("the device has no tiles");
    RowTest* const tests = static_cast<RowTest*>(workspace);
    SharedMemory memory;
    const SelectionShared shared(memory);
    const auto tighten = [&](int counted_apart) {
        launch(tighten_kernel, N, 32, memory.bytes(), stream, candidates, tests, samples, bounds, k, counted_apart);
    };
    tighten(apart);
    const auto kernel =
        X.type == Floats::bfloat16 ? screen_scores_kernel<BFloat16> : screen_scores_kernel<Float16>;
    const int64_t row = W.stride * 2;
    while (apart > 1) {
        apart /= 4;
        ScreenArguments a{};
        a.N = N, a.D = D, a.apart = apart, a.tests = tests, a.bias = bias, a.norm = norm, a.candidates = candidates;
        a.samples = map_tiles(X.data, N, D, X.stride * 2, tile_samples);
        for (int64_t r = 0; r < 3; ++r) {
            const int64_t first = apart * (r + 1);
            a.widths[r] = first < L ? int(ceil_div<int64_t>(L - first, 4 * int64_t(apart))) : 0;
            if (a.widths[r])
                a.latents[r] = map_tiles(
                    static_cast<const char*>(W.data) + first * row, a.widths[r], D, 4 * apart * row, tile_latents);
        }
        const int blocks = smaller(multiprocessors, a.tiles());
        launch(kernel, blocks, screen_threads, ScreenShared(SharedMemory()).bytes, stream, a);
        tighten(1);
    }
}

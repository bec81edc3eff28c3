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
    const TileMap of_samples = map_tiles(X.data, N, D, X.stride * 2, tile_samples);
    while (apart > 1) {
        apart /= 2;
        const int64_t between = apart * W.stride * 2;
        const int many = ceil_div(L - apart, 2 * apart);
        const TileMap of_latents =
            map_tiles(static_cast<const char*>(W.data) + between, many, D, 2 * between, tile_latents);
        const ScreenArguments a{of_samples, of_latents, N, L, D, apart, many, tests, bias, norm, candidates};
        const int blocks = smaller(multiprocessors, a.tiles());
        launch(kernel, blocks, screen_threads, ScreenShared(SharedMemory()).bytes, stream, a);
        tighten(1);
    }
}

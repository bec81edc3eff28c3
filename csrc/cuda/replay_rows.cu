#include "replay_rows.cuh"

int64_t replay_rows_workspace(int64_t T) { return T * int64_t(sizeof(AdamConstants)); }

void replay_rows(
    const Rows& decoder, const int64_t* latents, int64_t R, int64_t L, int64_t* last_step, const double* history,
    int64_t T, const Streams& streams, void* workspace, uintptr_t stream) {
    const auto constants = static_cast<AdamConstants*>(workspace);
    SharedMemory memory;
    memory.take<float>(BlockSums::places);
    adam_constants(constants, history, T, stream);
    const bool aligned = decoder.aligned();
    launch(
        all_whole(streams, aligned) ? replay_rows_kernel<true> : replay_rows_kernel<false>, R * streams.count, threads_for(streams), memory.bytes(), stream, decoder, constants,
        latents, R, L, last_step, T, streams, aligned);
    launch(note_steps_kernel, ceil_div<int64_t>(R, 256), 256, 0, stream, last_step, latents, R, L, T);
}

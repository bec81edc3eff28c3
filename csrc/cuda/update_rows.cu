#include "update_rows.cuh"

#include <stdexcept>
#include <type_traits>

UpdatePlan UpdatePlan::of(const Streams& streams, bool per_stream, int multiprocessors) {
    // estimated, not measured: as many blocks as surely fit a multiprocessor, 512 threads of 128 registers, as one that
    // starts late would finish late; and pieces in the time of which hundreds of other rows are done
    const int together = larger(512 / threads_for(streams), 1);
    return {together * multiprocessors, per_stream ? 128 * streams.count : 128};
}

// A row of a float32 matrix in the workspace: begins at whole 16 bytes.
static int64_t stride_of(const Streams& streams) { return ceil_div(streams.begin[streams.count], held) * held; }

static int latents_of_tile(int L) { return larger(8, ceil_div(L, 2048)); }

// How the workspace is dealt out; made from 0 it only counts.
struct UpdateWorkspace {
    AdamConstants* constants;
    Counters* counters;
    Piece* pieces;
    float *encoder_pieces, *decoder_pieces, *bias_pieces, *pre_bias_parts;
    int64_t bytes;

    UpdateWorkspace(void* begin, int64_t slots, int64_t parts, const Streams& streams) {
        uintptr_t next = reinterpret_cast<uintptr_t>(begin);
        const auto take = [&](auto*& array, int64_t count) {
            array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
            next += ceil_div<int64_t>(count * sizeof(*array), 16) * 16;
        };
        take(constants, 1);
        take(counters, 1);
        take(pieces, slots);
        take(encoder_pieces, slots * stride_of(streams));
        take(decoder_pieces, slots * stride_of(streams));
        take(bias_pieces, slots * streams.count);
        take(pre_bias_parts, parts * stride_of(streams));
        bytes = int64_t(next - reinterpret_cast<uintptr_t>(begin));
    }
};

// No latent can have more entries than a piece where there are no more in all.
static int64_t slots_of(int64_t count, int piece) { return count > piece ? ceil_div<int64_t>(count, piece) : 0; }

int64_t update_rows_workspace(UpdatePlan plan, int64_t count, int L, const Streams& streams) {
    const int parts = ceil_div(L, latents_of_tile(L));
    return UpdateWorkspace(nullptr, slots_of(count, plan.piece), parts, streams).bytes;
}

template <class X, class G>
static void update_all(const UpdatePlan& plan, const UpdateArguments& arguments, int64_t slots, uintptr_t stream) {
    const Batch& batch = arguments.batch;
    const int threads = threads_for(batch.streams);
    if (slots) {
        launch(
            list_pieces_kernel, ceil_div(batch.L, 256), 256, 0, stream, arguments.pieces, arguments.counters,
            batch.offsets, batch.L, plan.piece);
        launch(sum_pieces_kernel<X, G>, plan.blocks, threads, 0, stream, arguments);
    }
    const int64_t tiles = int64_t(arguments.parts) * batch.streams.count;
    const size_t shared_bytes = UpdateShared(SharedMemory()).bytes;
    launch(
        update_rows_kernel<X, G>, smaller<int64_t>(tiles, plan.blocks), threads, shared_bytes, stream, arguments);
}

void update_rows(
    UpdatePlan plan, float* grad_latent_bias, float* grad_pre_bias, const Rows& encoder, const Rows& decoder,
    const Batch& batch, const AdamStep& step, int64_t* last_step, void* workspace, uintptr_t stream) {
    if (plan.blocks < 1 || plan.piece < 1)
        throw std::invalid_argument("the plan needs at least one block and entry");
    const int64_t slots = slots_of(batch.count, plan.piece);
    const int latents = latents_of_tile(batch.L), parts = ceil_div(batch.L, latents);
    const int D = batch.streams.begin[batch.streams.count];
    const UpdateWorkspace room(workspace, slots, parts, batch.streams);
    const auto matrix = [&](float* data) { return Matrix{data, stride_of(batch.streams), Floats::float32}; };
    const bool aligned = encoder.aligned() && decoder.aligned() && batch.x.aligned() && batch.grad_recons.aligned();
    const UpdateArguments arguments{
        encoder,
        decoder,
        IndexedBatch(batch),
        {matrix(room.encoder_pieces), matrix(room.decoder_pieces), room.bias_pieces, Divisor(plan.piece)},
        room.pieces,
        room.counters,
        room.constants,
        matrix(room.pre_bias_parts),
        grad_latent_bias,
        last_step,
        Divisor(parts),
        latents,
        aligned,
    };
    adam_constants(room.constants, step, &room.counters->pieces, sizeof(Counters) / sizeof(int), stream);
    const Floats x = batch.x.type, grad_recons = batch.grad_recons.type;
    if (x == Floats::float16 && grad_recons == Floats::float32)
        update_all<Float16, Float32>(plan, arguments, slots, stream);
    else if (x != grad_recons)
        throw std::invalid_argument("no kernel for x and grad_recons of these types");
    else if (x == Floats::float32)
        update_all<Float32, Float32>(plan, arguments, slots, stream);
    else if (x == Floats::bfloat16)
        update_all<BFloat16, BFloat16>(plan, arguments, slots, stream);
    else
        update_all<Float16, Float16>(plan, arguments, slots, stream);
    SharedMemory memory;
    memory.take<float>(32 * 32);
    launch(
        sum_parts_kernel, ceil_div(D, 32), 1024, memory.bytes(), stream, grad_pre_bias, arguments.pre_bias_parts, parts,
        D);
}

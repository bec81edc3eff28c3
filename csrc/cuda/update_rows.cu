#include "update_rows.cuh"

#include <stdexcept>
#include <type_traits>

UpdatePlan UpdatePlan::of(const Streams& streams, bool per_stream, int multiprocessors) {
    // estimated, not measured: as many blocks as surely fit a multiprocessor, 512 threads of 128 registers, as one that
    // starts late would finish late; and pieces in the time of which hundreds of other rows are done
    const int together = larger(512 / threads_for(streams), 1);
    return {together * multiprocessors, per_stream ? 128 * streams.count : 128, false};
}

// A row of a float32 matrix in the workspace: begins at whole 16 bytes.
static int64_t stride_of(const Streams& streams) { return ceil_div(streams.begin[streams.count], held) * held; }

static int latents_of_tile(int L) { return larger(8, ceil_div(L, 2048)); }

// How the workspace is dealt out; made from 0 it only counts.
struct UpdateWorkspace {
    int64_t slots;  // for sums of pieces; no latent can have more entries than a piece where there are no more in all
    int parts;
    UpdateLists lists;
    float *encoder_pieces, *decoder_pieces, *bias_pieces, *pre_bias_parts;
    Term *encoder_terms, *decoder_terms;
    int64_t bytes;

    UpdateWorkspace(void* begin, const UpdatePlan& plan, int64_t count, int L, const Streams& streams)
        : parts(ceil_div(L, latents_of_tile(L))) {
        if (plan.blocks < 1 || plan.piece < 1)
            throw std::invalid_argument("the plan needs at least one block and entry");
        if (plan.stages_rows && !has_bulk_copies())
            throw std::invalid_argument("the device has no bulk copies, which stage rows");
        slots = count > plan.piece ? ceil_div<int64_t>(count, plan.piece) : 0;
        uintptr_t next = reinterpret_cast<uintptr_t>(begin);
        const auto take = [&](auto*& array, int64_t count) {
            array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
            next += ceil_div<int64_t>(count * sizeof(*array), 16) * 16;
        };
        take(lists.constants, 1);
        take(lists.next_tile, 1);
        take(lists.pieces, slots);
        lists.slots = int(slots);
        take(encoder_pieces, slots * stride_of(streams));
        take(decoder_pieces, slots * stride_of(streams));
        take(bias_pieces, slots * streams.count);
        take(pre_bias_parts, parts * stride_of(streams));
        take(encoder_terms, count * streams.count);
        take(decoder_terms, count * streams.count);
        bytes = int64_t(next - reinterpret_cast<uintptr_t>(begin));
    }
};

int64_t update_rows_workspace(UpdatePlan plan, int64_t count, int L, const Streams& streams) {
    return UpdateWorkspace(nullptr, plan, count, L, streams).bytes;
}

template <class Source>
static void move_rows(
    const UpdatePlan& plan, const UpdateWorkspace& room, const Source& gradients, bool aligned, const Rows& encoder,
    const Rows& decoder, float* grad_pre_bias, int64_t* last_step, uintptr_t stream) {
    const Streams& streams = gradients.streams;
    const int D = streams.begin[streams.count];
    aligned = aligned && encoder.aligned() && decoder.aligned();
    const Matrix pre_bias_parts{
        grad_pre_bias ? room.pre_bias_parts : nullptr, stride_of(streams), Floats::float32};
    const bool whole = all_whole(streams, aligned), in_registers = streams.widest() <= threads_for(streams) * held;
    const bool staged = plan.stages_rows && whole && in_registers && !last_step;
    const UpdateArguments<Source> arguments{
        gradients,
        encoder,
        decoder,
        room.lists,
        pre_bias_parts,
        last_step,
        Divisor(room.parts),
        latents_of_tile(gradients.L),
        aligned,
        staged ? streams.widest() : 0,
    };
    const int64_t tiles = int64_t(room.parts) * streams.count;
    const auto kernel = staged  ? update_rows_kernel<true, Source, StagedRows>
                        : whole ? update_rows_kernel<true, Source, PrefetchedRows>
                                : update_rows_kernel<false, Source, PrefetchedRows>;
    launch(
        kernel, smaller<int64_t>(tiles, plan.blocks), threads_for(streams),
        UpdateShared(SharedMemory(), threads_for(streams), arguments.staged).bytes, stream, arguments);
    if (!grad_pre_bias) return;
    SharedMemory memory;
    memory.take<float>(32 * 32);
    launch(
        sum_parts_kernel, ceil_div(D, 32), 1024, memory.bytes(), stream, grad_pre_bias, pre_bias_parts, room.parts, D);
}

void update_rows(
    UpdatePlan plan, float* grad_latent_bias, float* grad_pre_bias, const Rows& encoder, const Rows& decoder,
    const Batch& batch, const AdamStep& step, int64_t* last_step, void* workspace, uintptr_t stream) {
    const UpdateWorkspace room(workspace, plan, batch.count, batch.L, batch.streams);
    const auto matrix = [&](float* data) { return Matrix{data, stride_of(batch.streams), Floats::float32}; };
    const PieceSums pieces{
        matrix(room.encoder_pieces), matrix(room.decoder_pieces), room.bias_pieces, Divisor(plan.piece)};
    const bool aligned = batch.x.aligned() && batch.grad_recons.aligned();
    const auto update = [&](auto x, auto g) {
        using X = decltype(x);
        using G = decltype(g);
        const SummedGradients<X, G> gradients{
            IndexedBatch(batch, room.encoder_terms, room.decoder_terms), pieces, grad_latent_bias};
        const int64_t listing = larger<int64_t>(batch.count, room.slots ? batch.L + 1 : 1);
        launch(
            list_terms_kernel, ceil_div<int64_t>(listing, 256), 256, 0, stream,
            static_cast<const IndexedBatch&>(gradients), room.lists, step, pieces.piece);
        if (room.slots) {
            SharedMemory memory;
            memory.take<Term>(most_threads);
            const auto sum_pieces = all_whole(batch.streams, aligned) ? sum_pieces_kernel<true, X, G>
                                                                      : sum_pieces_kernel<false, X, G>;
            launch(
                sum_pieces, plan.blocks, threads_for(batch.streams), memory.bytes(), stream, gradients, room.lists,
                aligned);
        }
        move_rows(plan, room, gradients, aligned, encoder, decoder, grad_pre_bias, last_step, stream);
    };
    const Floats x = batch.x.type, grad_recons = batch.grad_recons.type;
    if (x == Floats::float16 && grad_recons == Floats::float32)
        update(Float16(), Float32());
    else if (x != grad_recons)
        throw std::invalid_argument("no kernel for x and grad_recons of these types");
    else if (x == Floats::float32)
        update(Float32(), Float32());
    else if (x == Floats::bfloat16)
        update(BFloat16(), BFloat16());
    else
        update(Float16(), Float16());
}

void step_rows(
    UpdatePlan plan, const Rows& encoder, const Rows& decoder, const Gradients& gradients, const AdamStep& step,
    int64_t* last_step, void* workspace, uintptr_t stream) {
    const UpdateWorkspace room(workspace, plan, 0, gradients.L, gradients.streams);
    launch(begin_step_kernel, 1, 32, 0, stream, room.lists, step);
    GivenGradients given{gradients};
    if (!last_step) given.used = nullptr;  // every row is moved, by whatever its gradient is
    const bool aligned = gradients.W_enc.aligned() && gradients.W_dec.aligned();
    move_rows(plan, room, given, aligned, encoder, decoder, nullptr, last_step, stream);
}

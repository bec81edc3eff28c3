// Gradient, projection, Adam and unit norm of every latent's rows in one pass; no gradient reaches memory, unless it
// comes from there: step_rows reads what update_rows sums.
//
// A tile is a run of latents in one stream: all tiles of a stream, then all of the next, so that the columns of x and
// grad_recons that are gathered stay in the L2 cache, while weights and moments stream by. A block takes a tile, then
// the next that nobody has taken; it first moves the tile's encoder rows, which gives one row of what is summed to
// grad_pre_bias, then its decoder rows. Tiles depend on the number of latents alone, so who took which shows nowhere.
// Latents with many entries have been summed in pieces by then (segment_sums.cuh). A kernel before both lists what they
// look up: constants, terms and pieces.
#pragma once
#include "decoder_row.cuh"
#include "segment_sums.cuh"

// Entries begin ... end of one latent; no entry, where no piece has the slot.
struct Piece {
    int64_t begin, end;
};

// What is listed for the kernels of a step.
struct UpdateLists {
    AdamConstants* constants;
    int* next_tile;  // that no block has taken, behind the first of each
    Piece* pieces;   // [slots]
    int slots;
};

// What `SummedGradients` is, where gradients are given. The next row is on its way while this one is moved.
struct GivenGradients : Gradients {
    __device__ bool has_entries(int64_t l) const { return !used || used[l]; }

    template <bool whole>
    __device__ void centre(float (&)[held], const Columns<whole>&) const {}

    template <bool whole>
    __device__ float encoder(
        float (&gradient)[held], int, const Columns<whole>& columns, Term*, const float (&)[held], int64_t l) const {
        if (l + 1 < L) prefetch(W_enc, l + 1, columns);
        load(gradient, W_enc, l, columns);
        return 0;
    }

    template <bool whole>
    __device__ void decoder(float (&gradient)[held], const Columns<whole>& columns, Term*, int64_t l) const {
        if (l + 1 < L) prefetch(W_dec, l + 1, columns);
        load(gradient, W_dec, l, columns);
    }
};

template <class Source>
struct UpdateArguments {
    Source gradients;
    Rows encoder, decoder;
    UpdateLists lists;
    Matrix pre_bias_parts;  // [parts, D]: -grad_pre_bias of the latents of a tile, if there is one
    int64_t* last_step;
    Divisor parts;  // tiles of a stream
    int latents;    // of a tile
    bool aligned;   // rows of all matrices
    int staged;     // columns of the widest stream, where rows are staged; else 0
};

constexpr int stages = 2;

// The shared memory of a block.
struct UpdateShared {
    float4* rows;        // [stages, 3, staged / 4]: w, m and v of a row each
    uint64_t* barriers;  // [2, stages]
    Term* terms;         // 32 of each warp
    float* of_warps;
    int* tile;
    size_t bytes;

    // `staged` columns of a row, or none
    __host__ __device__ UpdateShared(SharedMemory memory, int threads, int staged) {
        rows = memory.take<float4>(stages * 3 * staged / 4);
        barriers = memory.take<uint64_t>(2 * stages);
        terms = memory.take<Term>(threads);
        of_warps = memory.take<float>(BlockSums::places);
        tile = memory.take<int>(1);
        bytes = memory.bytes();
    }

    __device__ Term* room() const { return terms + threadIdx.x / 32 * 32; }
};

// How rows and their moments come: each is asked for while the row before it is moved, and then loaded, by all threads.
// The L2 cache is asked.
struct PrefetchedRows {
    static constexpr bool staged = false;

    __device__ explicit PrefetchedRows(const UpdateShared&, int) {}

    template <bool whole>
    __device__ void ask(const Rows& rows, int64_t l, const Stream&, const Columns<whole>& columns) {
        prefetch(rows, l, columns);
    }

    template <bool whole>
    __device__ void load(Held& row, const Rows& rows, int64_t l, const Columns<whole>& columns) {
        ::load(row, rows, l, columns);
    }
};

// Bulk copies bring them to shared memory, where there is room for two. Thread 0 asks, once all warps have read the row
// before the last.
class StagedRows {
   public:
    static constexpr bool staged = true;

    __device__ StagedRows(const UpdateShared& shared, int columns)
        : rows(shared.rows), barriers(shared.barriers), apart(columns / 4) {
        if (threadIdx.x == 0) {
            for (int stage = 0; stage < stages; ++stage) full(stage).begin(1), empty(stage).begin(blockDim.x / 32);
            fence_barriers();
        }
        __syncthreads();
    }

    __device__ void ask(const Rows& of, int64_t l, const Stream& stream, const Columns<true>& columns) {
        const unsigned to = asked % stages, turn = asked / stages;
        ++asked;
        if (threadIdx.x != 0) return;
        const unsigned bytes = (stream.end - stream.begin) * sizeof(float);
        float4* const place = rows + 3 * to * apart;
        empty(to).wait((turn & 1) ^ 1);
        full(to).arrive_expecting(3 * bytes);
        bulk_copy(place, columns.in<float>(of.weights, l), bytes, full(to));
        bulk_copy(place + apart, columns.in<float>(of.first, l), bytes, full(to));
        bulk_copy(place + 2 * apart, columns.in<float>(of.second, l), bytes, full(to));
    }

    __device__ void load(Held& row, const Rows&, int64_t, const Columns<true>& columns) {
        const unsigned from = loaded % stages, turn = loaded / stages;
        ++loaded;
        const float4* const place = rows + 3 * from * apart;
        full(from).wait(turn & 1);
        take(row.w, place, columns), take(row.m, place + apart, columns), take(row.v, place + 2 * apart, columns);
        __syncwarp();
        if (threadIdx.x % 32 == 0) empty(from).arrive();
    }

   private:
    __device__ static void take(float (&values)[held], const float4* row, const Columns<true>& columns) {
#pragma unroll
        for (int i = 0; i < held; i += 4) {
            const float4 four = columns.full ? row[(threadIdx.x * held + i) / 4] : float4{0, 0, 0, 0};
            values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
        }
    }

    __device__ TransactionBarrier full(int stage) const { return {barriers + stage}; }
    __device__ TransactionBarrier empty(int stage) const { return {barriers + stages + stage}; }

    float4* rows;
    uint64_t* barriers;
    int apart;  // of rows in shared memory
    unsigned asked = 0, loaded = 0;
};

__device__ inline void begin_step(const UpdateLists& lists, const AdamStep& step) {
    *lists.constants = constants_of(step);
    *lists.next_tile = 0;
}

__global__ void __launch_bounds__(32) begin_step_kernel(UpdateLists lists, AdamStep step) {
    if (threadIdx.x == 0) begin_step(lists, step);
}

// Writes the slots whose numbers times `piece` are entries of latent l, or of none, with l == L: each has at most the
// first piece that begins there.
__device__ inline void list_pieces(const UpdateLists& lists, const Batch& batch, int l, const Divisor& piece) {
    const int64_t begin = batch.offsets[l], end = l < batch.L ? batch.offsets[l + 1] : batch.count;
    for (int64_t slot = piece.quotient(begin + piece - 1); slot * piece < end; ++slot) {
        const int64_t first = begin + piece.quotient(slot * piece - begin + piece - 1) * piece;
        const bool is_piece = l < batch.L && first > begin && first < end;
        lists.pieces[slot] = is_piece ? Piece{first, smaller<int64_t>(first + piece, end)} : Piece{0, 0};
    }
}

// A thread an entry and, where there are pieces, a latent.
__global__ void __launch_bounds__(256, 4) list_terms_kernel(
    const __grid_constant__ IndexedBatch batch, UpdateLists lists, AdamStep step, Divisor piece) {
    const int64_t entry = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (entry == 0) begin_step(lists, step);
    if (lists.slots && entry <= batch.L) list_pieces(lists, batch, int(entry), piece);
    if (entry >= batch.count) return;
    const int64_t position = batch.entries[entry], row = batch.by_k.quotient(position);
    for (int s = 0; s < batch.streams.count; ++s)
        batch.encoder_terms[s * batch.count + entry] = encoder_term(batch, s, position, row);
    for (int source = 0; source < batch.sources; ++source)
        batch.decoder_terms[entry * batch.sources + source] = decoder_term(batch, source, position, row);
}

// Of one stream.
template <bool whole, class X, class G>
__device__ void sum_piece(
    const SummedGradients<X, G>& gradients, int s, const Stream& stream, const Piece& piece, Term* room) {
    const PieceSums& sums = gradients.pieces;
    const int64_t slot = sums.piece.quotient(piece.begin);
    for (int first = stream.begin; first < stream.end; first += stream.step()) {
        const Columns<whole> columns(stream, first);
        if (!columns.of_warp) continue;
        float centre[held], encoder[held] = {}, decoder[held] = {};
        gradients.centre(centre, columns);
        const float bias = encoder_sum<X>(encoder, gradients, s, columns, room, centre, piece.begin, piece.end);
        store(encoder, sums.encoder, slot, columns);
        if (columns.begin == stream.begin) sums.bias[slot * gradients.streams.count + s] = bias;
        decoder_sum<G>(decoder, gradients, columns, room, piece.begin, piece.end);
        store(decoder, sums.decoder, slot, columns);
    }
}

// A block does a piece of one stream, then another.
template <bool whole, class X, class G>
__global__ void __launch_bounds__(most_threads, 1) sum_pieces_kernel(
    SummedGradients<X, G> gradients, UpdateLists lists, bool aligned) {
    SharedMemory memory(shared_memory());
    Term* const room = memory.take<Term>(most_threads) + threadIdx.x / 32 * 32;
    int64_t i = blockIdx.x;  // of the slots of all streams; from the first of this one
    for (int s = 0; s < gradients.streams.count; ++s, i -= lists.slots) {
        const Stream stream(gradients.streams, s, aligned);
        for (; i < lists.slots; i += gridDim.x) {
            const Piece piece = lists.pieces[i];
            if (piece.begin < piece.end) sum_piece<whole>(gradients, s, stream, piece, room);
        }
    }
}

// The encoder rows of latents first_latent ... last_latent - 1, of which this is part `part`. Asks for the first of the
// decoder.
template <bool whole, class Source, class Ahead>
__device__ void update_encoder(
    const UpdateArguments<Source>& a, int s, const Stream& stream, int part, int first_latent, int last_latent,
    Term* room, Ahead& ahead) {
    for (int first = stream.begin; first < stream.end; first += stream.step()) {
        const Columns<whole> columns(stream, first);
        float centre[held], of_pre_bias[held] = {};
        a.gradients.centre(centre, columns);
        ahead.ask(a.encoder, first_latent, stream, columns);
        for (int l = first_latent; l < last_latent; ++l) {
            Held row;
            float gradient[held];
            const bool is_last = l + 1 == last_latent;
            ahead.ask(is_last ? a.decoder : a.encoder, is_last ? first_latent : l + 1, stream, columns);
            const float bias = a.gradients.encoder(gradient, s, columns, room, centre, l);
            ahead.load(row, a.encoder, l, columns);
#pragma unroll
            for (int i = 0; i < held; ++i) {
                of_pre_bias[i] = __fmaf_rn(bias, row.w[i], of_pre_bias[i]);
                row.w[i] = adam(row.w[i], gradient[i], row.m[i], row.v[i], *a.lists.constants);
            }
            store(row, a.encoder, l, columns);
            store_copy(row.w, a.encoder.copy, l, columns);
        }
        if (a.pre_bias_parts.data) store(of_pre_bias, a.pre_bias_parts, part, columns);
    }
}

// Latent l's decoder row. A row without an entry has no gradient, and takes the step that replay_rows takes.
template <bool whole, class Source, class Ahead>
__device__ void update_decoder(
    const UpdateArguments<Source>& a, const Stream& stream, int l, bool is_last, BlockSums& sums, Term* room,
    Ahead& ahead) {
    const bool has_entries = a.gradients.has_entries(l);
    if (a.last_step) {
        if (!has_entries) return;
        if (stream.begin == 0 && threadIdx.x == 0) a.last_step[l] = a.lists.constants->step;
    }
    float products[2] = {0, 0}, gradient[held];
    if (stream.in_registers()) {
        const Columns<whole> columns(stream, stream.begin);
        Held row;
        if (!is_last) ahead.ask(a.decoder, l + 1, stream, columns);
        a.gradients.decoder(gradient, columns, room, l);
        ahead.load(row, a.decoder, l, columns);
        if (has_entries) {
            multiply(products, gradient, row.w);
            project(gradient, row.w, along_of(products, sums));
        }
        step_in_registers(row, gradient, columns, *a.lists.constants, sums);
        store(row, a.decoder, l, columns);
        store_copy(row.w, a.decoder.copy, l, columns);
        return;
    }
    // too wide: the gradient is summed or read twice
    for (int first = stream.begin; first < stream.end && has_entries; first += stream.step()) {
        const Columns<whole> columns(stream, first);
        float w[held];
        a.gradients.decoder(gradient, columns, room, l);
        load(w, a.decoder.weights, l, columns);
        multiply(products, gradient, w);
    }
    const float along = has_entries ? along_of(products, sums) : 0;
    const auto gradient_at = [&](float (&gradient)[held], const Columns<whole>& columns) {
        a.gradients.decoder(gradient, columns, room, l);
    };
    step_in_memory<whole>(a.decoder, l, stream, *a.lists.constants, along, sums, gradient_at);
}

// Staged rows are in registers, all of them whole, and none is left behind.
template <bool whole, class Source, class Ahead>
__global__ void __launch_bounds__(most_threads, 1) update_rows_kernel(UpdateArguments<Source> a) {
    const UpdateShared shared{SharedMemory(shared_memory()), int(blockDim.x), a.staged};
    BlockSums sums(shared.of_warps);
    Ahead ahead(shared, a.staged);
    for (int tile = blockIdx.x; tile < a.parts * a.gradients.streams.count; tile = *shared.tile) {
        const int s = int(a.parts.quotient(tile)), part = tile - s * a.parts;
        const int first = part * a.latents, last = smaller(first + a.latents, a.gradients.L);
        const Stream stream(a.gradients.streams, s, a.aligned);
        update_encoder<whole>(a, s, stream, part, first, last, shared.room(), ahead);
        for (int l = first; l < last; ++l)
            update_decoder<whole>(a, stream, l, l + 1 == last, sums, shared.room(), ahead);
        __syncthreads();  // all have read the number of this tile
        if (threadIdx.x == 0) *shared.tile = int(gridDim.x) + atomicAdd(a.lists.next_tile, 1);
        __syncthreads();
    }
}

// Minus the sum of all parts of 32 columns, in an order that depends on their number alone. Blocks are 32 x 32 threads.
__global__ void __launch_bounds__(1024) sum_parts_kernel(
    float* grad_pre_bias, Matrix pre_bias_parts, int parts, int D) {
    SharedMemory memory(shared_memory());
    float* const of_groups = memory.take<float>(32 * 32);
    const int column = blockIdx.x * 32 + threadIdx.x % 32, group = threadIdx.x / 32;
    const int each = ceil_div(parts, 32), first = group * each, last = smaller(first + each, parts);
    const float* const data = static_cast<const float*>(pre_bias_parts.data) + column;
    float sum = 0;
    if (column < D) {
#pragma unroll 8
        for (int part = first; part < last; ++part) sum = __fadd_rn(sum, __ldcs(data + part * pre_bias_parts.stride));
    }
    of_groups[threadIdx.x] = sum;
    __syncthreads();
    if (group != 0 || column >= D) return;
    for (int g = 1; g < 32; ++g) sum = __fadd_rn(sum, of_groups[g * 32 + threadIdx.x]);
    grad_pre_bias[column] = -sum;
}

// sparc_fast._cuda: the operators that have a CUDA kernel. Tensors, plans and a stream; sparc_fast/ops/cuda.py prepares
// them. Everything is started on the current device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../arguments/python.h"
#include "operators.h"

namespace py = pybind11;

#ifdef SPARC_FAST_EMULATE_CUDA
constexpr Memory memory = Memory::cpu;
#else
constexpr Memory memory = Memory::cuda;
#endif

// What the arguments that are no tensors are made of.
static void add_parts(Arguments&, const TopkPlan&) {}
static void add_parts(Arguments&, const FilterPlan&) {}
static void add_parts(Arguments&, const UpdatePlan&) {}

static void add_parts(Arguments& arguments, const Streams& streams) {
    Widths widths;
    for (int s = 0; s < streams.count; ++s) widths.push_back(streams.begin[s + 1] - streams.begin[s]);
    arguments.add(widths);
}

static void must(bool holds, const std::string& what) {
    if (!holds) throw std::invalid_argument(what);
}

static Streams streams_of(const Widths& widths) {
    must(!widths.empty() && widths.size() <= most_streams, "there may be 1 to 64 streams");
    Streams streams{int(widths.size()), {}};
    int64_t end = 0;
    for (size_t s = 0; s < widths.size(); ++s) {
        must(widths[s] >= 1 && widths[s] < std::numeric_limits<int>::max() - end,
             "d_streams must be widths of at least 1 with a sum below 2^31 - 1, got " + std::to_string(widths[s]));
        streams.begin[s + 1] = int(end += widths[s]);
    }
    return streams;
}

// A number of these, which the kernels count in 32 bits.
static int narrow(int64_t count, const char* name) {
    must(count < std::numeric_limits<int>::max(), std::string(name) + " must be below 2^31 - 1, got " + std::to_string(count));
    return int(count);
}

static void* room(const Tensor& workspace, int64_t bytes) {
    must(workspace.size[0] >= bytes && reinterpret_cast<uintptr_t>(workspace.data) % 16 == 0,
         "workspace must be " + std::to_string(bytes) + " bytes that begin at whole 16, got " +
             std::to_string(workspace.size[0]));
    return workspace.data;
}

template <class T>
static T* data_of(const Tensor& tensor) {
    return static_cast<T*>(tensor.data);
}

static Floats floats_of(const Tensor& tensor) {
    return tensor.type == Type::bfloat16  ? Floats::bfloat16
           : tensor.type == Type::float16 ? Floats::float16
                                          : Floats::float32;
}

static Matrix matrix_of(const Tensor& tensor) { return {tensor.data, tensor.stride[0], floats_of(tensor)}; }

#define ROOM ">workspace:u8![bytes] "

static void define_topk_rows(py::module_& m) {
    const auto run = +[](TopkPlan plan, Tensor indices, Tensor scores, Tensor workspace, uintptr_t stream) {
        const int64_t N = indices.size[0], L = narrow(scores.size[1], "columns");
        const int k = narrow(indices.size[1], "k");
        must(plan.parts >= 1 && plan.threads >= 32 && plan.threads <= 1024, "the plan does not fit the rows");
        narrow(N * plan.parts, "parts of rows");
        topk_rows(
            plan, data_of<int32_t>(indices), scores.data, floats_of(scores), scores.stride[0], N, L, k,
            room(workspace, topk_rows_workspace(plan, N, k)), stream);
    };
    define(m, "topk_rows", run, ">indices:i32![N,k] scores:F[N,L] " ROOM, memory);
}

// counts, thresholds, lows, highs, latents, places
using CandidateTensors = Tensors<6>;
#define CANDIDATES ">counts:i32![rows] >thresholds:i32![rows] >lows:i32![rows*capacity] >highs:i32![rows*capacity] " \
    ">latents:i32![rows*capacity] >places:i32![rows*capacity] "

static Candidates candidates_of(const CandidateTensors& tensors, int64_t capacity, int64_t N, int k) {
    const auto& [counts, thresholds, lows, highs, latents, places] = tensors;
    must(N <= counts.size[0], "there must be candidates of every sample");
    must(k >= 1 && k <= most_k && k <= capacity, "k does not fit the candidates");
    return {data_of<int32_t>(counts), data_of<int32_t>(thresholds), data_of<int32_t>(lows), data_of<int32_t>(highs),
            data_of<int32_t>(latents), data_of<int32_t>(places), narrow(capacity, "capacity")};
}

static void define_global_topk(py::module_& m) {
    const auto filter = +[](FilterPlan plan, CandidateTensors candidates, int64_t capacity, Tensor scores,
                            int64_t first, Tensors<4> latents, Tensors<3> samples, int k,
                            std::array<float, 3> bounds, uintptr_t stream) {
        const int64_t N = scores.size[0], chunk = scores.size[1];
        must(!latents[2].data == !latents[3].data, "w_residual and w_inverse must both be there or be None");
        must(first < std::numeric_limits<int>::max() - chunk, "latents must be below 2^31 - 1");
        filter_scores(
            plan, candidates_of(candidates, capacity, N, k), data_of<float>(scores), N, first, chunk,
            {data_of<float>(latents[0]), data_of<float>(latents[1]), data_of<float>(latents[2]),
             data_of<float>(latents[3])},
            {data_of<float>(samples[0]), data_of<float>(samples[1]), data_of<float>(samples[2])}, k,
            {bounds[0], bounds[1], bounds[2]}, stream);
    };
    define(m, "filter_scores", filter, CANDIDATES
           "scores:f32![N,m] bias:f32![m] w_norm:f32![m] w_residual:f32![m]? w_inverse:f32![m]? x_norm:f32![N] "
           "x_residual:f32![N] x_inverse:f32![N] #capacity #first", memory);
    const auto screen = +[](CandidateTensors candidates, int64_t capacity, Tensor X, Tensor W, Tensor bias,
                            Tensor w_norm, Tensors<3> samples, int64_t apart, int k, std::array<float, 3> bounds,
                            int multiprocessors, Tensor workspace, uintptr_t stream) {
        const int64_t N = X.size[0], L = W.size[0];
        const Matrix of_samples = matrix_of(X), of_latents = matrix_of(W);
        const bool in_vectors = of_samples.aligned() && of_latents.aligned() && of_latents.stride >= W.size[1];
        must(X.type == W.type && X.type != Type::float32 && in_vectors,
             "X and W must both be bfloat16 or float16, in rows of whole 16 bytes");
        must(N >= 1 && L >= 1 && W.size[1] >= 1, "X and W must have rows and columns");
        const bool is_power = apart >= 1 && (apart & (apart - 1)) == 0;
        must(is_power && apart < L && multiprocessors >= 1, "apart must be a power of 2 below the latents");
        narrow(L + 2 * tile_latents * apart, "latents, and those of a tile beyond");
        screen_scores(
            candidates_of(candidates, capacity, N, k), of_samples, of_latents, narrow(N, "samples"), int(L),
            narrow(W.size[1], "columns"), data_of<float>(bias), data_of<float>(w_norm),
            {data_of<float>(samples[0]), data_of<float>(samples[1]), data_of<float>(samples[2])}, int(apart), k,
            {bounds[0], bounds[1], bounds[2]}, multiprocessors, room(workspace, screen_scores_workspace(N)), stream);
    };
    define(m, "screen_scores", screen, CANDIDATES
           "X:F[N,D] W:F[L,D] bias:f32![L] w_norm:f32![L] x_norm:f32![N] x_residual:f32![N] x_inverse:f32![N] " ROOM
           "#capacity #apart", memory);
    const auto settle = +[](CandidateTensors candidates, int64_t capacity, Tensor x, Tensor pre_bias, Tensor W,
                            Tensor bias, int64_t first_row, Tensor x_norm, Tensor w_norm, float rounding, float slack,
                            Tensor indices, Tensor given_up, Tensor total, Tensors<2> to, Streams streams,
                            uintptr_t stream) {
        const int64_t N = x_norm.size[0];
        const int k = narrow(indices.size[1], "k"), D = narrow(x.size[1], "columns");
        must(N <= x.size[0] - first_row, "there must be rows of every sample");
        must(!to[0].data == !to[1].data, "latent_bias and values must both be there or be None");
        narrow(x.size[0], "rows"), narrow(W.size[0], "latents");
        settle_supports(
            candidates_of(candidates, capacity, N, k),
            {matrix_of(x), matrix_of(pre_bias), matrix_of(W), data_of<double>(bias), D}, streams,
            {matrix_of(to[0]), matrix_of(to[1])}, first_row, N, data_of<float>(x_norm), data_of<float>(w_norm), k, rounding,
            slack, data_of<int32_t>(indices), data_of<int32_t>(given_up), data_of<int32_t>(total), stream);
    };
    define(m, "settle_supports", settle, CANDIDATES
           "x:F[P,D] pre_bias:F![D] W:F[L,D] bias:f64![L] x_norm:f32![N] w_norm:f32![L] >indices:i32![P,k] "
           ">given_up:i32![P] >total:i32[1] latent_bias:F[S,L]? >values:F![P,S,k]? #capacity #first_row streams", memory);
}

static void define_support_values(py::module_& m) {
    const auto run = +[](Tensor x, Tensor pre_bias, Tensor W, Tensor latent_bias, Tensor values, Tensor indices,
                         Tensor listed, Tensor count, Streams streams, uintptr_t stream) {
        const int64_t N = values.size[0];
        const int L = narrow(W.size[0], "latents"), k = narrow(values.size[2], "k"), D = narrow(x.size[1], "columns");
        must(!listed.data == !count.data, "listed and count must both be there or be None");
        narrow(N, "samples");
        const Supports supports{data_of<const int32_t>(indices), L, k, indices.size[0] != N * k,
                                data_of<const int32_t>(listed), data_of<const int32_t>(count)};
        support_values(
            {matrix_of(x), matrix_of(pre_bias), matrix_of(W), nullptr, D}, streams,
            {matrix_of(latent_bias), matrix_of(values)}, supports, N, stream);
    };
    define(m, "support_values", run, "x:F[N,D] pre_bias:F![D] W:F[L,D] latent_bias:F[S,L] >values:F![N,S,k] "
           "indices:i32![N*k|N*S*k] listed:i32![N]? count:i32[1]? streams", memory);
}

static void define_invert_indices(py::module_& m) {
    const auto run = +[](Tensor offsets, Tensor entries, Tensor indices, Tensor workspace, bool few,
                         uintptr_t stream) {
        const int64_t n = narrow(indices.size[0], "entries"), L = narrow(offsets.size[0], "latents") - 1;
        invert_indices(
            data_of<int64_t>(offsets), data_of<int64_t>(entries), data_of<int32_t>(indices), n, L, few,
            room(workspace, invert_indices_workspace(n, L)), stream);
    };
    define(m, "invert_indices", run, ">offsets:i64![L+1] >entries:i64![n] indices:i32![n] " ROOM, memory);
}

// weights, first and second moment, copy
using RowTensors = Tensors<4>;
#define DECODER ">W_dec:f32[L,D] >exp_avg_dec:f32[L,D] >exp_avg_sq_dec:f32[L,D] >copy_dec:F[L,D]? "
#define BOTH ">W_enc:f32[L,D] >exp_avg_enc:f32[L,D] >exp_avg_sq_enc:f32[L,D] >copy_enc:F[L,D]? " DECODER
#define LAST_STEP ">last_step:i64![L]? "

static Rows rows_of(const RowTensors& tensors) {
    return {matrix_of(tensors[0]), matrix_of(tensors[1]), matrix_of(tensors[2]), matrix_of(tensors[3])};
}

// lr, beta_1, beta_2, eps, step; where the device has lr and step
using StepNumbers = std::array<double, 5>;
using StepTensors = Tensors<2>;
#define STEP "lr:f64[1]? step:f64[1]? "

static AdamStep step_of(const StepNumbers& numbers, const StepTensors& there) {
    const auto [lr, beta_1, beta_2, eps, step] = numbers;
    return {lr, beta_1, beta_2, eps, step, data_of<double>(there[0]), data_of<double>(there[1])};
}

static void define_update_rows(py::module_& m) {
    // x, grad_recons, pre_bias, values, grad_values, offsets, entries
    const auto update = +[](UpdatePlan plan, Tensor grad_latent_bias, Tensor grad_pre_bias, RowTensors encoder,
                            RowTensors decoder, Tensors<7> samples, StepNumbers numbers, StepTensors there,
                            Tensor last_step, Tensor workspace, Streams streams, uintptr_t stream) {
        const auto& [x, grad_recons, pre_bias, values, grad_values, offsets, entries] = samples;
        const int64_t N = values.size[0], S = values.size[1], count = entries.size[0];
        const int L = narrow(encoder[0].size[0], "latents"), k = narrow(values.size[2], "k");
        narrow(L * S, "rows of latents");
        must(N * S < int64_t(1) << 32, "samples of streams must be below 2^32");
        const Batch batch{matrix_of(x),           matrix_of(grad_recons),     matrix_of(pre_bias),
                          matrix_of(values),      matrix_of(grad_values),     data_of<const int64_t>(offsets),
                          data_of<const int64_t>(entries), count, L, k, count != N * k, streams};
        update_rows(
            plan, data_of<float>(grad_latent_bias), data_of<float>(grad_pre_bias), rows_of(encoder), rows_of(decoder),
            batch, step_of(numbers, there), data_of<int64_t>(last_step),
            room(workspace, update_rows_workspace(plan, count, L, streams)), stream);
    };
    define(m, "update_rows", update, ">grad_latent_bias:f32![S,L] >grad_pre_bias:f32![D] " BOTH
           "x:F[N,D] grad_recons:F[N*S,D] pre_bias:F![D] values:F![N,S,k] grad_values:F![N,S,k] offsets:i64![L+1] "
           "entries:i64![N*k|N*S*k] " STEP LAST_STEP ROOM "streams", memory);
    const auto step = +[](UpdatePlan plan, RowTensors encoder, RowTensors decoder, Tensors<3> gradients,
                          StepNumbers numbers, StepTensors there, Tensor last_step, Tensor workspace, Streams streams,
                          uintptr_t stream) {
        const auto& [W_enc, W_dec, used] = gradients;
        const int L = narrow(used.size[0], "latents");
        narrow(int64_t(L) * streams.count, "rows of latents");
        step_rows(
            plan, rows_of(encoder), rows_of(decoder),
            {matrix_of(W_enc), matrix_of(W_dec), data_of<const bool>(used), L, streams}, step_of(numbers, there),
            data_of<int64_t>(last_step), room(workspace, update_rows_workspace(plan, 0, L, streams)), stream);
    };
    define(m, "step_rows", step, BOTH "grad_W_enc:f32[L,D] grad_W_dec:f32[L,D] used:bool![L] " STEP LAST_STEP ROOM
           "streams", memory);
}

static void define_replay_rows(py::module_& m) {
    const auto run = +[](RowTensors decoder, Tensor latents, Tensor last_step, Tensor history, Tensor workspace,
                         Streams streams, uintptr_t stream) {
        const int64_t L = decoder[0].size[0], R = latents.size[0], T = history.size[0];
        narrow(L * streams.count, "rows of latents"), narrow(R * streams.count, "rows of latents to replay");
        replay_rows(
            rows_of(decoder), data_of<const int64_t>(latents), R, L, data_of<int64_t>(last_step),
            data_of<const double>(history), T, streams, room(workspace, replay_rows_workspace(T)), stream);
    };
    define(m, "replay_rows", run, DECODER "latents:i64![R] >last_step:i64![L] history:f64![T,4] " ROOM "streams",
           memory);
}

PYBIND11_MODULE(_cuda, m) {
    using namespace py::literals;

    m.attr("most_k") = most_k;
    m.attr("most_streams") = most_streams;
    py::class_<Streams>(m, "Streams", py::module_local()).def(py::init(&streams_of), "widths"_a);
    py::class_<TopkPlan>(m, "TopkPlan", py::module_local())
        .def(py::init(&TopkPlan::of), "N"_a, "L"_a, "k"_a, "multiprocessors"_a)
        .def_readwrite("threads", &TopkPlan::threads)
        .def_readwrite("capacity", &TopkPlan::capacity)
        .def_readwrite("parts", &TopkPlan::parts)
        .def_readwrite("sample", &TopkPlan::sample)
        .def_readwrite("rank", &TopkPlan::rank);
    py::class_<FilterPlan>(m, "FilterPlan", py::module_local())
        .def(py::init(&FilterPlan::of), "chunk"_a, "k"_a, "capacity"_a)
        .def_readwrite("threads", &FilterPlan::threads)
        .def_readwrite("sample", &FilterPlan::sample);
    py::class_<UpdatePlan>(m, "UpdatePlan", py::module_local())
        .def(py::init(&UpdatePlan::of), "streams"_a, "per_stream"_a, "multiprocessors"_a)
        .def_readwrite("blocks", &UpdatePlan::blocks)
        .def_readwrite("piece", &UpdatePlan::piece)
        .def_readwrite("stages_rows", &UpdatePlan::stages_rows);
    m.def("topk_rows_workspace", topk_rows_workspace, "plan"_a, "N"_a, "k"_a);
    m.def("screens_scores", screens_scores);
    m.def("screen_scores_workspace", screen_scores_workspace, "N"_a);
    m.def("invert_indices_workspace", invert_indices_workspace, "n"_a, "L"_a);
    m.def("update_rows_workspace", update_rows_workspace, "plan"_a, "count"_a, "L"_a, "streams"_a);
    m.def("replay_rows_workspace", replay_rows_workspace, "T"_a);

    define_topk_rows(m);
    define_global_topk(m);
    define_support_values(m);
    define_invert_indices(m);
    define_update_rows(m);
    define_replay_rows(m);
}

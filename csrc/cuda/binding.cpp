// sparc_fast._cuda: the operators that have a CUDA kernel. Addresses, sizes and a stream; sparc_fast/ops/cuda.py
// prepares them. Everything is started on the current device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>
#include <stdexcept>
#include <vector>

#include "operators.h"

namespace py = pybind11;

template <class T>
static T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

static Streams streams_of(const std::vector<int>& widths) {
    if (widths.empty() || widths.size() > most_streams) throw std::invalid_argument("there may be 1 to 64 streams");
    Streams streams{int(widths.size()), {}};
    std::partial_sum(widths.begin(), widths.end(), streams.begin + 1);
    return streams;
}

PYBIND11_MODULE(_cuda, m) {
    using namespace py::literals;
    const py::call_guard<py::gil_scoped_release> released;

    py::enum_<Floats>(m, "Floats", py::module_local())
        .value("float32", Floats::float32)
        .value("bfloat16", Floats::bfloat16)
        .value("float16", Floats::float16);
    py::class_<Matrix>(m, "Matrix", py::module_local())
        .def(py::init([](uintptr_t address, int64_t stride, Floats type) {
            return Matrix{at<void>(address), stride, type};
        }), "address"_a = 0, "stride"_a = 0, "type"_a = Floats::float32);
    m.attr("most_k") = most_k;
    py::class_<TopkPlan>(m, "TopkPlan", py::module_local())
        .def(py::init(&TopkPlan::of), "N"_a, "L"_a, "k"_a, "multiprocessors"_a)
        .def_readwrite("threads", &TopkPlan::threads)
        .def_readwrite("capacity", &TopkPlan::capacity)
        .def_readwrite("parts", &TopkPlan::parts)
        .def_readwrite("sample", &TopkPlan::sample)
        .def_readwrite("rank", &TopkPlan::rank);
    m.def("topk_rows_workspace", topk_rows_workspace, "plan"_a, "N"_a, "k"_a);
    m.def(
        "topk_rows",
        [](TopkPlan plan, uintptr_t indices, uintptr_t scores, Floats type, int64_t stride, int64_t N, int64_t L, int k,
           uintptr_t workspace, uintptr_t stream) {
            topk_rows(plan, at<int32_t>(indices), at<void>(scores), type, stride, N, L, k, at<void>(workspace), stream);
        },
        "plan"_a, "indices"_a, "scores"_a, "type"_a, "stride"_a, "N"_a, "L"_a, "k"_a, "workspace"_a, "stream"_a,
        released);

    py::class_<FilterPlan>(m, "FilterPlan", py::module_local())
        .def(py::init(&FilterPlan::of), "chunk"_a, "k"_a, "capacity"_a)
        .def_readwrite("threads", &FilterPlan::threads)
        .def_readwrite("sample", &FilterPlan::sample);
    // counts, thresholds, lows, highs, latents, places
    py::class_<Candidates>(m, "Candidates", py::module_local())
        .def(py::init([](std::array<uintptr_t, 6> arrays, int capacity) {
            const auto [counts, thresholds, lows, highs, latents, places] = arrays;
            return Candidates{at<int32_t>(counts), at<int32_t>(thresholds), at<int32_t>(lows), at<int32_t>(highs),
                              at<int32_t>(latents), at<int32_t>(places), capacity};
        }), "arrays"_a, "capacity"_a);
    m.def(
        "filter_scores",
        [](FilterPlan plan, Candidates candidates, uintptr_t scores, int64_t N, int64_t first, int64_t chunk,
           std::array<uintptr_t, 4> latents, std::array<uintptr_t, 3> samples, int k, std::array<float, 3> bounds,
           uintptr_t stream) {
            filter_scores(
                plan, candidates, at<float>(scores), N, first, chunk,
                {at<float>(latents[0]), at<float>(latents[1]), at<float>(latents[2]), at<float>(latents[3])},
                {at<float>(samples[0]), at<float>(samples[1]), at<float>(samples[2])}, k,
                {bounds[0], bounds[1], bounds[2]}, stream);
        },
        "plan"_a, "candidates"_a, "scores"_a, "N"_a, "first"_a, "chunk"_a, "latents"_a, "samples"_a, "k"_a, "bounds"_a,
        "stream"_a, released);
    m.def(
        "settle_supports",
        [](Candidates candidates, Matrix x, Matrix pre_bias, Matrix W, uintptr_t bias, int D, int64_t first_row,
           int64_t N, uintptr_t x_norm, uintptr_t w_norm, int k, float rounding, float slack, uintptr_t indices,
           uintptr_t given_up, uintptr_t total, uintptr_t stream) {
            settle_supports(
                candidates, {x, pre_bias, W, at<double>(bias), D}, first_row, N, at<float>(x_norm), at<float>(w_norm),
                k, rounding, slack, at<int32_t>(indices), at<int32_t>(given_up), at<int32_t>(total), stream);
        },
        "candidates"_a, "x"_a, "pre_bias"_a, "W"_a, "bias"_a, "D"_a, "first_row"_a, "N"_a, "x_norm"_a, "w_norm"_a,
        "k"_a, "rounding"_a, "slack"_a, "indices"_a, "given_up"_a, "total"_a, "stream"_a, released);

    m.def("invert_indices_workspace", invert_indices_workspace, "n"_a, "L"_a);
    m.def(
        "invert_indices",
        [](uintptr_t offsets, uintptr_t entries, uintptr_t indices, int64_t n, int64_t L, uintptr_t workspace,
           uintptr_t stream) {
            invert_indices(
                at<int64_t>(offsets), at<int64_t>(entries), at<int32_t>(indices), n, L, at<void>(workspace), stream);
        },
        "offsets"_a, "entries"_a, "indices"_a, "n"_a, "L"_a, "workspace"_a, "stream"_a, released);

    m.attr("most_streams") = most_streams;
    py::class_<Rows>(m, "Rows", py::module_local())
        .def(py::init<Matrix, Matrix, Matrix, Matrix>(), "weights"_a, "first"_a, "second"_a, "copy"_a);
    py::class_<Streams>(m, "Streams", py::module_local()).def(py::init(&streams_of), "widths"_a);
    py::class_<Batch>(m, "Batch", py::module_local())
        .def(py::init([](Matrix x, Matrix grad_recons, Matrix pre_bias, Matrix values, Matrix grad_values,
                         uintptr_t offsets, uintptr_t entries, int64_t count, int L, int k, bool per_stream,
                         Streams streams) {
            return Batch{x, grad_recons, pre_bias, values, grad_values, at<const int64_t>(offsets),
                         at<const int64_t>(entries), count, L, k, per_stream, streams};
        }), "x"_a, "grad_recons"_a, "pre_bias"_a, "values"_a, "grad_values"_a, "offsets"_a, "entries"_a, "count"_a,
            "L"_a, "k"_a, "per_stream"_a, "streams"_a);
    py::class_<Gradients>(m, "Gradients", py::module_local())
        .def(py::init([](Matrix W_enc, Matrix W_dec, uintptr_t used, int L, Streams streams) {
            return Gradients{W_enc, W_dec, at<const bool>(used), L, streams};
        }), "W_enc"_a, "W_dec"_a, "used"_a, "L"_a, "streams"_a);
    py::class_<AdamStep>(m, "AdamStep", py::module_local())
        .def(py::init([](double lr, double beta_1, double beta_2, double eps, double step, uintptr_t lr_at,
                         uintptr_t step_at) {
            return AdamStep{lr, beta_1, beta_2, eps, step, at<const double>(lr_at), at<const double>(step_at)};
        }), "lr"_a, "beta_1"_a, "beta_2"_a, "eps"_a, "step"_a, "lr_at"_a, "step_at"_a);
    py::class_<UpdatePlan>(m, "UpdatePlan", py::module_local())
        .def(py::init(&UpdatePlan::of), "streams"_a, "per_stream"_a, "multiprocessors"_a)
        .def_readwrite("blocks", &UpdatePlan::blocks)
        .def_readwrite("piece", &UpdatePlan::piece);
    m.def("update_rows_workspace", update_rows_workspace, "plan"_a, "count"_a, "L"_a, "streams"_a);
    m.def(
        "update_rows",
        [](UpdatePlan plan, uintptr_t grad_latent_bias, uintptr_t grad_pre_bias, Rows encoder, Rows decoder,
           Batch batch, AdamStep step, uintptr_t last_step, uintptr_t workspace, uintptr_t stream) {
            update_rows(
                plan, at<float>(grad_latent_bias), at<float>(grad_pre_bias), encoder, decoder, batch, step,
                at<int64_t>(last_step), at<void>(workspace), stream);
        },
        "plan"_a, "grad_latent_bias"_a, "grad_pre_bias"_a, "encoder"_a, "decoder"_a, "batch"_a, "step"_a,
        "last_step"_a, "workspace"_a, "stream"_a, released);
    m.def(
        "step_rows",
        [](UpdatePlan plan, Rows encoder, Rows decoder, Gradients gradients, AdamStep step, uintptr_t last_step,
           uintptr_t workspace, uintptr_t stream) {
            step_rows(
                plan, encoder, decoder, gradients, step, at<int64_t>(last_step), at<void>(workspace), stream);
        },
        "plan"_a, "encoder"_a, "decoder"_a, "gradients"_a, "step"_a, "last_step"_a, "workspace"_a, "stream"_a,
        released);

    m.def("replay_rows_workspace", replay_rows_workspace, "T"_a);
    m.def(
        "replay_rows",
        [](Rows decoder, uintptr_t latents, int64_t R, int64_t L, uintptr_t last_step, uintptr_t history, int64_t T,
           Streams streams, uintptr_t workspace, uintptr_t stream) {
            replay_rows(
                decoder, at<const int64_t>(latents), R, L, at<int64_t>(last_step), at<const double>(history), T,
                streams, at<void>(workspace), stream);
        },
        "decoder"_a, "latents"_a, "R"_a, "L"_a, "last_step"_a, "history"_a, "T"_a, "streams"_a, "workspace"_a,
        "stream"_a, released);
}

// sparc_fast._cuda: the operators that have a CUDA kernel. Addresses, sizes and a stream; sparc_fast/native_cuda.py
// prepares them. Everything is started on the current device.
#include <pybind11/pybind11.h>

#include "invert_indices.h"
#include "topk_rows.h"

namespace py = pybind11;

template <class T>
static T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cuda, m) {
    using namespace py::literals;
    const py::call_guard<py::gil_scoped_release> released;

    py::enum_<Scores>(m, "Scores", py::module_local())
        .value("float32", Scores::float32)
        .value("bfloat16", Scores::bfloat16)
        .value("float16", Scores::float16);
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
        [](TopkPlan plan, uintptr_t indices, uintptr_t scores, Scores type, int64_t stride, int64_t N, int64_t L, int k,
           uintptr_t workspace, uintptr_t stream) {
            topk_rows(plan, at<int32_t>(indices), at<void>(scores), type, stride, N, L, k, at<void>(workspace), stream);
        },
        "plan"_a, "indices"_a, "scores"_a, "type"_a, "stride"_a, "N"_a, "L"_a, "k"_a, "workspace"_a, "stream"_a,
        released);

    m.def("invert_indices_workspace", invert_indices_workspace, "n"_a, "L"_a);
    m.def(
        "invert_indices",
        [](uintptr_t offsets, uintptr_t entries, uintptr_t indices, int64_t n, int64_t L, uintptr_t workspace,
           uintptr_t stream) {
            invert_indices(
                at<int64_t>(offsets), at<int64_t>(entries), at<int32_t>(indices), n, L, at<void>(workspace), stream);
        },
        "offsets"_a, "entries"_a, "indices"_a, "n"_a, "L"_a, "workspace"_a, "stream"_a, released);
}

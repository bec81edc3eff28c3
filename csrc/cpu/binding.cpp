// sparc_fast._cpu: the operators of the CPU backend. sparc_fast/ops/cpu.py prepares what it passes; nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "global_topk.h"
#include "huge_pages.h"
#include "level.h"
#include "loader.h"
#include "operators.h"
#include "topk_rows.h"

namespace py = pybind11;

// Anything with data_ptr(), element_size(), shape and stride(), as torch.Tensor has; None has no data.
template <>
struct pybind11::detail::type_caster<Tensor> {
    PYBIND11_TYPE_CASTER(Tensor, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        const py::tuple size = source.attr("shape"), stride = source.attr("stride")();
        if (size.size() > 3) return false;
        value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
        value.item_size = source.attr("element_size")().cast<int64_t>();
        value.ndim = size.size();
        for (int64_t i = 0; i < value.ndim; ++i) {
            value.size[i] = size[i].cast<int64_t>();
            value.stride[i] = stride[i].cast<int64_t>();
        }
        return true;
    }
};

PYBIND11_MODULE(_cpu, m) {
    const auto define = [&m](const char* name, auto function) {
        m.def(name, function, py::call_guard<py::gil_scoped_release>());
    };
    py::class_<Batch>(m, "Batch").def(py::init<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Widths>());
    py::class_<Gradients>(m, "Gradients").def(py::init<Tensor, Tensor, Tensor, Tensor, Widths>());
    py::class_<AdamStep>(m, "AdamStep").def(py::init<double, double, double, double, int64_t, uint64_t>());
    define("support_values", support_values);
    define("support_values_grad_x", support_values_grad_x);
    define("sparse_decode", sparse_decode);
    define("sparse_decode_grad_values", sparse_decode_grad_values);
    define("decode_loss", decode_loss);
    define("invert_indices", py::overload_cast<Tensor, Tensor, Tensor, int64_t>(invert_indices));
    define("weight_gradients", weight_gradients);
    define("update_rows", update_rows);
    define("step_rows", step_rows);
    define("replay_rows", replay_rows);
    define("count_silence", count_silence);
    py::class_<Screen>(m, "Screen")
        .def(py::init<Tensor, Tensor, Tensor, int64_t, int64_t, int64_t, bool>())
        .def("filter", &Screen::filter, py::call_guard<py::gil_scoped_release>())
        .def("settle", &Screen::settle, py::call_guard<py::gil_scoped_release>());
    define("exact_scores", exact_scores);
    define("support_scores", support_scores);
    define("measure_rows", measure_rows);
    define("topk_rows", topk_rows);
    define("first_not_finite", py::overload_cast<Tensor, bool>(first_not_finite));
    define("will_need", will_need);
    define("read_spans", read_spans);
    define("gather_rows", gather_rows);
    define("prefer_huge_pages", prefer_huge_pages);
    define("has_bf16_products", has_bf16_products);
    define("simd_level", simd_level);
    define("set_simd_level", set_simd_level);
}

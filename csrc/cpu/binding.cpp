// sparc_fast._cpu: raw addresses in, nothing of torch. sparc_fast/native.py checks what it passes.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "invert_indices.h"

namespace py = pybind11;

template <typename T>
static T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

PYBIND11_MODULE(_cpu, m) {
    m.def("invert_indices", [](uintptr_t indices, int64_t n, int64_t L, uintptr_t offsets, uintptr_t entries) {
        py::gil_scoped_release release;
        invert_indices(pointer<const int32_t>(indices), n, L, pointer<int64_t>(offsets), pointer<int64_t>(entries));
    });
}

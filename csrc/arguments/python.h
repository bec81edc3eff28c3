// How a module for Python is made of functions that take tensors.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "signature.h"

// The dtypes of torch, which is loaded where there are tensors; its objects live as long as the process.
inline Type type_of(pybind11::handle dtype) {
    static const auto known = [] {
        const pybind11::module_ torch = pybind11::module_::import("torch");
        std::vector<std::pair<PyObject*, Type>> types;
        for (const auto& [name, type] : {std::pair{"float32", Type::float32}, {"float64", Type::float64},
                                         {"bfloat16", Type::bfloat16}, {"float16", Type::float16},
                                         {"int32", Type::int32}, {"int64", Type::int64}, {"uint8", Type::uint8},
                                         {"bool", Type::boolean}})
            types.emplace_back(torch.attr(name).ptr(), type);
        return types;
    }();
    for (const auto& [object, type] : known)
        if (object == dtype.ptr()) return type;
    return Type::other;
}

inline Memory memory_of(pybind11::handle tensor) {
    static PyObject* const strided = pybind11::module_::import("torch").attr("strided").ptr();
    if (tensor.attr("layout").ptr() != strided) return Memory::other;
    if (tensor.attr("is_cpu").cast<bool>()) return Memory::cpu;
    return tensor.attr("is_cuda").cast<bool>() ? Memory::cuda : Memory::other;
}

// A torch.Tensor; None has no data.
template <>
struct pybind11::detail::type_caster<Tensor> {
    PYBIND11_TYPE_CASTER(Tensor, const_name("torch.Tensor"));

    bool load(handle source, bool) {
        if (source.is_none()) return true;
        if (!pybind11::hasattr(source, "data_ptr")) return false;
        value.type = type_of(source.attr("dtype"));
        value.memory = memory_of(source);
        const pybind11::tuple size = source.attr("shape");
        value.ndim = size.size();
        for (int64_t i = 0; i < std::min<int64_t>(value.ndim, 3); ++i) value.size[i] = size[i].cast<int64_t>();
        if (value.memory == Memory::other || value.ndim > 3) return true;
        const pybind11::tuple stride = source.attr("stride")();
        for (int64_t i = 0; i < value.ndim; ++i) value.stride[i] = stride[i].cast<int64_t>();
        value.data = reinterpret_cast<void*>(source.attr("data_ptr")().cast<uintptr_t>());
        value.item_size = source.attr("element_size")().cast<int64_t>();
        if (value.memory == Memory::cuda) value.device = source.attr("get_device")().cast<int64_t>();
        return true;
    }
};

// Every function comes with what it takes of its tensors: none gets an address that was not checked.
template <class R, class... Args>
void define(
    pybind11::module_& m, const char* name, R (*function)(Args...), const char* words, Memory memory = Memory::cpu) {
    m.def(
        name,
        [function, signature = Signature(name, words, memory)](Args... args) {
            signature.check(Arguments(args...));
            return function(std::move(args)...);
        },
        pybind11::call_guard<pybind11::gil_scoped_release>());
}

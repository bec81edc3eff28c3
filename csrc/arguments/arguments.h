// What Python hands over: tensors as addresses, sizes and strides, and what else an operator takes. Nothing here knows
// torch.
#pragma once
#include <array>
#include <cstdint>
#include <type_traits>
#include <vector>

enum class Type { none, float32, float64, bfloat16, float16, int32, int64, uint8, boolean, other };

enum class Memory { cpu, cuda, other };

// A tensor of up to three dimensions. The last is contiguous: signature.h sees to it.
struct Tensor {
    void* data = nullptr;
    int64_t size[3] = {0, 0, 0};
    int64_t stride[3] = {0, 0, 0};
    int64_t ndim = 0;
    int64_t item_size = 0;  // 8: float64 or int64, 4: float32 or int32, 2: bfloat16 or float16
    Type type = Type::none;
    Memory memory = Memory::other;  // that of a dense tensor
    int64_t device = -1;            // which GPU

    template <class T>
    T* at(int64_t i, int64_t j = 0) const {
        return static_cast<T*>(data) + i * stride[0] + j * stride[1];
    }

    bool is_empty() const {
        for (int64_t i = 0; i < ndim; ++i)
            if (size[i] == 0) return true;
        return false;
    }

    // Of a contiguous tensor.
    int64_t bytes() const {
        int64_t product = item_size;
        for (int64_t i = 0; i < ndim; ++i) product *= size[i];
        return product;
    }
};

template <size_t n>
using Tensors = std::array<Tensor, n>;
using Widths = std::vector<int64_t>;  // D_s of each stream

// The tensors, integers and widths among an operator's arguments, in their order.
struct Arguments {
    std::vector<Tensor> tensors;
    std::vector<int64_t> integers;
    Widths widths;
    int64_t weights = -1;

    template <class... Args>
    explicit Arguments(const Args&... args) {
        (add(args), ...);
    }

    void add(const Tensor& tensor) { tensors.push_back(tensor); }
    void add(const Widths& some) { widths = some; }
    void add(const std::vector<double>& some) { weights = some.size(); }
    void add(const int64_t& integer) { integers.push_back(integer); }
    template <class T, size_t n>
    void add(const std::array<T, n>& some) {
        for (const T& one : some) add(one);
    }
    // Other numbers (threads, seeds, settings) have no address. What is none must say what it is made of: its binding
    // has a function add_parts(Arguments&, const T&).
    template <class T>
    void add(const T& other) {
        if constexpr (!std::is_arithmetic_v<T>) add_parts(*this, other);
    }
};

// What an operator takes of every tensor whose address it is given, checked before the address is used.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "operators.h"

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

private:
    void add(const Tensor& tensor) { tensors.push_back(tensor); }
    void add(const std::vector<Tensor>& some) { tensors.insert(tensors.end(), some.begin(), some.end()); }
    void add(const Batch& b) {
        for (const Tensor& tensor : {b.x, b.pre_bias, b.values, b.grad_values, b.grad_recons, b.offsets, b.entries})
            add(tensor);
        add(b.d_streams);
    }
    void add(const Gradients& g) {
        for (const Tensor& tensor : {g.W_enc, g.W_dec, g.used}) add(tensor);
        add(g.d_streams);
    }
    void add(const Widths& some) { widths = some; }
    void add(const std::vector<double>& some) { weights = some.size(); }
    void add(const int64_t& integer) { integers.push_back(integer); }
    template <class T>
    void add(const T&) {}  // threads, seeds and settings have no address
};

// Read from words like  ">values:A[N,S,k]  indices:i32![N,k|N,S,k]  copy:bf16[L,D]?  #k":
//   >     a result: its numbers lie apart from each other and from those of all other tensors;
//   type  f32, f64, bf16, i32, i64, bool, or any; A the type of the sums, T that of what is stored, which is float64
//         where A is and nowhere else; M that of moments, A or bfloat16; every A, T and M is one type;
//   !     contiguous; of other tensors, the last dimension;
//   [..]  sizes, with alternatives; a letter is one size throughout; S is the number of d_streams, D their sum;
//   ?     None will do;  #k  an integer argument, which is that size;  streams  the integers are d_streams.
class Signature {
public:
    using Sizes = std::vector<std::pair<std::string, int64_t>>;

    Signature(const char* name, const char* words);

    // Throws std::invalid_argument, which names the argument, what it must be and what it is.
    void check(const Arguments& arguments, Sizes sizes = {}) const;

private:
    using Shape = std::vector<std::string>;
    struct Operand {
        std::string name, type;
        std::vector<Shape> shapes;
        bool is_result, is_packed, may_be_none;
    };

    std::string operator_name;
    std::vector<Operand> operands;
    std::vector<std::string> integers;
    bool has_streams = false;
};

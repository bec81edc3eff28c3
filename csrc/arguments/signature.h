// What an operator takes of every tensor whose address it is given, checked before the address is used.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"

// Read from words like  ">values:A[N,S,k]  indices:i32![N,k|N,S,k]  copy:bf16[L,D]?  #k":
//   >     a result: its numbers lie apart from each other and from those of all other tensors;
//   type  f32, f64, bf16, i32, i64, u8, bool, or any; A the type of the sums, T that of what is stored, which is float64
//         where A is and nowhere else; M that of moments or reconstructions, A or bfloat16; every A, T and M is one
//         type; F float32, bfloat16 or float16, whatever others are;
//   !     contiguous; of other tensors, the last dimension;
//   [..]  sizes, with alternatives; a letter is one size throughout, N*S a product of such that came before; S is the
//         number of d_streams, D their sum;
//   ?     None will do;  #k  an integer argument, which is that size;  streams  the integers are d_streams.
class Signature {
public:
    using Sizes = std::vector<std::pair<std::string, int64_t>>;

    // Of dense tensors in this memory; on GPUs, all on that of the first.
    Signature(const char* name, const char* words, Memory memory = Memory::cpu);

    // Throws std::invalid_argument, which names the argument, what it must be and what it is.
    void check(const Arguments& arguments, Sizes sizes = {}) const;

private:
    // A size like "N", "L+1", "N*S" or "2".
    struct Size {
        std::string words;
        std::vector<std::string> factors;
        int64_t more = 0;

        explicit Size(const std::string& words);
        int64_t in(const Sizes& sizes) const;
        bool agrees(int64_t size, Sizes& sizes) const;
    };
    using Shape = std::vector<Size>;
    struct Operand {
        std::string name, type;
        std::vector<Shape> shapes;
        bool is_result, is_packed, may_be_none;

        bool agrees(const Tensor& tensor, Sizes& sizes) const;
        std::string expected(const Sizes& sizes) const;
    };

    std::string operator_name;
    Memory memory;
    std::vector<Operand> operands;
    std::vector<std::string> integers;
    bool has_streams = false;
};

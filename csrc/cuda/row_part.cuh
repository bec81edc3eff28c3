#pragma once
#include "device.cuh"

// A run of a row's columns, read 16 bytes at a time where they are aligned.
template <class Format>
struct RowPart {
    using Word = typename Format::Word;
    static constexpr int width = 16 / sizeof(Word);

    const Word* words;
    int length, head, vectors;  // head: words before the first whole 16 bytes

    __device__ RowPart(const Word* words_, int length_) : words(words_), length(length_) {
        head = smaller(length, int((16 - reinterpret_cast<uintptr_t>(words) % 16) % 16 / sizeof(Word)));
        vectors = (length - head) / width;
    }
    __device__ float operator[](int i) const { return Format::value(words[i]); }
    __device__ uint4 vector(int v) const { return __ldcs(reinterpret_cast<const uint4*>(words + head) + v); }
    __device__ static float in(const uint4& vector, int i) {
        const uint32_t word = i * 4 / width == 0   ? vector.x
                              : i * 4 / width == 1 ? vector.y
                              : i * 4 / width == 2 ? vector.z
                                                   : vector.w;
        return Format::value(Word(width == 8 && i % 2 ? word >> 16 : word));
    }
};

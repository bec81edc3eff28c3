#pragma once
#include <cstdint>

enum class Floats { float32, bfloat16, float16 };

// Rows of floats in memory, `stride` floats apart, the columns of a row side by side. No data: there is no matrix.
struct Matrix {
    void* data;
    int64_t stride;
    Floats type;

    // Every row begins at whole 16 bytes, and the bytes between two rows' begins are a number of 32 bits.
    bool aligned() const {
        const int64_t bytes = type == Floats::float32 ? 4 : 2;
        const bool is_near = 0 <= stride && stride < int64_t(1) << 30;
        return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes % 16 == 0 && is_near;
    }
};

constexpr int most_streams = 64;

// Stream s has columns begin[s] ... begin[s + 1].
struct Streams {
    int count;
    int begin[most_streams + 1];

    int widest() const {
        int widest = 0;
        for (int s = 0; s < count; ++s) widest = begin[s + 1] - begin[s] > widest ? begin[s + 1] - begin[s] : widest;
        return widest;
    }
};

// Rows of W multiplied by a sample, a stream at a time: for the choice of a support and for its values, which are the
// same bits wherever they were summed. By a warp: a lane adds up 8 columns of each 256, which are added by halving,
// neighbours first.
#pragma once
#include "columns.cuh"
#include "operators.h"
#include "row_part.cuh"

constexpr int staged_columns = 8192;  // of a sample, in shared memory; estimated, not measured: 32 KB
constexpr int side_by_side = 8;       // columns of a lane

__host__ __device__ constexpr int staged_fours(int D) { return D <= staged_columns ? ceil_div(D, 4) : 0; }

// A sample minus pre_bias, staged by the block that makes it where D is no larger than staged_columns. Nothing else may
// be read of it before the next barrier.
class Centred {
   public:
    const int D;

    __device__ Centred(const Matrix& x_, const Matrix& pre_bias_, int64_t n, int D_, float4* staged_)
        : D(D_), x(x_), pre_bias(pre_bias_), begin(n * x_.stride), staged(staged_) {
        if (!is_staged()) return;
        for (int d = threadIdx.x; d < D; d += blockDim.x) reinterpret_cast<float*>(staged)[d] = computed(d);
    }
    __device__ bool is_staged() const { return D <= staged_columns; }
    __device__ float operator[](int d) const {
        return is_staged() ? reinterpret_cast<const float*>(staged)[d] : computed(d);
    }
    // From column d on, a multiple of 4, where it is staged.
    __device__ const float4* fours(int d) const { return staged + unsigned(d) / 4; }

   private:
    Matrix x, pre_bias;
    int64_t begin;
    float4* staged;

    __device__ float computed(int d) const { return value_at(x, begin + d) - value_at(pre_bias, d); }
};

// row[0 ... 7], which begin at whole 16 bytes.
template <class Format>
__device__ void load_vectors(float (&values)[side_by_side], const typename Format::Word* row) {
    using Part = RowPart<Format>;
#pragma unroll
    for (int v = 0; v < side_by_side / Part::width; ++v) {
        const uint4 vector = __ldg(reinterpret_cast<const uint4*>(row) + v);
#pragma unroll
        for (int i = 0; i < Part::width; ++i) values[v * Part::width + i] = Part::in(vector, i);
    }
}

// Rounded once, by every compiler: values have the same bits wherever they are summed.
__device__ inline float multiply_add(float a, float b, float sum) { return __fmaf_rn(a, b, sum); }
__device__ inline double multiply_add(float a, float b, double sum) { return sum + double(a) * double(b); }

// The sum over a warp's lanes of one of these, which is row_of_lane<many>() in order; pairs of neighbours first.
template <class Sum, int many>
__device__ Sum sum_of_lanes(Sum (&parts)[many]) {
    const int lane = threadIdx.x % 32;
    int by = 1;
#pragma unroll
    for (int left = many / 2; left; left /= 2, by *= 2) {
        const bool is_upper = lane & by;
#pragma unroll
        for (int r = 0; r < left; ++r) {
            const Sum given = is_upper ? parts[r] : parts[r + left], kept = is_upper ? parts[r + left] : parts[r];
            parts[r] = kept + __shfl_xor_sync(all_lanes, given, by);
        }
    }
#pragma unroll
    for (; by < 32; by *= 2) parts[0] += __shfl_xor_sync(all_lanes, parts[0], by);
    return parts[0];
}

template <int many>
__device__ int row_of_lane() {
    static_assert(many == 2 || many == 4);
    const int lane = threadIdx.x % 32;
    return many == 2 ? lane % 2 : lane % 2 * 2 + lane / 2 % 2;
}

// The product of the columns begin ... end - 1 of a sample and of the lane's row of these rows of W; the order of a sum
// depends on end - begin alone.
template <class Format, class Sum, int many>
__device__ Sum dot(
    const Centred& sample, int begin, int end, const typename Format::Word* const (&rows)[many], bool in_vectors) {
    using Word = typename Format::Word;
    constexpr int step = 32 * side_by_side;
    Sum parts[many][side_by_side] = {};
    int d = begin + side_by_side * int(threadIdx.x % 32);
    if (in_vectors && begin % side_by_side == 0) {
        const float4* from = sample.fours(d);
        const Word* at[many];
#pragma unroll
        for (int r = 0; r < many; ++r) at[r] = rows[r] + d;
        for (; d + side_by_side <= end; d += step, from += step / 4) {
            const float4 a = from[0], b = from[1];
            const float x[] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
            for (int r = 0; r < many; ++r) {
                float w[side_by_side];
                load_vectors<Format>(w, at[r]);
                at[r] += step;
#pragma unroll
                for (int i = 0; i < side_by_side; ++i) parts[r][i] = multiply_add(w[i], x[i], parts[r][i]);
            }
        }
    }
    for (; d < end; d += step) {
#pragma unroll
        for (int i = 0; i < side_by_side; ++i) {
            if (d + i >= end) continue;
            const float x = sample[d + i];
#pragma unroll
            for (int r = 0; r < many; ++r) parts[r][i] = multiply_add(Format::value(rows[r][d + i]), x, parts[r][i]);
        }
    }
    __syncwarp();
    Sum sums[many];
#pragma unroll
    for (int r = 0; r < many; ++r) {
#pragma unroll
        for (int half = 1; half < side_by_side; half *= 2)
#pragma unroll
            for (int i = 0; i < side_by_side; i += 2 * half) parts[r][i] += parts[r][i + half];
        sums[r] = parts[r][0];
    }
    return sum_of_lanes(sums);
}

// Calls take(r, s, latent, product) for r < count and the streams first ... last - 1, all of a row in the same lane,
// where latent_of(r) is the row of W and begin_of(s) a stream's first column. Begins and ends with a barrier.
template <class Format, class Sum, class LatentOf, class BeginOf, class Take>
__device__ void multiply_rows(
    int count, LatentOf latent_of, int first, int last, BeginOf begin_of, const Centred& sample, const Matrix& W,
    Take take) {
    using Word = typename Format::Word;
    constexpr int many = sizeof(Word) == 2 && sizeof(Sum) == 4 ? 4 : 2;  // as registers allow
    const uintptr_t apart = uintptr_t(W.data) | uintptr_t(W.stride * sizeof(Word));
    const bool in_vectors = sample.is_staged() && apart % 16 == 0;
    __syncthreads();
    for (int begin = int(threadIdx.x / 32) * many; begin < count; begin += int(blockDim.x / 32) * many) {
        const Word* rows[many];
#pragma unroll
        for (int r = 0; r < many; ++r)
            rows[r] = static_cast<const Word*>(W.data) + int64_t(latent_of(smaller(begin + r, count - 1))) * W.stride;
        const int mine = begin + row_of_lane<many>();
        const bool takes = threadIdx.x % 32 < many && mine < count;
        const int latent = takes ? latent_of(mine) : 0;
        for (int s = first; s < last; ++s) {
            const Sum product = dot<Format, Sum, many>(sample, begin_of(s), begin_of(s + 1), rows, in_vectors);
            if (takes) take(mine, s, latent, product);
        }
    }
    __syncthreads();
}

__device__ inline auto begin_in(const Streams& streams) {
    return [&streams](int s) { return streams.begin[s]; };
}

__device__ inline void set_value(const Matrix& numbers, int64_t i, float value) {
    if (numbers.type == Floats::float32)
        static_cast<float*>(numbers.data)[i] = value;
    else
        static_cast<uint16_t*>(numbers.data)[i] =
            numbers.type == Floats::bfloat16 ? BFloat16::word(value) : Float16::word(value);
}

// relu(product + latent_bias[s, latent]) at this place of the values; NaN stays.
__device__ inline void activate(const Activations& to, int64_t place, int s, int latent, float product) {
    const float sum = product + value_at(to.latent_bias, s * to.latent_bias.stride + latent);
    set_value(to.values, place, sum <= 0 ? 0 : sum);
}

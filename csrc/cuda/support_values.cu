#include "gather.cuh"

// A block a sample, if there are not so many that blocks go on.
template <class Format>
__global__ void __launch_bounds__(128, 4) support_values_kernel(
    Operands operands, Streams streams, Activations to, Supports supports, int64_t N) {
    SharedMemory memory(shared_memory());
    float4* const staged = memory.take<float4>(staged_fours(operands.D));
    const int S = streams.count, k = supports.k;
    const int64_t count = supports.listed ? *supports.count : N;
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
        const int64_t n = supports.listed ? supports.listed[i] : i;
        const Centred sample(operands.x, operands.pre_bias, n, operands.D, staged);
        const int together = supports.per_stream ? 1 : S;  // streams of one support
        for (int first = 0; first < S; first += together) {
            const int32_t* const support = supports.indices + (supports.per_stream ? n * S + first : n) * k;
            const auto is_latent = [&](int latent) { return unsigned(latent) < unsigned(supports.L); };
            const auto latent_of = [&](int j) { return is_latent(support[j]) ? support[j] : 0; };
            const auto write = [&](int j, int s, int latent, float product) {
                const int64_t place = (n * S + s) * k + j;
                if (is_latent(support[j]))
                    activate(to, place, s, latent, product);
                else
                    set_value(to.values, place, 0);
            };
            multiply_rows<Format, float>(
                k, latent_of, first, first + together, begin_in(streams), sample, operands.W, write);
        }
    }
}

void support_values(
    Operands operands, const Streams& streams, Activations to, Supports supports, int64_t N, uintptr_t stream) {
    const auto kernel = operands.W.type == Floats::float32    ? support_values_kernel<Float32>
                        : operands.W.type == Floats::bfloat16 ? support_values_kernel<BFloat16>
                                                              : support_values_kernel<Float16>;
    SharedMemory memory;
    memory.take<float4>(staged_fours(operands.D));
    // estimated, not measured: those listed are none, nearly always, and then blocks only begin and end
    const int64_t blocks = supports.listed ? smaller<int64_t>(N, 512) : N;
    launch(kernel, blocks, 128, memory.bytes(), stream, operands, streams, to, supports, N);
}

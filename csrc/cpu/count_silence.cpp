// Samples since each latent last fired in any stream: 0 where it fired in this batch, else N more.
#include "level.h"
#include "operators.h"

template <class A>
static void mark_fired(std::vector<char>& fired, const Tensor& values, const Support& support) {
    for (int64_t n = 0; n < support.N; ++n)
        for (int64_t s = 0; s < support.S; ++s) {
            const A* value = values.at<const A>(n, s);
            const int32_t* latents = support.of(n, s);
            for (int64_t j = 0; j < support.k; ++j) fired[latents[j] + 1] |= value[j] > 0;
        }
}

void count_silence(Tensor silence_, Tensor values, Tensor indices) {
    const int64_t L = silence_.size[0];
    const Support support(indices, values.size[1], L);
    std::vector<char> fired(L + 1);  // of an empty slot, then of every latent
    if (values.item_size == 8) mark_fired<double>(fired, values, support);
    if (values.item_size == 4) mark_fired<float>(fired, values, support);
    int64_t* silence = silence_.at<int64_t>(0);
    for (int64_t l = 0; l < L; ++l) silence[l] = fired[l + 1] ? 0 : silence[l] + support.N;
}

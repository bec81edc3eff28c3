// Stochastic rounding to bfloat16, as sparc_fast/reference.py has it: rounding_noise and round_to_bfloat16.
namespace SIMD_LEVEL {

// Of one uint32_t or of a register of them.
template <class V>
INLINE V mix(V x, V key = V{}) {
    x = (x ^ x >> 16) * 0x85EBCA6Bu;
    x = (x ^ x >> 13 ^ key) * 0xC2B2AE35u;
    return x ^ x >> 16;
}

// What the words so far, of seed, step and row, have made of the hash.
struct Noise {
    uint32_t a = 0, b = 0;

    Noise then(uint32_t word) const {
        const uint32_t next = mix(a + word);
        return {next, mix(b ^ next)};
    }
    Noise from(int64_t column) const { return {a + uint32_t(column), b}; }

    // The 32 bits of columns d, d + 1, …
    INLINE Vec<uint32_t> at(int64_t d) const {
        Vec<uint32_t> lane;
        for (int i = 0; i < lanes<uint32_t>; ++i) lane[i] = i;
        return mix<Vec<uint32_t>>(lane + (a + uint32_t(d)), Vec<uint32_t>{} + b);
    }
};

constexpr uint32_t upper_half = 0xFFFF0000;

// One of the two bfloat16 beside v, for random bits in the lower halves.
INLINE Vec<float> rounded(Vec<float> v, Vec<uint32_t> random) {
    const auto bits = (Vec<uint32_t>)v, number = (Vec<uint32_t>)(v == v);
    return (Vec<float>)(((bits + (random & ~upper_half & number)) | (0x400000 & ~number)) & upper_half);
}

// The first n lanes of v, which bfloat16 holds.
INLINE void store_exact(bf16* p, Vec<float> v, int64_t n) {
    const auto bits = (Vec<uint32_t>)v >> 16;
    const auto narrow = __builtin_convertvector(bits, typename vector_of<uint16_t, VECTOR_BYTES / 2>::type);
    std::memcpy(p, &narrow, n >= lanes<float> ? sizeof narrow : n * sizeof(bf16));
}

}  // namespace SIMD_LEVEL

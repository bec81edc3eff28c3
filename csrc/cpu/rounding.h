// Stochastic rounding to bfloat16, as sparc_fast/ops/reference.py has it: rounding_noise and round_to_bfloat16.
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

// In the upper halves one of the two bfloat16 beside v, for random bits in the lower halves; NaN stays NaN.
INLINE Vec<uint32_t> rounded(Vec<float> v, Vec<uint32_t> random) {
    return v == v ? (Vec<uint32_t>)v + (random & 0xFFFF) : Vec<uint32_t>{} + 0x7FC00000;
}

INLINE Vec<float> upper_halves(Vec<uint32_t> bits) { return (Vec<float>)(bits & 0xFFFF0000); }

// The upper halves of the first n lanes.
INLINE void store_upper(bf16* p, Vec<uint32_t> bits, int64_t n) {
    const Halves halves = narrowed(bits >> 16);
    if (n >= lanes<float>) {
        std::memcpy(p, &halves, sizeof halves);
    } else {
        bf16 lane[lanes<float>];
        std::memcpy(lane, &halves, sizeof lane);
        for (int64_t i = 0; i < n; ++i) p[i] = lane[i];
    }
}

}  // namespace SIMD_LEVEL

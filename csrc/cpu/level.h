// Which instruction set runs: the best this machine has, or a lower one on request.
#pragma once

enum Level : int { level_baseline, level_avx2, level_avx512 };

int simd_level();
// Lowers or restores the level; never above what the machine has. Returns the level now in force.
int set_simd_level(int level);

#if defined(__x86_64__) && !defined(SPARC_FAST_BASELINE_ONLY)
#define SPARC_FAST_EVERY_LEVEL
#endif

// Calls the copy of a function template that was compiled for this machine.
#ifdef SPARC_FAST_EVERY_LEVEL
#define AT_SIMD_LEVEL(...)                                   \
    switch (simd_level()) {                                  \
        case level_avx512: return avx512::__VA_ARGS__;       \
        case level_avx2: return avx2::__VA_ARGS__;           \
        default: return baseline::__VA_ARGS__;               \
    }
#else
#define AT_SIMD_LEVEL(...) return baseline::__VA_ARGS__;
#endif

#include "level.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

static int best_level() {
#ifdef SPARC_FAST_EVERY_LEVEL
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return level_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return level_avx2;
#endif
    return level_baseline;
}

static int requested_level() {
    const char* name = std::getenv("SPARC_FAST_SIMD");
    if (name && !std::strcmp(name, "baseline")) return level_baseline;
    if (name && !std::strcmp(name, "avx2") && best_level() > level_avx2) return level_avx2;
    return best_level();
}

static std::atomic<int>& current_level() {
    static std::atomic<int> level{requested_level()};
    return level;
}

int simd_level() { return current_level(); }

int set_simd_level(int level) { return current_level() = std::min(level, best_level()); }

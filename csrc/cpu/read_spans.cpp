// Spans of a file, read in order; what is read is looked at at once, while it is in the second-level cache.
#ifndef SIMD_LEVEL
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>

#include "level.h"
#include "loader.h"
#define OPERATOR "read_spans.cpp"
#include "every_level.h"

constexpr int64_t looked_at_together = 1 << 18;  // bytes

static bool all_finite(const char* p, int64_t bytes, int64_t item_size, bool bfloat16) {
    if (item_size == 8) AT_SIMD_LEVEL(all_finite((const uint64_t*)p, bytes / 8, uint64_t(0x7ff) << 52))
    if (item_size == 4) AT_SIMD_LEVEL(all_finite((const uint32_t*)p, bytes / 4, uint32_t(0xff) << 23))
    AT_SIMD_LEVEL(all_finite((const uint16_t*)p, bytes / 2, uint16_t(bfloat16 ? 0x7f80 : 0x7c00)))
}

// The first number that is not finite of those in [begin, begin + bytes) of p, counted from p; -1 where there is none.
static int64_t first_not_finite(const char* p, int64_t begin, int64_t bytes, int64_t item_size, bool bfloat16) {
    if (all_finite(p + begin, bytes, item_size, bfloat16)) return -1;
    while (all_finite(p + begin, item_size, item_size, bfloat16)) begin += item_size;
    return begin / item_size;
}

int64_t first_not_finite(Tensor rows, bool bfloat16) {
    const int64_t bytes = rows.size[0] * rows.size[1] * rows.item_size;
    for (int64_t at = 0; at < bytes; at += looked_at_together) {
        const int64_t some = std::min(looked_at_together, bytes - at);
        const int64_t found = first_not_finite(rows.at<const char>(0), at, some, rows.item_size, bfloat16);
        if (found >= 0) return found;
    }
    return -1;
}

void will_need(int file, std::vector<int64_t> begins, std::vector<int64_t> lengths) {
#ifdef POSIX_FADV_WILLNEED
    for (size_t i = 0; i < begins.size(); ++i) posix_fadvise(file, begins[i], lengths[i], POSIX_FADV_WILLNEED);
#else
    (void)file, (void)begins, (void)lengths;
#endif
}

std::tuple<int64_t, int, int64_t> read_spans(
    int file, std::vector<int64_t> begins, std::vector<int64_t> lengths, Tensor out, bool bfloat16, bool look) {
    char* const target = out.at<char>(0);
    int64_t done = 0, looked = 0, room = out.bytes();
    if (begins.size() != lengths.size()) throw std::invalid_argument("read_spans: each span has a begin and a length");
    for (const int64_t length : lengths)
        if (length < 0 || (room -= length) < 0) throw std::out_of_range("read_spans: spans must fit in out");
    for (size_t i = 0; i < begins.size(); ++i)
        for (int64_t read = 0; read < lengths[i];) {
            const int64_t got =
                pread(file, target + done, std::min(looked_at_together, lengths[i] - read), begins[i] + read);
            if (got < 0 && errno == EINTR) continue;
            if (got <= 0) return {done, got < 0 ? errno : 0, -1};
            read += got, done += got;
            const int64_t whole = (done - looked) / out.item_size * out.item_size;
            if (look) {
                const int64_t found = first_not_finite(target, looked, whole, out.item_size, bfloat16);
                if (found >= 0) return {done, 0, found};
            }
            looked += whole;
        }
    return {done, 0, -1};
}
#else

namespace SIMD_LEVEL {

// No number has all the bits of the mask; without a branch, so that it is a few instructions a vector.
template <class Bits>
bool all_finite(const Bits* numbers, int64_t count, Bits mask) {
    Bits any = 0;
    for (int64_t i = 0; i < count; ++i) any |= Bits(-((numbers[i] & mask) == mask));
    return !any;
}

}  // namespace SIMD_LEVEL
#endif

#include "global_topk.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "invert_indices.h"
#include "level.h"
#include "parallel.h"
#include "topk_rows.h"

struct Squares {
    float row, rest;
};

// The latents a block of scores belongs to, and the norms of their rows.
struct Chunk {
    int64_t first, size;
    const float *norm, *residual;
};

// A cache line of a row of weights in float64.
struct alignas(64) Line {
    double lane[8];
};

#define OPERATOR "global_topk_kernel.h"
#include "every_level.h"

constexpr float infinity = std::numeric_limits<float>::infinity();
constexpr double largest_norm = 1e18;
// Of a batch, from which a first bound is guessed.
constexpr int64_t sampled_rows = 64;

template <class T>
static Squares squares(const T* w, int64_t D, bf16* copy) {
    AT_SIMD_LEVEL(measure_row(w, D, copy))
}

template <class T>
static void screen(Screen& screen, int64_t n, const T* scores, const Chunk& chunk, Above<float>& above,
                   std::vector<float>& lowers) {
    AT_SIMD_LEVEL(screen_row(screen, n, scores, chunk, above, lowers))
}

template <class T, class E>
static void exact_dots(
    const T* const* x, int64_t count, const E* w, int64_t D, const E* ahead, std::vector<Line>& wide, double* dots) {
    AT_SIMD_LEVEL(exact_dots(x, count, w, D, ahead, wide, dots))
}

template <class T>
static void lower_ends(const Screen& screen, int64_t n, const T* scores, const Chunk& chunk, float* lower) {
    AT_SIMD_LEVEL(lower_ends_of_row(screen, n, scores, chunk, lower))
}

// The k-th largest, or one of those up to the most-th.
static float kth_largest(const float* values, int64_t n, int64_t k, int64_t most) {
    AT_SIMD_LEVEL(kth_largest(values, n, k, most))
}

static float kth_largest(const float* values, int64_t n, int64_t k) { return kth_largest(values, n, k, k); }

// Calls f(begin, end) for the runs of at most `width` of [0, n).
template <class F>
static void parallel_runs(int64_t n, int64_t width, int threads, F f) {
    parallel_for((n + width - 1) / width, threads,
                 [&](int64_t task) { f(task * width, std::min(n, (task + 1) * width)); });
}

// At least the root of a sum of D squares that was taken in float32, in any order.
static float norm_above(float squares, int64_t D) {
    const double growth = 1 + std::ldexp(D + 32, -24), flushed = std::ldexp(std::sqrt(D), -63);
    const double norm = growth * (std::sqrt(double(squares)) * growth + flushed);
    return norm < largest_norm ? float(norm) : infinity;
}

void measure_rows(Tensor norm, Tensor residual, Tensor copy, Tensor w, int threads) {
    const int64_t D = w.size[1];
    const auto measure = [&](auto type) {
        parallel_runs(w.size[0], 16, threads, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) {
                bf16* const rounded = copy.data ? copy.at<bf16>(n) : nullptr;
                const auto [row, rest] = squares(w.at<const decltype(type)>(n), D, rounded);
                norm.at<float>(0)[n] = norm_above(row, D);
                residual.at<float>(0)[n] = norm_above(rest, D);
            }
        });
    };
    w.item_size == 2 ? measure(bf16{}) : measure(float{});
}

// scores[i] = h of the specification, of the row x[i] and the latent of the weights w.
template <class T, class E>
static void score_rows(
    const T* const* x, int64_t count, const E* w, const E* ahead, double bias, int64_t D, std::vector<Line>& wide,
    std::vector<double>& scores) {
    scores.resize(count);
    exact_dots(x, count, w, D, ahead, wide, scores.data());
    for (double& score : scores) score = T(score + bias);
}

void exact_scores(Tensor scores, Tensor x, Tensor W, Tensor bias, int threads) {
    const int64_t N = x.size[0], D = x.size[1];
    const auto score = [&](auto sum, auto type) {
        using T = decltype(sum);
        using E = decltype(type);
        std::vector<const T*> rows;
        for (int64_t n = 0; n < N; ++n) rows.push_back(x.at<const T>(n));
        parallel_runs(W.size[0], 32, threads, [&](int64_t begin, int64_t end) {
            std::vector<Line> wide;
            std::vector<double> column;
            for (int64_t l = begin; l < end; ++l) {
                const E *w = W.at<const E>(l), *ahead = W.at<const E>(std::min(l + 1, end - 1));
                score_rows(rows.data(), N, w, ahead, bias.at<const double>(0)[l], D, wide, column);
                for (int64_t n = 0; n < N; ++n) scores.at<T>(n)[l] = column[n];
            }
        });
    };
    if (x.item_size == 8) return score(double{}, double{});
    W.item_size == 2 ? score(float{}, bf16{}) : score(float{}, float{});
}

void support_scores(Tensor scores, Tensor x, Tensor W, Tensor bias, Tensor indices, int threads) {
    const int64_t N = x.size[0], D = x.size[1], k = indices.size[1];
    const Support support(indices, 1, W.size[0], 0);
    const auto score = [&](auto sum, auto type) {
        using T = decltype(sum);
        using E = decltype(type);
        parallel_runs(N, 8, threads, [&](int64_t begin, int64_t end) {
            std::vector<const E*> rows(k);
            std::vector<double> dots(k);
            std::vector<Line> wide;
            for (int64_t n = begin; n < end; ++n) {
                const int32_t* const latents = support.of(n, 0);
                for (int64_t j = 0; j < k; ++j) rows[j] = W.at<const E>(latents[j]);
                const T* const ahead = x.at<const T>(std::min(n + 1, N - 1));
                exact_dots(rows.data(), k, x.at<const T>(n), D, ahead, wide, dots.data());
                for (int64_t j = 0; j < k; ++j) {
                    const T rounded = T(dots[j] + bias.at<const double>(0)[latents[j]]);
                    scores.at<T>(n)[j] = std::isnan(rounded) ? std::numeric_limits<T>::infinity() : rounded + T(0);
                }
            }
        });
    };
    if (x.item_size == 8) return score(double{}, double{});
    W.item_size == 2 ? score(float{}, bf16{}) : score(float{}, float{});
}

bool has_bf16_products() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

Screen::Screen(
    Tensor norm, Tensor residual, Tensor bias_, int64_t D, int64_t k_, int64_t capacity_, bool narrow_scores,
    Among among_, float least_, float sure_)
    : N(norm.size[0]),
      L(bias_.size[0]),
      k(k_),
      capacity(capacity_),
      among(among_),
      least(least_),
      sure(std::max(least_, sure_)),
      c(std::ldexp(1.f, -22) + (narrow_scores ? std::ldexp(1.f, -8) : 0.f)),
      p(N),
      q(N),
      bias(L),
      slack(L),
      exact_bias(bias_.at<const double>(0), bias_.at<const double>(0) + L),
      threshold(N, least_),
      count(N),
      lower(N * capacity),
      upper(N * capacity),
      latent(N * capacity) {
    const double Du = std::ldexp(D, -23), gamma = Du < 1 ? Du / (1 - Du) : infinity, grow = 1 + std::ldexp(1, -20);
    for (int64_t n = 0; n < N; ++n) {
        const double rest = residual.at<const float>(0)[n], copy = norm.at<const float>(0)[n] + rest;
        p[n] = (rest + gamma * copy) * grow;
        q[n] = (1 + gamma) * copy * grow;
        count[n] = std::isfinite(p[n]) && std::isfinite(q[n]) ? 0 : -1;
    }
    for (int64_t l = 0; l < L; ++l) {
        const double b = exact_bias[l];
        const bool bounded = std::abs(b) < largest_norm;
        bias[l] = bounded || std::isinf(b) ? float(b) : NAN;
        slack[l] = std::ldexp(4 * (D + 8), -126) + (bounded ? std::ldexp(std::abs(b), -22) : 0);
    }
}

void Screen::filter(Tensor scores, int64_t first, Tensor norm, Tensor residual, int threads) {
    if (first < 0 || scores.size[1] > L - first) throw std::invalid_argument("filter: scores must be of latents there are");
    const Chunk chunk{first, scores.size[1], norm.at<const float>(0), residual.at<const float>(0)};
    const auto take = [&](auto type) {
        using T = const decltype(type);
        const auto screen_all = [&] {
            parallel_runs(N, 8, threads, [&](int64_t begin, int64_t end) {
                Above<float> above;
                std::vector<float> lowers;
                for (int64_t n = begin; n < end; ++n) screen(*this, n, scores.at<T>(n), chunk, above, lowers);
            });
        };
        if (among != Among::batch || first > 0 || chunk.size < k) return screen_all();
        const int64_t given = std::min<int64_t>(N, sampled_rows);
        std::vector<float> lowers(given * chunk.size);
        for (int64_t i = 0; i < given; ++i)
            lower_ends(*this, i * N / given, scores.at<T>(i * N / given), chunk, &lowers[i * chunk.size]);
        // a guess is a bound once k N lower ends were seen to reach it
        const std::vector<int64_t> before = count;
        for (int64_t rank = given * k / 2 * 3;; rank *= 2) {
            const bool all = rank >= int64_t(lowers.size());
            const float guess = all ? -infinity : kth_largest(lowers.data(), lowers.size(), rank, rank + rank / 8);
            std::fill(threshold.begin(), threshold.end(), guess);
            screen_all();
            if (all || number_reaching(guess) >= N * k) return;
            count = before;
        }
    };
    scores.item_size == 2 ? take(bf16{}) : take(float{});
    if (among == Among::batch) bound_batch(N * k + N * k / 64, threads);
}

int64_t Screen::number_reaching(float end) const {
    int64_t found = 0;
    for (int64_t n = 0; n < N; ++n) {
        const float* const low = &lower[n * capacity];
        found += std::count_if(low, low + std::max<int64_t>(count[n], 0), [&](float low) { return low >= end; });
    }
    return found;
}

// Raises the threshold of all rows to a lower end that k N of these reach, and at most so many; drops what is below.
void Screen::bound_batch(int64_t at_most, int threads) {
    const std::vector<float> all = of_candidates(threads, [&](int64_t place) { return lower[place]; });
    if (N == 0 || int64_t(all.size()) < N * k) return;
    const float kth = kth_largest(all.data(), all.size(), N * k, at_most);
    parallel_runs(N, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            threshold[n] = std::max(threshold[n], kth);
            drop_below(n);
        }
    });
}

// f(place, i) for every candidate, the i-th of all, row by row.
template <class F>
void Screen::each_candidate(int threads, F f) const {
    std::vector<int64_t> offsets(N + 1);
    for (int64_t n = 0; n < N; ++n) offsets[n + 1] = offsets[n] + std::max<int64_t>(count[n], 0);
    parallel_runs(N, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n)
            for (int64_t i = offsets[n]; i < offsets[n + 1]; ++i) f(n * capacity + i - offsets[n], i);
    });
}

// value(place) of every candidate, row by row.
template <class F>
std::vector<float> Screen::of_candidates(int threads, F value) const {
    int64_t all = 0;
    for (const int64_t of_row : count) all += std::max<int64_t>(of_row, 0);
    std::vector<float> values(all);
    each_candidate(threads, [&](int64_t place, int64_t i) { values[i] = value(place); });
    return values;
}

void Screen::prune(int64_t n) {
    const float* low = &lower[n * capacity];
    if (among == Among::row && count[n] >= k) threshold[n] = std::max(threshold[n], kth_largest(low, count[n], k));
    drop_below(n);
}

void Screen::drop_below(int64_t n) {
    if (count[n] < 0) return;
    float *low = &lower[n * capacity], *high = &upper[n * capacity];
    int32_t* latents = &latent[n * capacity];
    int64_t kept = 0;
    for (int64_t i = 0; i < count[n]; ++i) {
        low[kept] = low[i], high[kept] = high[i], latents[kept] = latents[i];
        kept += high[i] >= threshold[n];
    }
    count[n] = kept;
}

bool Screen::compact(int64_t n) {
    prune(n);
    // little room gained would mean to come back at once
    if (count[n] > capacity / 4 * 3) count[n] = -1;
    return count[n] >= 0;
}

// Marks the candidates that may lie on either side of what is probably the k-th score. With their scores the threshold
// comes close to it from below, and the ends of all other intervals are on one side: few remain ambiguous.
void Screen::mark_near_kth(int64_t n, std::vector<float>& centres) {
    if (count[n] <= k) return;
    float *low = &lower[n * capacity], *high = &upper[n * capacity];
    centres.resize(count[n]);
    for (int64_t i = 0; i < count[n]; ++i) centres[i] = high[i] < infinity ? low[i] / 2 + high[i] / 2 : low[i];
    const float kth = kth_largest(centres.data(), count[n], k);
    for (int64_t i = 0; i < count[n]; ++i)
        low[i] = ((low[i] < kth) & (high[i] > kth)) ? NAN : low[i];
}

// Marks the ambiguous, and raises those certainly in the support above all others.
void Screen::mark_ambiguous(int64_t n) {
    if (count[n] < 0) return;
    prune(n);
    float *low = &lower[n * capacity], *high = &upper[n * capacity];
    const bool all = count[n] == k;
    const float rival = all ? -infinity : kth_largest(high, count[n], k + 1);
    for (int64_t i = 0; i < count[n]; ++i)
        low[i] = (all | (low[i] > rival)) ? infinity : low[i] < high[i] ? NAN : low[i];
}

// Narrows the marked intervals to the score. By latent, so that a row of W is read once for all rows of x.
void Screen::score_marked(Tensor x, Tensor W, int threads) {
    std::vector<int64_t> places;
    std::vector<int32_t> latents;
    for (int64_t n = 0; n < N; ++n) {
        for (int64_t place = n * capacity; place < n * capacity + count[n]; ++place) {
            if (std::isnan(lower[place])) places.push_back(place), latents.push_back(latent[place]);
        }
    }
    const int64_t D = x.size[1];
    std::vector<int64_t> offsets(L + 1), entries(places.size());
    invert_indices(latents.data(), latents.size(), L, offsets.data(), entries.data());
    const auto score = [&](auto type) {
        using E = decltype(type);
        parallel_runs(L, 32, threads, [&](int64_t begin, int64_t end) {
            std::vector<Line> wide;
            std::vector<double> scores;
            std::vector<const float*> rows;
            std::vector<int64_t> used;
            for (int64_t l = begin; l < end; ++l)
                if (offsets[l] < offsets[l + 1]) used.push_back(l);
            for (int64_t e = offsets[begin]; e < offsets[end]; ++e)
                rows.push_back(x.at<const float>(places[entries[e]] / capacity));
            for (size_t u = 0; u < used.size(); ++u) {
                const int64_t l = used[u], first = offsets[l], many = offsets[l + 1] - first;
                const E *w = W.at<const E>(l), *ahead = W.at<const E>(used[std::min(u + 1, used.size() - 1)]);
                score_rows(rows.data() + (first - offsets[begin]), many, w, ahead, exact_bias[l], D, wide, scores);
                for (int64_t i = 0; i < many; ++i) {
                    const int64_t place = places[entries[first + i]];
                    lower[place] = upper[place] = std::isnan(scores[i]) ? infinity : float(scores[i]);
                }
            }
        });
    };
    W.item_size == 2 ? score(bf16{}) : score(float{});
}

void Screen::choose(int64_t n, int32_t* indices, float* scores) const {
    const float* score = &lower[n * capacity];
    const float kth = kth_largest(score, count[n], k);
    int64_t room = k - std::count_if(score, score + count[n], [&](float s) { return s > kth; });
    for (int64_t i = 0; i < count[n]; ++i) {
        if (score[i] > kth || (score[i] == kth && room-- > 0)) {
            *indices++ = latent[n * capacity + i];
            if (scores) *scores++ = score[i] + 0.f;
        }
    }
}

void Screen::settle(Tensor indices, Tensor given_up, Tensor x, Tensor W, int threads) {
    const auto each_row = [&](auto f) {
        parallel_runs(N, 8, threads, [&](int64_t begin, int64_t end) {
            std::vector<float> centres;
            for (int64_t n = begin; n < end; ++n) f(n, centres);
        });
    };
    each_row([&](int64_t n, std::vector<float>& centres) { mark_near_kth(n, centres); });
    score_marked(x, W, threads);
    each_row([&](int64_t n, std::vector<float>&) { mark_ambiguous(n); });
    score_marked(x, W, threads);
    each_row([&](int64_t n, std::vector<float>&) {
        given_up.at<uint8_t>(0)[n] = count[n] < 0;
        if (count[n] >= 0) choose(n, indices.at<int32_t>(n));
    });
}

void Screen::best_ends(Tensor ends, int threads) {
    if (among != Among::row) throw std::invalid_argument("best_ends: the k must be each row's");
    parallel_runs(N, 8, threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
            if (count[n] > 0) prune(n);
            float *const first = ends.at<float>(n), *const last = first + k;
            const float *const low = &lower[n * capacity], *const low_end = low + std::max<int64_t>(count[n], 0);
            float* const filled = count[n] <= k ? std::copy(low, low_end, first)
                : std::copy_if(low, low_end, first, [&](float l) { return l > threshold[n]; });
            std::fill(filled, last, count[n] < k ? -infinity : threshold[n]);
        }
    });
}

void Screen::settle_among(
    Tensor indices, Tensor scores, Tensor given_up, Tensor ends, int64_t k_all, Tensor x, Tensor W, int threads) {
    if (among != Among::row) throw std::invalid_argument("settle_among: the k must be each row's");
    if (k_all < k || k_all > ends.size[1])
        throw std::out_of_range("settle_among: k_all must lie in k ... the number of ends of a row");
    const auto each_row = [&](auto f) {
        parallel_runs(N, 8, threads, [&](int64_t begin, int64_t end) {
            for (int64_t n = begin; n < end; ++n) f(n);
        });
    };
    each_row([&](int64_t n) {
        if (count[n] < 0) return;
        threshold[n] = std::max(threshold[n], kth_largest(ends.at<const float>(n), ends.size[1], k_all));
        drop_below(n);
        std::fill_n(&lower[n * capacity], count[n], NAN);
    });
    score_marked(x, W, threads);
    each_row([&](int64_t n) {
        given_up.at<uint8_t>(0)[n] = count[n] < 0;
        if (count[n] < 0) return;
        const int64_t found = std::min(k, count[n]);
        if (found == k) return choose(n, indices.at<int32_t>(n), scores.at<float>(n));
        std::copy_n(&latent[n * capacity], found, indices.at<int32_t>(n));
        std::transform(&lower[n * capacity], &lower[n * capacity] + found, scores.at<float>(n),
                       [](float score) { return score + 0.f; });
        std::fill_n(indices.at<int32_t>(n) + found, k - found, -1);
        std::fill_n(scores.at<float>(n) + found, k - found, -infinity);
    });
}

// Keeps the candidates that were chosen, by place.
template <class F>
void Screen::keep(int64_t n, F chosen) {
    int64_t kept = n * capacity;
    for (int64_t place = n * capacity; place < n * capacity + count[n]; ++place) {
        const bool is_chosen = chosen(place);
        latent[kept] = latent[place], lower[kept] = lower[place];
        kept += is_chosen;
    }
    count[n] = kept - n * capacity;
}

void Screen::settle_batch(Tensor x, Tensor W, int threads) {
    const int64_t room = N * k;
    const auto kth = [&](const std::vector<float>& values, int64_t rank) {
        return rank <= int64_t(values.size()) ? kth_largest(values.data(), values.size(), rank) : -infinity;
    };
    bound_batch(room, threads);
    // as mark_near_kth and mark_ambiguous, of all rows together
    const float centre = kth(of_candidates(threads, [&](int64_t place) {
        return upper[place] < infinity ? lower[place] / 2 + upper[place] / 2 : lower[place];
    }), room);
    each_candidate(threads, [&](int64_t place, int64_t) {
        if (lower[place] < centre && upper[place] > centre) lower[place] = NAN;
    });
    score_marked(x, W, threads);
    bound_batch(room, threads);
    const float rival = kth(of_candidates(threads, [&](int64_t place) { return upper[place]; }), room + 1);
    each_candidate(threads, [&](int64_t place, int64_t) {
        lower[place] = lower[place] > rival ? infinity : lower[place] < upper[place] ? NAN : lower[place];
    });
    score_marked(x, W, threads);
    const std::vector<float> scores = of_candidates(threads, [&](int64_t place) { return lower[place]; });
    const float last = kth(scores, room);
    int64_t ties = room - std::count_if(scores.begin(), scores.end(), [&](float s) { return s > last; });
    for (int64_t n = 0; n < N; ++n)
        keep(n, [&](int64_t place) { return lower[place] > last || (lower[place] == last && ties-- > 0); });
}

void Screen::settle_above(Tensor x, Tensor W, int threads) {
    each_candidate(threads, [&](int64_t place, int64_t) {
        if (lower[place] <= sure && upper[place] > least) lower[place] = NAN;
    });
    score_marked(x, W, threads);
    parallel_runs(N, 64, threads, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) keep(n, [&](int64_t place) { return lower[place] > least; });
    });
}

int64_t Screen::settle_ragged(Tensor x, Tensor W, int threads) {
    if (among == Among::row) throw std::invalid_argument("settle_ragged: each row's k are no ragged support");
    if (std::any_of(count.begin(), count.end(), [](int64_t c) { return c < 0; })) return -1;
    among == Among::batch ? settle_batch(x, W, threads) : settle_above(x, W, threads);
    return N ? *std::max_element(count.begin(), count.end()) : 0;
}

void Screen::check_room(const Tensor& result, const std::string& name) const {
    for (const int64_t of_row : count)
        if (of_row < 0 || of_row > result.size[1])
            throw std::out_of_range(name + " must have room for the largest support");
}

void Screen::write(Tensor indices) {
    check_room(indices, "write: indices");
    for (int64_t n = 0; n < N; ++n) {
        const int32_t* const of_row = &latent[n * capacity];
        int32_t* const end = std::copy(of_row, of_row + count[n], indices.at<int32_t>(n));
        std::fill(end, indices.at<int32_t>(n) + indices.size[1], -1);
    }
}

void Screen::write_scores(Tensor scores) {
    check_room(scores, "write_scores: scores");
    for (int64_t n = 0; n < N; ++n)
        for (int64_t j = 0; j < scores.size[1]; ++j) {
            const float score = j < count[n] ? lower[n * capacity + j] : -infinity;
            scores.at<float>(n)[j] = score > sure ? infinity : score + 0.f;
        }
}

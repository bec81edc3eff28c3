// The support of global_topk, proven from approximate scores.
//
// Let h = x.w + b exactly, and a the product of a GEMM over X and W, float32 or bfloat16 copies of x and w. Then
//     |a + b - h| <= E = p ||w|| + q ||w - W|| + c |a| + s,   p = ||x - X|| + gamma ||X||,   q = (1 + gamma) ||X||:
//   x.w - X.W = (x - X).w + X.(w - W)           by Cauchy-Schwarz, at most ||x - X|| ||w|| + ||X|| ||w - W||;
//   the GEMM sums D products in any order       gamma ||X|| ||W||,  gamma = D u / (1 - D u),  u = 2^-23: twice the unit
//                                               roundoff, for hardware that truncates, and far above what the float64
//                                               sum of the specification adds;  ||W|| <= ||w|| + ||w - W||;
//   the GEMM stores bfloat16                    c = 2^-8, float32: c = 0;
//   a + b, b and E are rounded to float32       c += 2^-22,  s = 2^-22 |b|,  p and q grow by 2^-20;
//   products, inputs may flush to zero          s += 4 (D + 8) 2^-126, and 2^-63 sqrt(D) on every norm.
// Norms are measured, and rounded up. One above 10^18 counts as infinite: no sum that is bounded can overflow. An
// infinite or NaN E makes the interval [-inf, inf]. Rounding is monotone, so [a + b - E, a + b + E] also holds the
// rounded score, and disjoint intervals are strictly in the order of these: ties occur only where intervals touch.
//
// A row's threshold is the k-th largest lower end seen so far: a latent whose upper end is below it is not in the
// support. What survives is a candidate. In the end, those whose lower end is above all but k upper ends are in the
// support; the others, the ambiguous, are scored as the specification does, which makes their interval a point, and
// ranked by (score, lower latent). A score depends on nothing but sample and latent, not even the instruction set.
// A row whose candidates do not fit is given up and reported, never cut short.
//
// Two other rules are proven in the same way. BatchTopK: the k N largest scores of all rows, which the k N-th largest
// lower end of all rows bounds. Latents above a threshold: that is the bound from the beginning.
#pragma once
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "scratch.h"
#include "tensor.h"

// For each row of w (float32 or bfloat16): norm >= ||w||, residual >= ||w - copy||, where copy = bfloat16(w);
// where copy has no data, the GEMM reads w itself.
void measure_rows(Tensor norm, Tensor residual, Tensor copy, Tensor w, int threads);

// scores[n, l] = the score of the specification. x and scores are in the type of the sums.
void exact_scores(Tensor scores, Tensor x, Tensor W, Tensor bias, int threads);

// scores[n, j] = the same of latent indices[n, j] alone, as ranked: NaN is +inf, and a zero is +0.
void support_scores(Tensor scores, Tensor x, Tensor W, Tensor bias, Tensor indices, int threads);

// Whether the machine multiplies bfloat16 faster than float32.
bool has_bf16_products();

// Whose k N largest scores are looked for: each row's k, the batch's, or all above a threshold, some k a row.
enum class Among { row, batch, above };

// The candidates of each row of x, while chunks of scores pass by.
class Screen {
public:
    // norm and residual are those of the rows of x, bias [L] is float64; `capacity` is the room for a row's candidates.
    Screen(Tensor norm, Tensor residual, Tensor bias, int64_t D, int64_t k, int64_t capacity, bool narrow_scores,
           Among among = Among::row, float least = -std::numeric_limits<float>::infinity(),
           float sure = -std::numeric_limits<float>::infinity());

    // Takes in scores [N, m] of latents first ... first + m - 1, whose rows have this norm and residual.
    // Chunks come in the order of latents.
    void filter(Tensor scores, int64_t first, Tensor norm, Tensor residual, int threads);

    // Writes the support of each row into indices, or 1 into given_up.
    void settle(Tensor indices, Tensor given_up, Tensor x, Tensor W, int threads);

    // Where others hold further latents of the same rows: ends[n] = the k largest lower ends of row n, in no order, -inf
    // where there are fewer; and from all that hold some, ends [N, m], of which k_all are looked for: the k best
    // latents that may be among these, with their scores as ranked, and -1 and -inf for the rest.
    void best_ends(Tensor ends, int threads);
    void settle_among(Tensor indices, Tensor scores, Tensor given_up, Tensor ends, int64_t k_all, Tensor x, Tensor W,
                      int threads);

    // The same where rows have as many latents as they have. The most that one has, or -1 if a row was given up; then
    // `write` fills indices, the rest of a row with -1.
    int64_t settle_ragged(Tensor x, Tensor W, int threads);
    void write(Tensor indices);
    // The scores of these where they are at most `sure`, infinity where they are above, and -infinity in empty slots.
    void write_scores(Tensor scores);

    // Raises the threshold of a row whose room is used up and drops what is below it; false if the row is given up.
    bool compact(int64_t n);

    const int64_t N, L, k, capacity;
    const Among among;
    const float least, sure;                // what scores must be above; above what nobody asks how large they are
    float c;
    std::vector<float> p, q, bias, slack;   // [N], [N], [L], [L]
    std::vector<double> exact_bias;         // [L]
    std::vector<float> threshold;           // [N]
    std::vector<int64_t> count;             // [N], -1: given up
    Scratch<float> lower, upper;            // [N, capacity]
    Scratch<int32_t> latent;                // [N, capacity], ascending

private:
    void check_room(const Tensor& result, const std::string& name) const;
    void prune(int64_t n);
    void drop_below(int64_t n);
    int64_t number_reaching(float end) const;
    void bound_batch(int64_t at_most, int threads);
    template <class F>
    void each_candidate(int threads, F f) const;
    template <class F>
    std::vector<float> of_candidates(int threads, F value) const;
    void mark_near_kth(int64_t n, std::vector<float>& centres);
    void settle_batch(Tensor x, Tensor W, int threads);
    void settle_above(Tensor x, Tensor W, int threads);
    template <class F>
    void keep(int64_t n, F chosen);
    void mark_ambiguous(int64_t n);
    void score_marked(Tensor x, Tensor W, int threads);
    void choose(int64_t n, int32_t* indices, float* scores = nullptr) const;
};

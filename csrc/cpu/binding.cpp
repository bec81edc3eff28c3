// sparc_fast._cpu: the operators of the CPU backend. sparc_fast/ops/cpu.py prepares what it passes; nothing of torch.
#include <memory>
#include <stdexcept>

#include "../arguments/python.h"
#include "global_topk.h"
#include "huge_pages.h"
#include "lent_memory.h"
#include "level.h"
#include "loader.h"
#include "operators.h"
#include "scratch.h"
#include "topk_rows.h"

namespace py = pybind11;

// What the arguments that are no tensors are made of.
static void add_parts(Arguments& arguments, const Batch& b) {
    for (const Tensor& tensor : {b.x, b.pre_bias, b.values, b.grad_values, b.grad_recons, b.offsets, b.entries})
        arguments.add(tensor);
    arguments.add(b.d_streams);
}

static void add_parts(Arguments& arguments, const Gradients& g) {
    for (const Tensor& tensor : {g.W_enc, g.W_dec, g.used}) arguments.add(tensor);
    arguments.add(g.d_streams);
}

static void add_parts(Arguments&, const AdamStep&) {}

static std::unique_ptr<Screen> make_screen(
    Tensor norm, Tensor residual, Tensor bias, int64_t D, int64_t k, int64_t capacity, bool narrow_scores, Among among,
    float least, float sure) {
    static const Signature signature("Screen", "norm:f32[N] residual:f32[N] bias:f64[L] #D #k #capacity");
    signature.check(Arguments(norm, residual, bias, D, k, capacity));
    const int64_t L = bias.size[0];
    if (k < 1 || k > L || capacity < k + 64 || capacity > L + 64)
        throw std::out_of_range("Screen: k must lie in 1 ... n_latents, and capacity in k + 64 ... n_latents + 64");
    return std::make_unique<Screen>(norm, residual, bias, D, k, capacity, narrow_scores, among, least, sure);
}

// As `define`, of a method.
template <class R, class... Args>
static void define(py::class_<Screen>& screens, const char* name, R (Screen::*method)(Args...), const char* words) {
    const auto checked = [method, signature = Signature(name, words)](Screen& screen, Args... args) {
        signature.check(Arguments(args...), {{"N", screen.N}, {"k", screen.k}, {"L", screen.L}});
        return (screen.*method)(std::move(args)...);
    };
    screens.def(name, checked, py::call_guard<py::gil_scoped_release>());
}

#define SUPPORT "indices:i32![N,k|N,S,k] "
#define ROWS ">W_enc:A[L,D]? >W_dec:A[L,D]? >exp_avg_enc:M[L,D]? >exp_avg_sq_enc:M[L,D]? >exp_avg_dec:M[L,D]? " \
    ">exp_avg_sq_dec:M[L,D]? >copy_enc:bf16[L,D]? >copy_dec:bf16[L,D]? >last_step:i64[L]? "
#define INVERSE "offsets:i64[L+1] entries:i64[E] "

PYBIND11_MODULE(_cpu, m) {
    // with the tensors whose addresses they hold
    py::class_<Batch>(m, "Batch")
        .def(py::init<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Widths>(), py::keep_alive<1, 2>(),
             py::keep_alive<1, 3>(), py::keep_alive<1, 4>(), py::keep_alive<1, 5>(), py::keep_alive<1, 6>(),
             py::keep_alive<1, 7>(), py::keep_alive<1, 8>());
    py::class_<Gradients>(m, "Gradients")
        .def(py::init<Tensor, Tensor, Tensor, Widths>(), py::keep_alive<1, 2>(), py::keep_alive<1, 3>(),
             py::keep_alive<1, 4>());
    py::class_<AdamStep>(m, "AdamStep").def(py::init<double, double, double, double, int64_t, uint64_t>());
    define(m, "support_values", support_values,
           ">values:A[N,S,k] x:T[N,D] W_enc:T[L,D] pre_bias:A[D] latent_bias:A[S,L] " SUPPORT "streams");
    define(m, "support_values_grad_x", support_values_grad_x,
           ">grad_x:T[N,D] grad_values:A[N,S,k] values:A[N,S,k] " SUPPORT "W_enc:T[L,D] streams");
    define(m, "sparse_decode", sparse_decode,
           ">recons:M[N,S,D] values:A[N,S,k] " SUPPORT "W_dec:T[L,D] pre_bias:A[D]");
    define(m, "sparse_decode_grad_values", sparse_decode_grad_values,
           ">grad_values:A[N,S,k] grad_recons:T[N,S,D] " SUPPORT "W_dec:T[L,D]");
    define(m, "decode_loss", decode_loss,
           ">nmse:A[S,S] >grad_recons:T[N,S,D] >grad_values:A[N,S,k] >grad_pre_bias:A[D] values:A[N,S,k] " SUPPORT
           "W_dec:T[L,D] pre_bias:A[D] target:T[N,D] scale:A[N,S] streams");
    define(m, "nested_decode_loss", nested_decode_loss,  // Q = P S, M = P N
           ">nmse:A[Q,S] >grad_recons:T[M,S,D] >grad_values:A[N,S,k] >grad_pre_bias:A[D] values:A[N,S,k] " SUPPORT
           "W_dec:T[L,D] pre_bias:A[D] target:T[N,D] scale:A[N,S] sizes:i64[P] streams");
    define(m, "invert_indices", py::overload_cast<Tensor, Tensor, Tensor, int64_t>(invert_indices),
           ">offsets:i64[L+1] >entries:i64[E] " SUPPORT "#L");
    // R streams of values: where only the decoder is asked for, or moves, its columns need not be theirs
    define(m, "weight_gradients", weight_gradients,
           ">grad_W_enc:A[L,D]? >grad_W_dec:A[L,D]? >grad_latent_bias:A[S,L]? x:T[N,D]? pre_bias:A[D]? "
           "values:A[N,R,k] grad_values:A[N,R,k]? grad_recons:T[N,R,D]? " INVERSE "streams");
    define(m, "gradient_squares", gradient_squares,
           ">squares:f64![L] >grad_latent_bias:A[S,L]? x:T[N,D]? pre_bias:A[D]? values:A[N,R,k] grad_values:A[N,R,k]? "
           "grad_recons:T[N,R,D]? " INVERSE "streams");
    define(m, "update_rows", update_rows,
           ">grad_latent_bias:A[S,L]? >grad_pre_bias:A[D]? " ROWS
           "x:T[N,D]? pre_bias:A[D]? values:A[N,R,k] grad_values:A[N,R,k]? grad_recons:T[N,R,D]? " INVERSE "streams");
    define(m, "step_rows", step_rows, ROWS "grad_W_enc:A[L,D]? grad_W_dec:A[L,D]? used:bool[L] streams");
    define(m, "replay_rows", replay_rows,
           ">W_dec:A[L,D] >exp_avg:M[L,D] >exp_avg_sq:M[L,D] >copy:bf16[L,D]? latents:i64[R] >last_step:i64[L] "
           "history:f64[H,4] streams");
    define(m, "count_silence", count_silence, ">silence:i64[L] values:A[N,S,k] " SUPPORT);
    define(m, "count_nearer", count_nearer,
           ">own:f32![Q] >higher:i64![Q] >equal:i64![Q] query_offsets:i64![Q+1] query_latents:i32![F] "
           "query_values:f32![F] offsets:i64![N+1] latents:i32![E] values:f32![E] first:i64![Q] last:i64![Q] #L");
    py::enum_<Among>(m, "Among").value("row", Among::row).value("batch", Among::batch).value("above", Among::above);
    define(m, "find_nearest", find_nearest,
           ">candidates:i64![Q,t] >cosines:f32![Q,t] query_offsets:i64![Q+1] query_latents:i32![F] query_values:f32![F] "
           "offsets:i64![N+1] latents:i32![E] values:f32![E] #L");
    auto screens = py::class_<Screen>(m, "Screen").def(py::init(&make_screen));
    define(screens, "filter", &Screen::filter, "scores:T[N,m] norm:f32[m] residual:f32[m]");
    define(screens, "settle", &Screen::settle, ">indices:i32[N,k] >given_up:bool[N] x:f32[N,D] W:T[L,D]");
    define(screens, "best_ends", &Screen::best_ends, ">ends:f32[N,k]");
    define(screens, "settle_among", &Screen::settle_among,
           ">indices:i32[N,k] >scores:f32[N,k] >given_up:bool[N] ends:f32[N,m] #k_all x:f32[N,D] W:T[L,D]");
    define(screens, "settle_ragged", &Screen::settle_ragged, "x:f32[N,D] W:T[L,D]");
    define(screens, "write", &Screen::write, ">indices:i32[N,w]");
    define(screens, "write_scores", &Screen::write_scores, ">scores:f32[N,w]");
    define(m, "exact_scores", exact_scores, ">scores:A[N,L] x:A[N,D] W:T[L,D] bias:f64[L]");
    define(m, "support_scores", support_scores, ">scores:A[N,k] x:A[N,D] W:T[L,D] bias:f64[L] indices:i32![N,k]");
    define(m, "measure_rows", measure_rows, ">norm:f32[n] >residual:f32[n] >copy:bf16[n,D]? w:T[n,D]");
    define(m, "topk_rows", topk_rows, ">indices:i32[N,k] scores:A[N,L] #k");
    define(m, "first_not_finite", py::overload_cast<Tensor, bool>(first_not_finite), "rows:any![n,D]");
    define(m, "will_need", will_need, "");
    define(m, "read_spans", read_spans, ">out:any![n,D]");
    define(m, "gather_rows", gather_rows, ">out:any[n,D] buffer:any[m,D] rows:i64[n]");
    define(m, "prefer_huge_pages", prefer_huge_pages, "tensor:any![a|a,b|a,b,c]");
    py::class_<LentMemory>(m, "LentMemory", py::buffer_protocol())
        .def(py::init<size_t, bool>())
        .def_buffer([](LentMemory& memory) {
            return py::buffer_info(static_cast<uint8_t*>(memory.data()), py::ssize_t(memory.size()));
        });
    m.def("let_memory_go", let_memory_go);
    m.attr("SPARE_MEMORY") = spare_memory;
    m.attr("STRIP_WIDTH") = strip_width;
    m.attr("RUN_BYTES") = run_bytes;
    m.attr("BLOCK_SAMPLES") = block_samples;
    m.def("has_bf16_products", has_bf16_products);
    m.def("simd_level", simd_level);
    m.def("set_simd_level", set_simd_level);
}

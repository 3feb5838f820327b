// Python bindings of the ops; those of the models are in bindings_models.cpp.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "attention.hpp"
#include "lora.hpp"
#include "parallel.hpp"
#include "returns.hpp"
#include "sampling.hpp"
#include "tensors.hpp"
#include "vocabulary.hpp"

namespace py = pybind11;
using namespace fastguide;
using std::int32_t, std::int64_t;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native CPU ops of fastguide; use them through fastguide.kernels.";
  module.attr("has_openmp") = has_openmp;
  module.def("supported", [](int isa) { return supported(static_cast<Isa>(isa)); });

  module.def("topk_logsumexp",
             [](Array<void> logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                Array<float> inv_temperature, int64_t k, Array<float> values, Array<int32_t> ids,
                Array<double> lse, int isa, int threads) {
               const py::gil_scoped_release release;
               topk_logsumexp({logits, DType{dtype}, rows, vocab, row_stride, inv_temperature}, k,
                              values, ids, lse, Isa{isa}, threads);
             });

  module.def("sample_tail",
             [](Array<void> logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                Array<float> inv_temperature, Array<int32_t> count, Array<double> fraction,
                Array<int64_t> token, Array<double> z, int threads) {
               const py::gil_scoped_release release;
               sample_tail({logits, DType{dtype}, rows, vocab, row_stride, inv_temperature}, count,
                           fraction, token, z, threads);
             });

  module.def("guide_sample",
             [](Array<void> logits, int dtype, int64_t rows, int64_t vocab, int64_t row_stride,
                Array<float> inv_temperature, int64_t columns, Reals values, Array<int32_t> ids,
                Array<double> lse, int64_t guides, Reals scores, Array<double> guide_weights,
                Array<int32_t> count, Array<int32_t> mode, Array<double> scale,
                Array<double> weight, Array<int64_t> seed, Array<int64_t> position,
                Array<int64_t> token, Array<int64_t> source, Array<float> score,
                Array<float> logprob, Array<float> base_logprob, Array<float> kl, int threads) {
               const py::gil_scoped_release release;
               guide_sample({{logits, DType{dtype}, rows, vocab, row_stride, inv_temperature},
                             columns,
                             guides,
                             values,
                             ids,
                             lse,
                             scores,
                             guide_weights,
                             count,
                             mode,
                             scale,
                             weight,
                             seed,
                             position,
                             token,
                             source,
                             score,
                             logprob,
                             base_logprob,
                             kl},
                            threads);
             });

  module.def(
      "tree_attention",
      [](int dtype, int64_t rows, int64_t heads, int64_t kv_heads, int64_t pool, int64_t width,
         int64_t value_width, Array<void> query, int64_t query_stride, int64_t query_head_stride,
         Array<void> keys, int64_t key_stride, int64_t key_head_stride, Array<void> values,
         int64_t value_stride, int64_t value_head_stride, int64_t requests, int64_t slot_count,
         Array<int32_t> slots, Array<int32_t> slot_starts, Array<int32_t> slot_counts,
         Array<int32_t> row_starts, Array<int32_t> trunk, Array<int32_t> branch, float scaling,
         int64_t window, float softcap, Array<void> out, int isa, int threads) {
        const py::gil_scoped_release release;
        tree_attention(
            {DType{dtype},
             rows,
             heads,
             kv_heads,
             pool,
             width,
             value_width,
             {query, query_stride, query_head_stride},
             {keys, key_stride, key_head_stride},
             {values, value_stride, value_head_stride},
             {requests, slot_count, slots, slot_starts, slot_counts, row_starts, trunk, branch},
             scaling,
             window,
             softcap,
             out},
            Isa{isa}, threads);
      });

  module.def("lora_rows", [](int dtype, int64_t rows, int64_t inputs, int64_t outputs,
                             int64_t adapters, int64_t rank, Array<void> base, int64_t base_stride,
                             Array<void> x, int64_t x_stride, Array<void> a, Array<void> b,
                             Array<int32_t> segments, Array<void> out, int isa, int threads) {
    const py::gil_scoped_release release;
    lora_rows({DType{dtype}, rows, inputs, outputs, adapters, rank, base, base_stride, x, x_stride,
               a, b, segments, out},
              Isa{isa}, threads);
  });

  module.def("td_lambda",
             [](int dtype, int64_t rows, int64_t steps, Array<void> values, int64_t values_stride,
                Array<void> rewards, int64_t rewards_stride, Array<bool> mask, double gamma,
                double lam, Array<void> targets, int threads) {
               const py::gil_scoped_release release;
               td_lambda({DType{dtype}, rows, steps, values, values_stride, rewards, rewards_stride,
                          mask, gamma, lam, targets},
                         threads);
             });

  bind_models(module);
}

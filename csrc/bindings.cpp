// Python bindings. Tensors arrive as addresses and strides, so that no torch header is needed and
// one build serves every torch version; fastguide/kernels/native.py checks them first.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "topk_logsumexp.hpp"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void topk_logsumexp(std::uintptr_t logits, std::uintptr_t inv_temperature, std::uintptr_t values,
                    std::uintptr_t ids, std::uintptr_t lse, std::int64_t rows, std::int64_t vocab,
                    std::int64_t row_stride, std::int64_t k, int dtype, int threads) {
  if (dtype < 0 || dtype > 2) {
    throw py::value_error("dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), not " +
                          std::to_string(dtype) + ".");
  }
  const py::gil_scoped_release release;
  fastguide::topk_logsumexp({pointer<const void>(logits), pointer<const float>(inv_temperature),
                             pointer<float>(values), pointer<std::int32_t>(ids),
                             pointer<double>(lse), rows, vocab, row_stride, k,
                             static_cast<fastguide::DType>(dtype), threads});
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native CPU ops of fastguide; use them through fastguide.kernels.";
  module.attr("has_openmp") = fastguide::has_openmp();
  module.def("topk_logsumexp", &topk_logsumexp, py::arg("logits"), py::arg("inv_temperature"),
             py::arg("values"), py::arg("ids"), py::arg("lse"), py::kw_only(), py::arg("rows"),
             py::arg("vocab"), py::arg("row_stride"), py::arg("k"), py::arg("dtype"),
             py::arg("threads"),
             "Addresses of contiguous arrays, but for the stride between rows of logits.");
}

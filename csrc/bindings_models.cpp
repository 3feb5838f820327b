// Python bindings of packed weights and of stacks of layers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <vector>

#include "linear.hpp"
#include "matmul.hpp"
#include "stack.hpp"
#include "tensors.hpp"

namespace py = pybind11;
using std::int32_t, std::int64_t, std::uintptr_t;

namespace fastguide {
namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
std::vector<T*> pointers(const std::vector<uintptr_t>& addresses) {
  std::vector<T*> found;
  for (const uintptr_t address : addresses) found.push_back(pointer<T>(address));
  return found;
}

// The numbers that kernels/native_stack.py lays out for a layer.
Layer layer_of(DType dtype, const std::vector<uintptr_t>& numbers) {
  Layer layer;
  layer.input_norm = pointer<const float>(numbers.at(0));
  layer.attention_norm = pointer<const float>(numbers.at(1));
  layer.query_norm = pointer<const float>(numbers.at(2));
  layer.key_norm = pointer<const float>(numbers.at(3));
  layer.window = static_cast<int64_t>(numbers.at(4));
  for (int p = 0; p < kProjections; ++p) {
    const uintptr_t* own = &numbers.at(5 + 4 * p);
    layer.projections[p] = {{dtype, static_cast<int64_t>(own[0]), static_cast<int64_t>(own[1]),
                             pointer<const void>(own[2])},
                            pointer<const float>(own[3])};
  }
  return layer;
}

}  // namespace

void bind_models(py::module_& module) {
  module.attr("panel") = kPanel;
  module.attr("pad") = kPad;
  module.def("has_bf16_products", &has_bf16_products);

  module.def("packed_words", [](int dtype, int64_t inputs, int64_t outputs) {
    const PackedWeight shape = {DType{dtype}, inputs, outputs, nullptr};
    return shape.panels() * shape.panel_bytes() / 4;
  });

  module.def("pack_weight", [](int dtype, int64_t inputs, int64_t outputs, Array<void> weight,
                               int64_t stride, Array<void> packed, int threads) {
    const py::gil_scoped_release release;
    pack_weight({DType{dtype}, inputs, outputs, nullptr}, weight, stride, packed, threads);
  });

  module.def("packed_linear",
             [](int dtype, int64_t rows, int64_t inputs, int64_t outputs, Array<float> x,
                Array<void> packed, uintptr_t bias, Array<float> out, int isa, int threads) {
               const py::gil_scoped_release release;
               const Product product = {
                   {DType{dtype}, inputs, outputs, packed}, pointer<const float>(bias), out, false};
               multiply(x, rows, &product, 1, Isa{isa}, threads);
             });

  py::class_<Stack>(module, "Stack")
      .def(py::init([](int dtype, int64_t width, int64_t heads, int64_t kv_heads, int64_t head,
                       int64_t inner, float epsilon, float scaling,
                       const std::vector<std::vector<uintptr_t>>& layers, Array<float> last_norm) {
        std::vector<Layer> made;
        for (const auto& numbers : layers) made.push_back(layer_of(DType{dtype}, numbers));
        return Stack({DType{dtype}, width, heads, kv_heads, head, inner, epsilon, scaling},
                     std::move(made), last_norm);
      }))
      .def("run", [](const Stack& stack, int64_t rows, Array<void> hidden, Array<int64_t> positions,
                     Array<int64_t> targets, int64_t requests, int64_t slot_count,
                     Array<int32_t> slots, Array<int32_t> slot_starts, Array<int32_t> slot_counts,
                     Array<int32_t> row_starts, Array<int32_t> trunk, Array<int32_t> branch,
                     int64_t pool, const std::vector<uintptr_t>& keys,
                     const std::vector<uintptr_t>& values, int64_t adapters, int64_t rank,
                     uintptr_t segments, const std::vector<uintptr_t>& a,
                     const std::vector<uintptr_t>& b, int64_t angles, Array<float> cosines,
                     Array<float> sines, Array<void> out, int isa, int threads) {
        const py::gil_scoped_release release;
        return stack.run(
            {rows,
             hidden,
             positions,
             targets,
             {requests, slot_count, slots, slot_starts, slot_counts, row_starts, trunk, branch},
             pool,
             pointers<void>(keys),
             pointers<void>(values),
             {adapters, rank, pointer<const int32_t>(segments), pointers<const float>(a),
              pointers<const float>(b)},
             out},
            {angles, cosines, sines}, Isa{isa}, threads);
      });
}

}  // namespace fastguide

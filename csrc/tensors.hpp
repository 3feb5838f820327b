// Tensors as arguments of bound functions. Of a tensor only its address is taken, by asking the
// Python object for it, so no torch header is needed and one build serves every torch version.
// Shapes, dtypes and contiguity are the business of kernels/native.py.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "sampling.hpp"

namespace fastguide {

// The elements of a contiguous tensor.
template <typename T>
struct Array {
  T* data;
  operator T*() const { return data; }
};

inline std::uintptr_t ask(pybind11::handle tensor, const char* method) {
  return tensor.attr(method)().cast<std::uintptr_t>();
}

// Each file of bindings adds its own.
void bind_models(pybind11::module_& module);

}  // namespace fastguide

namespace pybind11::detail {

template <typename T>
struct type_caster<fastguide::Array<T>> {
  PYBIND11_TYPE_CASTER(fastguide::Array<T>, const_name("torch.Tensor"));
  bool load(handle tensor, bool) {
    value = {reinterpret_cast<T*>(fastguide::ask(tensor, "data_ptr"))};
    return true;
  }
};

template <>
struct type_caster<fastguide::Reals> {
  PYBIND11_TYPE_CASTER(fastguide::Reals, const_name("torch.Tensor"));
  bool load(handle tensor, bool) {
    value.data = reinterpret_cast<const void*>(fastguide::ask(tensor, "data_ptr"));
    value.wide = fastguide::ask(tensor, "element_size") == sizeof(double);
    return true;
  }
};

}  // namespace pybind11::detail

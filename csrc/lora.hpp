// LoRA adapters on segments of rows.
//
// Specification: kernels/reference/lora.py, whose names these are.
#pragma once

#include <cstdint>

#include "dtype.hpp"
#include "simd.hpp"

namespace fastguide {

struct LoraRows {
  DType dtype;  // of base, x, a, b and out
  std::int64_t rows, inputs, outputs, adapters, rank;
  const void* base;  // [rows, outputs]
  std::int64_t base_stride;
  const void* x;  // [rows, inputs]
  std::int64_t x_stride;
  const void* a;                 // [adapters, rank, inputs], contiguous
  const void* b;                 // [adapters, outputs, rank], contiguous
  const std::int32_t* segments;  // [adapters + 1]
  void* out;                     // [rows, outputs], contiguous; may be base
};

// The number of threads does not change the result. Throws std::invalid_argument, with one
// sentence, where the segments do not ascend from 0 at least to the number of rows at most.
void lora_rows(const LoraRows& args, Isa isa, int threads);

}  // namespace fastguide

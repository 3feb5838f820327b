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

// The same in fp32, on factors that were laid out once, so that a few rows cost a read of them.
struct PackedLora {
  std::int64_t rows, inputs, outputs, adapters;  // outputs is a multiple of kPad
  std::int64_t rank;                             // a multiple of kPad, filled up with zeros
  const float* x;                                // [rows, inputs], contiguous
  const float* a;                                // [adapters, inputs, rank]
  const float* b;                                // [adapters, rank, outputs]
  const std::int32_t* segments;                  // [adapters + 1], ascending, within the rows
  float* sums;                                   // [rows, rank], for use in between
  float* out;                                    // [rows, outputs]: added to
};

void add_lora(const PackedLora& args, Isa isa, int threads);

}  // namespace fastguide

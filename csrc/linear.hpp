// Products of rows with weights that were packed once: for a few rows their price is one read of
// the weights, for many rows the multiplications.
//
// Specification: torch.nn.functional.linear. Sums are fp32; 16-bit weights are widened in
// registers, or multiplied as they are where the CPU can (AVX-512 BF16).
#pragma once

#include <cstdint>

#include "dtype.hpp"
#include "simd.hpp"

namespace fastguide {

// Outputs that lie side by side: of input 0, then of input 1, and so on; of 16-bit weights two
// inputs at a time, as the halves of a word.
constexpr std::int64_t kPanel = 64;

// A weight of [outputs, inputs], in panels of kPanel outputs, the last one filled up with zeros.
struct PackedWeight {
  DType dtype;
  std::int64_t inputs, outputs;
  const void* data;

  std::int64_t panels() const { return (outputs + kPanel - 1) / kPanel; }
  std::int64_t panel_bytes() const {
    return kPanel * 4 * (dtype == DType::float32 ? inputs : (inputs + 1) / 2);
  }
};

// `weight` is [outputs, inputs] with any stride of rows; `packed` has panels() * panel_bytes()
// bytes.
void pack_weight(const PackedWeight& shape, const void* weight, std::int64_t stride, void* packed,
                 int threads);

// One of several products that read the same rows.
struct Product {
  PackedWeight weight;
  const float* bias;  // [outputs], or null
  float* out;         // [rows, outputs], contiguous
  bool add;           // to what `out` holds, or in its place
};

// out = x weight^T + bias for each product; x is [rows, inputs] fp32, contiguous. Neither the other
// rows nor the number of threads change a row's result.
void multiply(const float* x, std::int64_t rows, const Product* products, std::int64_t count,
              Isa isa, int threads);

// Whether the CPU multiplies bf16 numbers, and adds the products to fp32.
bool has_bf16_products();

// Tiles of AVX-512 BF16: sums[h][j] = x[h] panel, for `height` <= 6 rows of bf16 pairs.
void bf16_tile(const std::uint32_t* x, std::int64_t x_stride, const std::uint32_t* panel,
               std::int64_t pairs, std::int64_t height, float* sums);

}  // namespace fastguide

// Attention of the rows of a tree over the slots of a KV pool.
//
// Specification: kernels/reference/attention.py, whose names these are.
#pragma once

#include <cstdint>

#include "dtype.hpp"
#include "simd.hpp"

namespace fastguide {

// [a, b, width] numbers; strides in elements, that of the last dimension is 1.
struct Heads {
  const void* data;
  std::int64_t stride;
  std::int64_t head_stride;

  const void* at(std::int64_t i, std::int64_t head, DType dtype) const {
    return static_cast<const char*>(data) + (i * stride + head * head_stride) * size_of(dtype);
  }
};

// Who sees whom: see TreeLayout in the specification.
struct TreeLayout {
  std::int64_t requests;
  std::int64_t slot_count;
  const std::int32_t* slots;        // [slot_count]
  const std::int32_t* slot_starts;  // [requests]
  const std::int32_t* slot_counts;  // [requests]
  const std::int32_t* row_starts;   // [requests + 1]
  const std::int32_t* trunk;        // [rows]
  const std::int32_t* branch;       // [rows]
};

struct TreeAttention {
  DType dtype;  // of query, keys, values and out
  std::int64_t rows, heads, kv_heads, pool, width, value_width;
  Heads query;   // [rows, heads, width]
  Heads keys;    // [pool, kv_heads, width]
  Heads values;  // [pool, kv_heads, value_width]
  TreeLayout layout;
  float scaling;
  std::int64_t window;  // 0 is none
  float softcap;        // 0 is none
  void* out;            // [rows, heads, value_width], contiguous
};

// Neither the number of threads nor other requests change the results of a request. Throws
// std::invalid_argument, with one sentence, where an argument is out of its range.
void tree_attention(const TreeAttention& args, Isa isa, int threads);

}  // namespace fastguide

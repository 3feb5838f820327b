// The layers of a Llama-like decoder over the rows of a tree: everything between the embedding of
// the tokens and the last norm, in one call. Between the layers rows are fp32.
//
// Specification: the forward pass of transformers' model, which tests compare.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "attention.hpp"
#include "linear.hpp"

namespace fastguide {

struct Projection {
  PackedWeight weight;
  const float* bias;  // or null
};

enum : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kProjections };

struct Layer {
  const float* input_norm;      // [width]
  const float* attention_norm;  // [width], after the attention
  const float* query_norm;      // [head], or null
  const float* key_norm;        // [head], or null
  Projection projections[kProjections];
  std::int64_t window;  // of the attention; 0 is none
};

struct StackShape {
  DType dtype;  // of the pool, and of rows that come and go
  std::int64_t width, heads, kv_heads, head, inner;
  float epsilon, scaling;
};

// LoRA of some rows: segment g of the rows, from segments[g] to segments[g + 1], adds adapter g's.
struct Adapters {
  std::int64_t count, rank;
  const std::int32_t* segments;  // [count + 1]
  // Of each layer and projection, as in PackedLora: [count, inputs, rank] and
  // [count, rank, outputs], or null.
  std::vector<const float*> a, b;
};

struct StackPass {
  std::int64_t rows;
  const void* hidden;             // [rows, width]
  const std::int64_t* positions;  // [rows]
  const std::int64_t* targets;    // [rows]: the slots that their keys and values go to
  TreeLayout layout;
  std::int64_t pool;          // slots
  std::vector<void*> keys;    // of each layer, [pool, kv_heads, head]
  std::vector<void*> values;  // the same
  Adapters adapters;
  void* out;  // [rows, width], after the last norm
};

// Of the rotary embedding: [count, head] each, of the positions from 0.
struct Angles {
  std::int64_t count;
  const float *cosines, *sines;
};

// Seconds that a pass spent in its parts, waiting for its slowest thread included.
enum : int { kProducts, kLora, kAttention, kRows, kParts };
using Seconds = std::array<double, kParts>;

class Stack {
 public:
  Stack(const StackShape& shape, std::vector<Layer> layers, const float* last_norm)
      : shape_(shape), layers_(std::move(layers)), last_norm_(last_norm) {}

  // Throws std::invalid_argument, with one sentence, where a number leads out of its array. Neither
  // the other requests' rows nor the number of threads change a row's result.
  Seconds run(const StackPass& pass, const Angles& angles, Isa isa, int threads) const;

 private:
  StackShape shape_;
  std::vector<Layer> layers_;
  const float* last_norm_;
};

}  // namespace fastguide

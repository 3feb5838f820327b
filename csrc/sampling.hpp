// From base values and guide scores to a token.
//
// Specification: kernels/reference/sampling.py, whose names these are.
#pragma once

#include <cstdint>

#include "vocabulary.hpp"

namespace fastguide {

enum Mode : std::int32_t {
  kFillMean = 0,
  kFillNone = 1,
  kFillDrop = 2,
  kFill = 3,
  kGreedy = 4,
  kLogSigmoid = 8
};

// Arrays of numbers that may be fp32 or fp64.
struct Reals {
  const void* data;
  bool wide;

  double operator[](std::int64_t i) const {
    return wide ? static_cast<const double*>(data)[i]
                : static_cast<double>(static_cast<const float*>(data)[i]);
  }
};

// All arrays are contiguous; [n] is a row, [n, i] a column of `columns`, [g, n, i] one of a guide.
struct GuideSample {
  Logits logits;
  std::int64_t columns;
  std::int64_t guides;
  // Inputs.
  Reals values;                  // [n, i]
  const std::int32_t* ids;       // [n, i]
  const double* lse;             // [n]
  Reals scores;                  // [g, n, i]
  const double* guide_weights;   // [g, n]
  const std::int32_t* count;     // [n]
  const std::int32_t* mode;      // [n]
  const double* scale;           // [n]
  const double* weight;          // [n]
  const std::int64_t* seed;      // [n]
  const std::int64_t* position;  // [n]
  // Outputs, [n] each.
  std::int64_t* token;
  std::int64_t* source;
  float* score;
  float* logprob;
  float* base_logprob;
  float* kl;
};

// Throws std::invalid_argument, with one sentence, where an argument is out of its range.
void guide_sample(const GuideSample& args, int threads);

}  // namespace fastguide

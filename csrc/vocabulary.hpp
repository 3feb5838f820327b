// Passes over the vocabulary: the top of a row with its log-sum-exp, and a draw from below it.
//
// Specification: kernels/reference/vocabulary.py.
#pragma once

#include <cstdint>

#include "dtype.hpp"
#include "simd.hpp"

namespace fastguide {

// Rows of logits at their temperatures; along a row the stride is 1.
struct Logits {
  const void* data;  // [rows, vocab]
  DType dtype;
  std::int64_t rows;
  std::int64_t vocab;            // 1 to 2^31 - 1
  std::int64_t row_stride;       // in elements
  const float* inv_temperature;  // [rows], positive and finite

  const void* row(std::int64_t n) const {
    return static_cast<const char*>(data) + n * row_stride * size_of(dtype);
  }
};

// Throws std::invalid_argument, with one sentence, where an argument is out of its range.
void check(const Logits& logits);

// Writes values [rows, k] (z = logit * inv_temperature, by descending logit, ties by the lower
// id; -inf past the vocabulary), ids [rows, k] (-1 past the vocabulary) and lse [rows]. Neither
// the number of threads nor other rows change a row's results.
// Throws like check.
void topk_logsumexp(const Logits& logits, std::int64_t k, float* values, std::int32_t* ids,
                    double* lse, Isa isa, int threads);

// Writes token [rows] and its z [rows]: the first token at which the cumulative mass of the
// tokens ranked count[n] or later exceeds fraction[n] of their whole mass; -1 and NaN in rows
// whose fraction is negative, which are not read. Throws like check.
void sample_tail(const Logits& logits, const std::int32_t* count, const double* fraction,
                 std::int64_t* token, double* z, int threads);

}  // namespace fastguide

// The k largest values, their ids and the log-sum-exp of every row of logits, in one read.
//
// Specification: `topk_logsumexp` in kernels/reference.py. Tests: tests/kernels/.
#pragma once

#include <cstdint>

namespace fastguide {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

struct TopkLogsumexp {
  // Inputs. bf16 and fp16 logits are read as raw 16-bit words; the last dimension is contiguous.
  const void* logits;            // [rows, vocab]
  const float* inv_temperature;  // [rows], positive and finite
  // Outputs, contiguous.
  float* values;      // [rows, k], sorted; -inf past the vocabulary
  std::int32_t* ids;  // [rows, k], ties broken by the lower id; -1 past the vocabulary
  double* lse;        // [rows]; -inf for a row of only -inf, NaN for a row that holds a NaN
  // Sizes.
  std::int64_t rows;
  std::int64_t vocab;       // below 2^31
  std::int64_t row_stride;  // in elements
  std::int64_t k;           // at least 1; may exceed vocab
  DType dtype;
  int threads;  // at least 1; ignored where the extension was built without OpenMP
};

// Throws std::invalid_argument with one sentence where an argument is out of its range.
// In a row that holds a NaN the values and ids are unspecified. The number of threads may change
// lse in its last bit, and never changes values or ids.
void topk_logsumexp(const TopkLogsumexp& args);

// True where the extension was built with OpenMP.
bool has_openmp();

}  // namespace fastguide

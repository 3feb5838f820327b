// Targets of value training.
//
// Specification: kernels/reference/returns.py, whose names these are.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace fastguide {

struct TdLambda {
  DType dtype;  // of values, rewards and targets
  std::int64_t rows, steps;
  const void* values;  // [rows, steps]
  std::int64_t values_stride;
  const void* rewards;  // [rows, steps]
  std::int64_t rewards_stride;
  const bool* mask;  // [rows, steps], contiguous
  double gamma, lam;
  void* targets;  // [rows, steps], contiguous
};

void td_lambda(const TdLambda& args, int threads);

}  // namespace fastguide

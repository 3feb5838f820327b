// The recursion runs backwards along a row; rows are independent. Training calls this once per
// batch, so one row at a time is fast enough.
#include "returns.hpp"

#include <algorithm>

#include "parallel.hpp"
#include "simd.hpp"

namespace fastguide {
namespace {

constexpr std::int64_t kMinShare = 16384;  // steps that are worth a thread

template <DType D>
void targets_of_row(const TdLambda& args, std::int64_t row) {
  const void* values = at<D>(args.values, row * args.values_stride);
  const void* rewards = at<D>(args.rewards, row * args.rewards_stride);
  const bool* mask = args.mask + row * args.steps;
  void* targets = at<D>(args.targets, row * args.steps);
  const auto gamma = static_cast<float>(args.gamma), lam = static_cast<float>(args.lam);
  const auto one_step = static_cast<float>(1.0 - args.lam);
  float following = 0.0f;
  for (std::int64_t t = args.steps - 1; t >= 0; --t) {
    float target = 0.0f;
    if (mask[t]) {
      target = read<D>(rewards, t);
      if (t + 1 < args.steps && mask[t + 1]) {
        target += gamma * (one_step * read<D>(values, t + 1) + lam * following);
      }
    }
    Simd<16>::narrow<D>(Simd<16>::broadcast(target), at<D>(targets, t), 1);
    following = target;
  }
}

}  // namespace

void td_lambda(const TdLambda& args, int threads) {
  const auto worth = std::max<std::int64_t>(1, args.rows * args.steps / kMinShare);
  const auto team = static_cast<int>(std::min<std::int64_t>(threads, worth));
  with_dtype(args.dtype, [&](auto dtype) {
    parallel_for(team, args.rows,
                 [&](std::int64_t row, int) { targets_of_row<dtype()>(args, row); });
  });
}

}  // namespace fastguide

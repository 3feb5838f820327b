// One task is a run of one row. It walks its run in blocks that fit the L1 cache: widen and scale
// to fp32, fold the block into a running log-sum-exp, and append to a small pool of candidates
// those slices whose maximum beats the k-th best value so far; most slices are skipped by that
// one comparison. A pool that is full is cut back to its k best. Rows with several runs are merged.
#include "topk_logsumexp.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

// The vector loops are compiled once per instruction set and chosen when the library is loaded.
#ifdef FASTGUIDE_TARGET_CLONES
#define FASTGUIDE_VECTOR \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else
#define FASTGUIDE_VECTOR
#endif

namespace fastguide {
namespace {

constexpr std::int64_t kSlice = 64;      // elements that share one comparison with the k-th value
constexpr std::int64_t kPartial = 256;   // elements whose exponentials are summed in fp32
constexpr std::int64_t kBlock = 1024;    // elements that stay in the L1 cache between the loops
constexpr std::int64_t kMinRun = 32768;  // about 10 us: shorter runs are not worth handing out
constexpr float kInf = std::numeric_limits<float>::infinity();

inline float as_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t as_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ------------------------------------------------------------------------------ vector loops

FASTGUIDE_VECTOR void scale_fp32(const float* in, float factor, float* out, std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) out[i] = in[i] * factor;
}

FASTGUIDE_VECTOR void scale_bf16(const std::uint16_t* in, float factor, float* out,
                                 std::int64_t n) {
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    out[i] = as_float(static_cast<std::uint32_t>(in[i]) << 16) * factor;
  }
}

// The exponent is rebiased by a multiplication, which also makes subnormals right.
FASTGUIDE_VECTOR void scale_fp16(const std::uint16_t* in, float factor, float* out,
                                 std::int64_t n) {
  const float rebias = as_float(0x77800000);    // 2^112
  const float overflow = as_float(0x47800000);  // 65536: the exponent of infinity and NaN
#pragma omp simd
  for (std::int64_t i = 0; i < n; ++i) {
    const std::uint32_t half = in[i];
    const float magnitude = as_float((half & 0x7fffu) << 13) * rebias;
    const std::uint32_t special = magnitude >= overflow ? 0x7f800000u : 0u;
    const std::uint32_t sign = (half & 0x8000u) << 16;
    out[i] = as_float(as_bits(magnitude) | special | sign) * factor;
  }
}

// The maximum of each slice; NaN is passed over.
FASTGUIDE_VECTOR void slice_maxima(const float* z, float* maxima, std::int64_t slices) {
  for (std::int64_t s = 0; s < slices; ++s) {
    float best = -kInf;
#pragma omp simd reduction(max : best)
    for (std::int64_t i = 0; i < kSlice; ++i) {
      best = z[s * kSlice + i] > best ? z[s * kSlice + i] : best;
    }
    maxima[s] = best;
  }
}

// sum_i exp(z_i - shift) for z_i <= shift. Relative error of each term below 2e-7; -inf counts as
// exp(-87) (below 2e-38, against a sum of at least 1); NaN stays NaN. Partial sums are short, so
// that the sum is as good where the compiler does not vectorise the loop.
FASTGUIDE_VECTOR double sum_exp(const float* z, float shift, std::int64_t n) {
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  double total = 0.0;
  for (std::int64_t first = 0; first < n; first += kPartial) {
    const std::int64_t end = std::min(first + kPartial, n);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = first; i < end; ++i) {
      float t = z[i] - shift;
      t = t < -87.0f ? -87.0f : t;
      t = t > 0.0f ? 0.0f : t;
      const float shifted = t * 1.44269504089f + round;
      const float power = shifted - round;
      float r = t - power * 0.693359375f;
      r = r + power * 2.12194440e-4f;
      float p = 1.9875691500e-4f;  // Cephes expf
      p = p * r + 1.3981999507e-3f;
      p = p * r + 8.3334519073e-3f;
      p = p * r + 4.1665795894e-2f;
      p = p * r + 1.6666665459e-1f;
      p = p * r + 5.0000001201e-1f;
      p = p * (r * r) + r + 1.0f;
      sum += p * as_float((as_bits(shifted) + 127u) << 23);
    }
    total += static_cast<double>(sum);
  }
  return total;
}

// -------------------------------------------------------------------------------- candidates

// A larger key is a larger value, then a lower id: one total order, as in the reference.
inline std::uint64_t to_key(float value, std::uint32_t id) {
  const std::uint32_t bits = as_bits(value + 0.0f);  // -0.0 must tie with 0.0
  const std::uint32_t ordered = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<std::uint64_t>(ordered) << 32 | (0xffffffffu - id);
}

inline float key_value(std::uint64_t key) {
  const auto ordered = static_cast<std::uint32_t>(key >> 32);
  return as_float(ordered >> 31 ? ordered & 0x7fffffffu : ~ordered);
}

inline std::int32_t key_id(std::uint64_t key) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(key));
}

void keep_best(std::vector<std::uint64_t>& keys, std::size_t k) {
  if (keys.size() <= k) return;
  std::nth_element(keys.begin(), keys.begin() + static_cast<std::ptrdiff_t>(k) - 1, keys.end(),
                   std::greater<>());
  keys.resize(k);
}

// The k best of a run, in no order. Ids arrive in ascending order, so a later value must be
// strictly larger than the k-th to matter.
class Pool {
 public:
  explicit Pool(std::size_t k) : k_(k), capacity_(2 * k + kSlice) { keys_.reserve(capacity_); }

  bool wants(float slice_maximum) const { return !full_ || slice_maximum > kth_; }

  // n is at most kSlice.
  void add(const float* z, std::uint32_t first_id, std::int64_t n) {
    if (keys_.size() + static_cast<std::size_t>(n) > capacity_) cut();
    const std::size_t before = keys_.size();
    keys_.resize(before + static_cast<std::size_t>(n));
    std::uint64_t* out = keys_.data() + before;
    std::size_t added = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      out[added] = to_key(z[i], first_id + static_cast<std::uint32_t>(i));
      added += static_cast<std::size_t>(!full_ || z[i] > kth_);
    }
    keys_.resize(before + added);
    if (!full_ && keys_.size() >= k_) cut();
  }

  std::vector<std::uint64_t> take() {
    keep_best(keys_, k_);
    return std::move(keys_);
  }

 private:
  void cut() {
    keep_best(keys_, k_);
    full_ = true;
    kth_ = key_value(*std::min_element(keys_.begin(), keys_.end()));
  }

  std::size_t k_;
  std::size_t capacity_;
  bool full_ = false;
  float kth_ = -kInf;
  std::vector<std::uint64_t> keys_;
};

// ------------------------------------------------------------------------------- log-sum-exp

// log(sum) + maximum is the log-sum-exp; the sum is kept in fp64.
struct Accumulator {
  float maximum = -kInf;
  double sum = 0.0;

  // An infinite maximum must not turn z - maximum into NaN.
  static float shift(float maximum) { return std::isinf(maximum) ? 0.0f : maximum; }

  void raise(float to) {
    if (!(to > maximum)) return;
    sum *= std::exp(static_cast<double>(maximum) - static_cast<double>(to));
    maximum = to;
  }

  void add(const Accumulator& other) {
    raise(other.maximum);
    // NaN where both are the same infinity, so the factor is then 1.
    const double factor =
        other.maximum == maximum ? 1.0 : std::exp(double(other.maximum) - maximum);
    sum += other.sum * factor;
  }

  double result() const {
    if (std::isnan(sum)) return std::numeric_limits<double>::quiet_NaN();
    if (std::isinf(maximum)) return maximum;
    return static_cast<double>(maximum) + std::log(sum);
  }
};

// --------------------------------------------------------------------------------------- runs

struct Run {
  std::vector<std::uint64_t> best;
  Accumulator mass;
};

void load(const TopkLogsumexp& args, std::int64_t row, std::int64_t first, std::int64_t n,
          float* z) {
  const float factor = args.inv_temperature[row];
  const std::int64_t offset = row * args.row_stride + first;
  const auto* words = static_cast<const std::uint16_t*>(args.logits);
  switch (args.dtype) {
    case DType::float32:
      return scale_fp32(static_cast<const float*>(args.logits) + offset, factor, z, n);
    case DType::bfloat16:
      return scale_bf16(words + offset, factor, z, n);
    case DType::float16:
      return scale_fp16(words + offset, factor, z, n);
  }
}

Run scan(const TopkLogsumexp& args, std::int64_t row, std::int64_t begin, std::int64_t end) {
  alignas(64) float z[kBlock];
  float maxima[kBlock / kSlice];
  Pool pool(static_cast<std::size_t>(std::min(args.k, end - begin)));
  Accumulator mass;
  for (std::int64_t first = begin; first < end; first += kBlock) {
    const std::int64_t n = std::min(kBlock, end - first);
    const std::int64_t slices = (n + kSlice - 1) / kSlice;
    load(args, row, first, n, z);
    std::fill(z + n, z + slices * kSlice, -kInf);
    slice_maxima(z, maxima, slices);
    mass.raise(*std::max_element(maxima, maxima + slices));
    const double block = sum_exp(z, Accumulator::shift(mass.maximum), n);
    // Of a block of only -inf nothing but a NaN may remain.
    mass.sum += mass.maximum == -kInf ? block * 0.0 : block;
    for (std::int64_t s = 0; s < slices; ++s) {
      if (!pool.wants(maxima[s])) continue;
      const std::int64_t start = s * kSlice;
      pool.add(z + start, static_cast<std::uint32_t>(first + start), std::min(kSlice, n - start));
    }
  }
  return {pool.take(), mass};
}

void write_row(const TopkLogsumexp& args, std::int64_t row, Run* runs, std::int64_t count) {
  Run& all = runs[0];
  for (std::int64_t c = 1; c < count; ++c) {
    all.best.insert(all.best.end(), runs[c].best.begin(), runs[c].best.end());
    all.mass.add(runs[c].mass);
  }
  keep_best(all.best, static_cast<std::size_t>(args.k));
  std::sort(all.best.begin(), all.best.end(), std::greater<>());
  const auto found = static_cast<std::int64_t>(all.best.size());
  float* values = args.values + row * args.k;
  std::int32_t* ids = args.ids + row * args.k;
  for (std::int64_t i = 0; i < args.k; ++i) {
    values[i] = i < found ? key_value(all.best[static_cast<std::size_t>(i)]) : -kInf;
    ids[i] = i < found ? key_id(all.best[static_cast<std::size_t>(i)]) : -1;
  }
  args.lse[row] = all.mass.result();
}

void check(const TopkLogsumexp& args) {
  const auto refuse = [](const std::string& sentence) { throw std::invalid_argument(sentence); };
  if (args.k < 1) refuse("k must be at least 1, not " + std::to_string(args.k) + ".");
  if (args.threads < 1) {
    refuse("threads must be at least 1, not " + std::to_string(args.threads) + ".");
  }
  if (args.vocab < 1 || args.vocab > std::numeric_limits<std::int32_t>::max()) {
    refuse("The vocabulary must hold 1 to 2147483647 tokens, not " + std::to_string(args.vocab) +
           ".");
  }
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const float factor = args.inv_temperature[row];
    if (!(factor > 0.0f) || std::isinf(factor)) {
      refuse("inv_temperature must be positive and finite, not " + std::to_string(factor) +
             " (row " + std::to_string(row) + ").");
    }
  }
}

}  // namespace

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

void topk_logsumexp(const TopkLogsumexp& args) {
  check(args);
  // As few runs per row as give every thread the same number of them.
  const std::int64_t longest = std::max<std::int64_t>(1, args.vocab / kMinRun);
  const std::int64_t even = args.threads / std::gcd<std::int64_t>(args.rows, args.threads);
  const std::int64_t per_row = args.rows == 0 ? 1 : std::min(longest, even);
  const std::int64_t step = (args.vocab + per_row - 1) / per_row;
  const std::int64_t total = args.rows * per_row;
  std::vector<Run> runs(static_cast<std::size_t>(total));

  const std::int64_t worth = std::max<std::int64_t>(1, args.rows * args.vocab / kMinRun);
  [[maybe_unused]] const int threads = static_cast<int>(
      std::min<std::int64_t>({args.threads, worth, std::max<std::int64_t>(1, total)}));
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
  for (std::int64_t task = 0; task < total; ++task) {
    const std::int64_t begin = std::min(task % per_row * step, args.vocab);
    runs[static_cast<std::size_t>(task)] =
        scan(args, task / per_row, begin, std::min(begin + step, args.vocab));
  }
  for (std::int64_t row = 0; row < args.rows; ++row) {
    write_row(args, row, runs.data() + row * per_row, per_row);
  }
}

}  // namespace fastguide

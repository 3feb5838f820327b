// A task is a part of one row, read once. It is walked in blocks that fit the L1 cache: z in fp32
// with the maximum of each slice of raw logits, then the sum of the exponentials. The k-th largest
// maximum of disjoint groups of slices is a lower bound of the k-th largest logit, so only the few
// slices that reach it are searched for the k best.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "check.hpp"
#include "ordering.hpp"
#include "parallel.hpp"
#include "vocabulary.hpp"

namespace fastguide {
namespace {

constexpr std::int64_t kSlice = 128;       // logits that share one maximum
constexpr std::int64_t kBlock = 2048;      // logits that stay in the L1 cache between two loops
constexpr std::int64_t kChunk = 8192;      // logits whose mass is summed on its own: see Mass
constexpr std::int64_t kMinShare = 32768;  // fewer logits are not worth a thread
constexpr float kInf = std::numeric_limits<float>::infinity();

// log(sum) + maximum is the log-sum-exp. Chunks begin at fixed places and are added in order, so
// that the number of threads cannot change a bit.
struct Mass {
  float maximum = -kInf;
  double sum = 0.0;

  // What z is reduced by; an infinite maximum must not make NaN of the others.
  float shift() const { return std::isinf(maximum) ? 0.0f : maximum; }

  void raise(float to) {
    if (!(to > maximum)) return;
    if (sum != 0.0) sum *= std::exp(static_cast<double>(maximum) - static_cast<double>(to));
    maximum = to;
  }

  void add(Mass other) {
    raise(other.maximum);
    other.raise(maximum);
    sum += other.sum;
  }

  double result() const {
    if (std::isnan(sum)) return std::numeric_limits<double>::quiet_NaN();
    return std::isinf(maximum) ? maximum : maximum + std::log(sum);
  }
};

// ---------------------------------------------------------------------------------- hot loops

// Of whole slices, the maximum of each (NaN is passed over) and every z, in any order; returns the
// maximum of all.
template <DType D>
struct Load {
  template <int Bytes>
  [[gnu::always_inline]] static inline float run(const void* logits, std::int64_t slices,
                                                 float factor, float* z, float* maxima) {
    using S = Simd<Bytes>;
    constexpr int per_word = D == DType::float32 ? 1 : 2;
    const char* from = static_cast<const char*>(logits);
    auto best = S::broadcast(-kInf);
    for (std::int64_t s = 0; s < slices; ++s) {
      auto slice = S::broadcast(-kInf);
#pragma GCC unroll 4
      for (int i = 0; i < kSlice; i += S::lanes * per_word, from += Bytes) {
        const auto words = S::template load<typename S::U32>(from);
        if constexpr (per_word == 1) {
          const auto x = bits_as<typename S::F32>(words);
          slice = S::max(slice, x);
          S::store(z + i, x * factor);
        } else {
          const auto even = S::template low<D>(words);
          const auto odd = S::template high<D>(words);
          slice = S::max(S::max(slice, even), odd);
          S::store(z + i, even * factor);
          S::store(z + i + S::lanes, odd * factor);
        }
      }
      z += kSlice;
      maxima[s] = S::reduce_max(slice);
      best = S::max(best, slice);
    }
    return S::reduce_max(best);
  }
};

// The sum of exp(z - shift) over whole slices of z <= shift.
struct SumExp {
  template <int Bytes>
  [[gnu::always_inline]] static inline float run(const float* z, std::int64_t slices, float shift) {
    using S = Simd<Bytes>;
    constexpr int ways = 4;  // partial sums are short, and do not wait for each other
    typename S::F32 sums[ways] = {};
    for (std::int64_t i = 0; i < slices * kSlice; i += ways * S::lanes) {
#pragma GCC unroll 4
      for (int w = 0; w < ways; ++w) {
        const auto x = S::template load<typename S::F32>(z + i + w * S::lanes);
        sums[w] += S::exp_nonpositive(x - shift);
      }
    }
    return S::reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
};

// Writes the keys of the logits that are not below the floor, and returns how many there are.
template <DType D>
struct Collect {
  template <int Bytes>
  [[gnu::always_inline]] static inline std::int64_t run(const void* logits, std::int64_t n,
                                                        std::int64_t first_id, float floor,
                                                        Key* keys) {
    using S = Simd<Bytes>;
    std::int64_t found = 0;
    for (std::int64_t begin = 0; begin < n; begin += S::lanes) {
      const std::int64_t end = begin + S::lanes < n ? begin + S::lanes : n;
      if (end == begin + S::lanes) {
        const auto x = S::template widen<D>(at<D>(logits, begin));
        if (!S::any(~(x < floor))) continue;
      }
      for (std::int64_t i = begin; i < end; ++i) {
        const float x = read<D>(logits, i);
        keys[found] = to_key(x, first_id + i);
        found += !(x < floor);
      }
    }
    return found;
  }
};

// --------------------------------------------------------------------------------------- tasks

using Keys = std::vector<Key>;

void keep_best(Keys& keys, std::int64_t k) {
  if (static_cast<std::int64_t>(keys.size()) <= k) return;
  std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.end(), std::greater<>());
  keys.resize(k);
}

// The chunks [first, last) of one row.
struct Part {
  std::int64_t row, first, last;
};

template <DType D>
class Scanner {
 public:
  Scanner(const Logits& logits, std::int64_t k, Isa isa) : logits_(logits), k_(k), isa_(isa) {}

  // Writes the mass of each chunk, and returns the keys of the k best logits, in any order.
  const Keys& scan(const Part& part, Mass* masses) {
    const std::int64_t end = std::min(part.last * kChunk, logits_.vocab);
    maxima_.resize((end - part.first * kChunk + kSlice - 1) / kSlice);
    float* maxima = maxima_.data();
    for (std::int64_t chunk = part.first; chunk < part.last; ++chunk) {
      const std::int64_t chunk_end = std::min((chunk + 1) * kChunk, end);
      for (std::int64_t begin = chunk * kChunk; begin < chunk_end; begin += kBlock) {
        maxima =
            add_block(part.row, begin, std::min(begin + kBlock, chunk_end), maxima, masses[chunk]);
      }
    }
    keys_.clear();
    float floor = lower_bound();
    for (std::size_t s = 0; s < maxima_.size(); ++s) {
      if (maxima_[s] < floor) continue;
      const std::int64_t begin = part.first * kChunk + static_cast<std::int64_t>(s) * kSlice;
      const std::int64_t n = std::min(kSlice, end - begin);
      const std::size_t held = keys_.size();
      keys_.resize(held + kSlice);
      keys_.resize(held + run_loop<Collect<D>>(isa_, logit(part.row, begin), n, begin, floor,
                                               keys_.data() + held));
      if (static_cast<std::int64_t>(keys_.size()) >= 2 * k_ + kSlice) {
        keep_best(keys_, k_);
        // Ids rise from here on, so that a later logit must be larger than the k-th to matter.
        floor = std::nextafter(key_logit(*std::min_element(keys_.begin(), keys_.end())), kInf);
      }
    }
    keep_best(keys_, k_);
    return keys_;
  }

 private:
  const void* logit(std::int64_t row, std::int64_t id) const { return at<D>(logits_.row(row), id); }

  // Returns where the maxima of the next block go.
  float* add_block(std::int64_t row, std::int64_t begin, std::int64_t end, float* maxima,
                   Mass& mass) {
    alignas(64) float z[kBlock];
    const float factor = logits_.inv_temperature[row];
    const std::int64_t whole = (end - begin) / kSlice, rest = (end - begin) % kSlice;
    const std::int64_t slices = whole + (rest != 0);
    float maximum = run_loop<Load<D>>(isa_, logit(row, begin), whole, factor, z, maxima);
    if (rest) {
      std::uint32_t padded[kSlice];
      std::fill_n(padded, kSlice, minus_infinity(D));
      std::memcpy(padded, logit(row, end - rest), rest * size_of(D));
      maximum = std::max(maximum, run_loop<Load<D>>(isa_, padded, std::int64_t{1}, factor,
                                                    z + whole * kSlice, maxima + whole));
    }
    mass.raise(maximum * factor);
    mass.sum += run_loop<SumExp>(isa_, z, slices, mass.shift());
    return maxima + slices;
  }

  // No more than the k-th largest logit of the part.
  float lower_bound() {
    groups_ = maxima_;
    auto n = static_cast<std::int64_t>(groups_.size());
    // The more groups, the closer the bound, but 2k to 4k are close enough and quick to order.
    for (; n >= 4 * k_; n = (n + 1) / 2) {
      for (std::int64_t g = 0; g < n / 2; ++g) {
        groups_[g] = std::max(groups_[2 * g], groups_[2 * g + 1]);
      }
      if (n % 2) groups_[n / 2] = groups_[n - 1];
    }
    if (n < k_) return -kInf;
    const auto kth = groups_.begin() + (k_ - 1);
    std::nth_element(groups_.begin(), kth, groups_.begin() + n, std::greater<>());
    return *kth;
  }

  const Logits& logits_;
  std::int64_t k_;
  Isa isa_;
  std::vector<float> maxima_, groups_;
  Keys keys_;
};

}  // namespace

void check(const Logits& logits) {
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  if (logits.vocab < 1 || logits.vocab > most) {
    refuse("the vocabulary must hold 1 to ", most, " tokens, not ", logits.vocab);
  }
  for (std::int64_t n = 0; n < logits.rows; ++n) {
    const float factor = logits.inv_temperature[n];
    if (!(factor > 0.0f) || std::isinf(factor)) {
      refuse("inv_temperature must be positive and finite, not ", factor, " (row ", n, ")");
    }
  }
}

void topk_logsumexp(const Logits& logits, std::int64_t k, float* values, std::int32_t* ids,
                    double* lse, Isa isa, int threads) {
  check(logits);
  if (k < 1) refuse("k must be at least 1, not ", k);

  const std::int64_t rows = logits.rows;
  const std::int64_t chunks = (logits.vocab + kChunk - 1) / kChunk;
  const std::int64_t worth = rows * logits.vocab / kMinShare;
  const int team = std::clamp<std::int64_t>(worth, 1, threads);
  // As few parts per row as give every thread the same number of them.
  const std::int64_t parts = std::min(chunks, team / std::gcd<std::int64_t>(rows, team));
  std::vector<Mass> masses(rows * chunks);
  std::vector<Keys> best(rows * parts);
  with_dtype(logits.dtype, [&](auto dtype) {
    std::vector<Scanner<dtype()>> scanners(team, Scanner<dtype()>(logits, k, isa));
    parallel_for(team, rows * parts, [&](std::int64_t task, int thread) {
      const std::int64_t row = task / parts, p = task % parts;
      const Part part = {row, p * chunks / parts, (p + 1) * chunks / parts};
      best[task] = scanners[thread].scan(part, &masses[row * chunks]);
    });
  });

  for (std::int64_t row = 0; row < rows; ++row) {
    Keys& all = best[row * parts];
    for (std::int64_t p = 1; p < parts; ++p) {
      const Keys& more = best[row * parts + p];
      all.insert(all.end(), more.begin(), more.end());
    }
    keep_best(all, k);
    std::sort(all.begin(), all.end(), std::greater<>());
    const auto found = static_cast<std::int64_t>(all.size());
    for (std::int64_t i = 0; i < k; ++i) {
      values[row * k + i] = i < found ? key_logit(all[i]) * logits.inv_temperature[row] : -kInf;
      ids[row * k + i] = i < found ? key_id(all[i]) : -1;
    }
    Mass mass;
    for (std::int64_t c = 0; c < chunks; ++c) mass.add(masses[row * chunks + c]);
    lse[row] = mass.result();
  }
}

}  // namespace fastguide

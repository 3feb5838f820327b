// A task is a part of one row, read from memory once. It is walked in chunks that fit the L1 cache:
// first the maximum of each group of raw logits, then the sum of the exponentials. The k-th largest
// maximum of disjoint groups is a lower bound of the k-th largest logit, so only the few groups
// that reach it are searched for the k best.
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

// A tile is `kDepth` lines of the cache; its groups are the words that lie at one place of them, so
// that a maximum takes no steps across the lanes of a vector.
constexpr std::int64_t kGroups = 16;       // words of a line
constexpr std::int64_t kDepth = 16;        // words of a group
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

template <DType D>
constexpr std::int64_t per_word = 4 / size_of(D);

template <DType D>
constexpr std::int64_t tile_size = kGroups * kDepth * per_word<D>;

// ---------------------------------------------------------------------------------- hot loops

// The maximum of each group of whole tiles (NaN is passed over); returns the maximum of all.
template <DType D>
struct Maxima {
  template <int Bytes>
  [[gnu::always_inline]] static inline float run(const void* logits, std::int64_t tiles,
                                                 float* maxima) {
    using S = Simd<Bytes>;
    constexpr int parts = kGroups / S::lanes;  // vectors of a line
    const char* from = static_cast<const char*>(logits);
    auto best = S::broadcast(-kInf);
    for (std::int64_t t = 0; t < tiles; ++t) {
      typename S::F32 groups[parts];
      for (int p = 0; p < parts; ++p) groups[p] = S::broadcast(-kInf);
#pragma GCC unroll 4
      for (int i = 0; i < kDepth; ++i) {
#pragma GCC unroll 4
        for (int p = 0; p < parts; ++p, from += Bytes) {
          const auto words = S::template load<typename S::U32>(from);
          if constexpr (D == DType::float32) {
            groups[p] = S::max(groups[p], bits_as<typename S::F32>(words));
          } else {
            groups[p] = S::max(groups[p], S::template low<D>(words));
            groups[p] = S::max(groups[p], S::template high<D>(words));
          }
        }
      }
      for (int p = 0; p < parts; ++p, maxima += S::lanes) {
        S::store(maxima, groups[p]);
        best = S::max(best, groups[p]);
      }
    }
    return S::reduce_max(best);
  }
};

// The sum of exp((x - shift) * factor) over whole tiles of x <= shift.
template <DType D>
struct SumExp {
  template <int Bytes>
  [[gnu::always_inline]] static inline double run(const void* logits, std::int64_t tiles,
                                                  float factor, float shift) {
    using S = Simd<Bytes>;
    constexpr int ways = 2;              // words at once, which do not wait for each other
    constexpr std::int64_t at_once = 4;  // tiles of an fp32 sum: short ones lose little
    const float rate = static_cast<float>(factor * 1.4426950408889634);
    const float least = -126.0f / rate;
    const char* from = static_cast<const char*>(logits);
    double total = 0.0;
    for (std::int64_t t = 0; t < tiles; t += at_once) {
      const std::int64_t words = std::min(at_once, tiles - t) * kGroups * kDepth;
      typename S::F32 sums[2 * ways] = {};
      for (std::int64_t i = 0; i < words; i += ways * S::lanes) {
#pragma GCC unroll 2
        for (int w = 0; w < ways; ++w, from += Bytes) {
          const auto bits = S::template load<typename S::U32>(from);
          // Memory works ahead, at the next chunk, while this one is computed with.
          __builtin_prefetch(from + kChunk * size_of(D), 0, 3);
          if constexpr (D == DType::float32) {
            const auto x = bits_as<typename S::F32>(bits) - shift;
            sums[w] += S::exp2_product(S::max(x, S::broadcast(least)), rate);
          } else {
            const auto even = S::template low<D>(bits) - shift;
            const auto odd = S::template high<D>(bits) - shift;
            sums[2 * w] += S::exp2_product(S::max(even, S::broadcast(least)), rate);
            sums[2 * w + 1] += S::exp2_product(S::max(odd, S::broadcast(least)), rate);
          }
        }
      }
      total += S::reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
    return total;
  }
};

// Halves n maxima, by joining groups, until fewer than `enough` are left; returns how many.
struct Join {
  template <int Bytes>
  [[gnu::always_inline]] static inline std::int64_t run(float* maxima, std::int64_t n,
                                                        std::int64_t enough) {
    while (n >= enough) {
      const std::int64_t half = (n + 1) / 2;
      for (std::int64_t g = 0; g < n - half; ++g) {
        maxima[g] = maxima[g + half] > maxima[g] ? maxima[g + half] : maxima[g];
      }
      n = half;
    }
    return n;
  }
};

// Writes which of n maxima, whole vectors of them, reach the floor; returns how many do.
struct Reaching {
  template <int Bytes>
  [[gnu::always_inline]] static inline std::int64_t run(const float* maxima, std::int64_t n,
                                                        float floor, std::int32_t* groups) {
    using S = Simd<Bytes>;
    std::int64_t found = 0;
    for (std::int64_t first = 0; first < n; first += S::lanes) {
      if (!S::any(S::template load<typename S::F32>(maxima + first) >= floor)) continue;
      for (std::int64_t g = first; g < first + S::lanes; ++g) {
        groups[found] = static_cast<std::int32_t>(g);
        found += maxima[g] >= floor;
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
    row_ = logits_.row(part.row);
    first_ = part.first * kChunk;
    end_ = std::min(part.last * kChunk, logits_.vocab);
    const std::int64_t tiles = (end_ - first_ + tile_size<D> - 1) / tile_size<D>;
    maxima_.resize(tiles * kGroups);
    groups_.resize(tiles * kGroups);
    float* maxima = maxima_.data();
    for (std::int64_t chunk = part.first; chunk < part.last; ++chunk) {
      const std::int64_t begin = chunk * kChunk;
      masses[chunk] =
          add(begin, std::min(begin + kChunk, end_), logits_.inv_temperature[part.row], maxima);
      maxima += kChunk / tile_size<D> * kGroups;
    }
    collect();
    return keys_;
  }

 private:
  // The mass of a chunk, and its maxima.
  Mass add(std::int64_t begin, std::int64_t end, float factor, float* maxima) {
    const std::int64_t whole = (end - begin) / tile_size<D>, rest = (end - begin) % tile_size<D>;
    const void* logits = at<D>(row_, begin);
    float most = run_loop<Maxima<D>>(isa_, logits, whole, maxima);
    std::uint32_t last[kGroups * kDepth];
    if (rest) {
      std::fill_n(last, kGroups * kDepth, minus_infinity(D));
      std::memcpy(last, at<D>(row_, end - rest), rest * size_of(D));
      const void* padded = last;
      most = std::max(most,
                      run_loop<Maxima<D>>(isa_, padded, std::int64_t{1}, maxima + whole * kGroups));
    }
    Mass mass;
    mass.maximum = most * factor;
    const float shift = std::isinf(most) ? 0.0f : most;
    mass.sum = run_loop<SumExp<D>>(isa_, logits, whole, factor, shift);
    if (rest) {
      const void* padded = last;
      mass.sum += run_loop<SumExp<D>>(isa_, padded, std::int64_t{1}, factor, shift);
    }
    return mass;
  }

  void collect() {
    keys_.clear();
    float floor = lower_bound();
    const auto n = static_cast<std::int64_t>(maxima_.size());
    const std::int64_t reaching =
        run_loop<Reaching>(isa_, maxima_.data(), n, floor, groups_.data());
    std::int64_t tile = 0;
    for (std::int64_t i = 0; i < reaching; ++i) {
      const std::int64_t group = groups_[i];
      if (group / kGroups != tile &&
          static_cast<std::int64_t>(keys_.size()) >= 2 * k_ + tile_size<D>) {
        keep_best(keys_, k_);
        // Ids rise from tile to tile, so that from here on a logit must be larger than the k-th.
        floor = std::nextafter(key_logit(*std::min_element(keys_.begin(), keys_.end())), kInf);
      }
      tile = group / kGroups;
      if (maxima_[group] < floor) continue;
      const std::int64_t begin = first_ + tile * tile_size<D> + group % kGroups * per_word<D>;
      for (std::int64_t d = 0; d < kDepth; ++d) {
        for (std::int64_t w = 0; w < per_word<D>; ++w) {
          const std::int64_t id = begin + d * kGroups * per_word<D> + w;
          if (id >= end_) break;
          const float x = read<D>(row_, id);
          if (!(x < floor)) keys_.push_back(to_key(x, id));
        }
      }
    }
    keep_best(keys_, k_);
  }

  // No more than the k-th largest logit of the part.
  float lower_bound() {
    joined_ = maxima_;
    // The more groups, the closer the bound, but 2k to 4k are close enough and quick to order.
    const std::int64_t n =
        run_loop<Join>(isa_, joined_.data(), static_cast<std::int64_t>(joined_.size()), 4 * k_);
    if (n < k_) return -kInf;
    const auto kth = joined_.begin() + (k_ - 1);
    std::nth_element(joined_.begin(), kth, joined_.begin() + n, std::greater<>());
    return *kth;
  }

  const Logits& logits_;
  std::int64_t k_;
  Isa isa_;
  const void* row_ = nullptr;
  std::int64_t first_ = 0, end_ = 0;  // the part's logits
  std::vector<float> maxima_, joined_;
  std::vector<std::int32_t> groups_;
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

// The order is that of the raw logits, so it takes no exponential to find it: the bins of a
// histogram are the 65,536 values of a 16-bit logit, or the fp32 numbers that share their upper 16
// bits. Only two bins are ever looked into, by one more read of the row each: that of the tail's
// first token, and that of the drawn one.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "check.hpp"
#include "ordering.hpp"
#include "parallel.hpp"
#include "vocabulary.hpp"

namespace fastguide {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

template <DType D>
class TailSampler {
 public:
  explicit TailSampler(const Logits& logits) : logits_(logits), table_(65536) {}

  // The drawn token and its z; count is below the size of the vocabulary.
  std::pair<std::int64_t, double> draw(std::int64_t row, std::int64_t count, double fraction) {
    row_ = logits_.row(row);
    factor_ = logits_.inv_temperature[row];
    find_bins();
    std::size_t b = 0;
    std::int64_t skip = count;  // candidates in the bin
    for (; skip >= bins_[b].size; ++b) skip -= bins_[b].size;
    open(bins_[b]);
    const double top = z(skip);
    weigh(b, std::isinf(top) ? 0.0 : top);
    bins_[b].mass = 0.0;
    for (std::size_t i = skip; i < members_.size(); ++i) bins_[b].mass += mass(i);

    double total = 0.0;
    for (std::size_t i = b; i < bins_.size(); ++i) total += bins_[i].mass;
    const double target = fraction * total;
    double cumulative = 0.0;
    for (; b < bins_.size(); ++b, skip = 0) {
      if (cumulative + bins_[b].mass <= target) {
        cumulative += bins_[b].mass;
        continue;
      }
      open(bins_[b]);
      for (std::size_t i = skip; i < members_.size(); ++i) {
        cumulative += mass(i);
        if (cumulative > target) return {key_id(members_[i]), z(i)};
      }
    }
    return last();
  }

 private:
  struct Bin {
    std::uint32_t index;  // bins of larger logits have larger indices
    std::int64_t size;
    double mass;  // relative to exp(shift_)
  };

  static Bits<D> bin_of(const void* row, std::int64_t id) {
    return ordered(read_bits<D>(row, id)) >> (8 * size_of(D) - 16);
  }

  // Those that are not empty, in descending order.
  void find_bins() {
    std::fill(table_.begin(), table_.end(), 0u);
    const void* row = row_;
    std::uint32_t* table = table_.data();
    for (std::int64_t id = 0; id < logits_.vocab; ++id) ++table[bin_of(row, id)];
    bins_.clear();
    for (std::uint32_t index = 65536; index-- > 0;) {
      if (table_[index]) bins_.push_back({index, table_[index], 0.0});
    }
  }

  // Finds the tokens of a bin, in order. Few slices have any, which a loop without branches finds
  // out for many at a time.
  void open(const Bin& bin) {
    constexpr std::int64_t slice = 256;
    const void* row = row_;
    const auto index = static_cast<Bits<D>>(bin.index);
    members_.clear();
    for (std::int64_t begin = 0; begin < logits_.vocab; begin += slice) {
      const std::int64_t end = std::min(begin + slice, logits_.vocab);
      Bits<D> any = 0;
      for (std::int64_t id = begin; id < end; ++id) any |= bin_of(row, id) == index;
      for (std::int64_t id = begin; any && id < end; ++id) {
        if (bin_of(row, id) == index) members_.push_back(to_key(read<D>(row, id), id));
      }
    }
    if (D == DType::float32) std::sort(members_.begin(), members_.end(), std::greater<>());
  }

  // The masses of the bins after `first`.
  void weigh(std::size_t first, double shift) {
    shift_ = shift;
    if constexpr (D == DType::float32) {
      for (std::size_t b = first; b < bins_.size(); ++b) table_[bins_[b].index] = b;
      for (std::int64_t id = 0; id < logits_.vocab; ++id) {
        const std::uint32_t index = bin_of(row_, id);
        if (index < bins_[first].index) bins_[table_[index]].mass += mass_of(read<D>(row_, id));
      }
    } else {
      for (std::size_t b = first + 1; b < bins_.size(); ++b) {
        const auto bits = disordered(static_cast<std::uint16_t>(bins_[b].index));
        bins_[b].mass = bins_[b].size * mass_of(from_bits<D, float>(std::uint32_t{bits}));
      }
    }
  }

  // Where rounding made a tail out of nothing, the last possible token takes the draw.
  std::pair<std::int64_t, double> last() {
    for (std::size_t b = bins_.size(); b-- > 0;) {
      open(bins_[b]);
      for (std::size_t i = members_.size(); i-- > 0;) {
        if (std::isfinite(z(i))) return {key_id(members_[i]), z(i)};
      }
    }
    return {-1, kNaN};
  }

  double z_of(float logit) const { return static_cast<double>(logit * factor_); }
  double mass_of(float logit) const { return std::exp(z_of(logit) - shift_); }
  double z(std::size_t member) const { return z_of(key_logit(members_[member])); }
  double mass(std::size_t member) const { return mass_of(key_logit(members_[member])); }

  const Logits& logits_;
  const void* row_ = nullptr;
  float factor_ = 1.0f;
  double shift_ = 0.0;
  std::vector<std::uint32_t> table_;  // of each index: the size, later the place in bins_
  std::vector<Bin> bins_;
  std::vector<Key> members_;
};

}  // namespace

void sample_tail(const Logits& logits, const std::int32_t* count, const double* fraction,
                 std::int64_t* token, double* z, int threads) {
  check(logits);
  std::vector<std::int64_t> rows;
  for (std::int64_t n = 0; n < logits.rows; ++n) {
    token[n] = -1;
    z[n] = kNaN;
    if (!(fraction[n] >= 0.0)) continue;
    if (count[n] < 0 || count[n] >= logits.vocab) {
      refuse("count must be 0 to ", logits.vocab - 1, " in a row that draws from a tail, not ",
             count[n], " (row ", n, ")");
    }
    rows.push_back(n);
  }
  const auto draws = static_cast<std::int64_t>(rows.size());
  with_dtype(logits.dtype, [&](auto dtype) {
    const auto team = std::min<std::int64_t>(threads, draws);
    std::vector<TailSampler<dtype()>> samplers(team, TailSampler<dtype()>(logits));
    parallel_for(threads, draws, [&](std::int64_t i, int thread) {
      const std::int64_t n = rows[i];
      std::tie(token[n], z[n]) = samplers[thread].draw(n, count[n], fraction[n]);
    });
  });
}

}  // namespace fastguide

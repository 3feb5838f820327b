// One row takes some dozens of exponentials, in fp64: nothing here is worth a vector loop. The
// logits are read only by the rows that draw from the tail, together, after all rows are done.
#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.hpp"
#include "parallel.hpp"

namespace fastguide {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr std::int64_t kTail = -1;          // source of a token that is no candidate
constexpr std::int64_t kMinColumns = 2048;  // fewer are not worth a thread

// Philox 4x32-10 keyed by the seed, at counter (position, 0, 0, 0): a number in [0, 1).
double philox_uniform(std::int64_t seed, std::int64_t position) {
  auto key0 = static_cast<std::uint32_t>(seed);
  auto key1 = static_cast<std::uint32_t>(static_cast<std::uint64_t>(seed) >> 32);
  std::uint32_t c0 = static_cast<std::uint32_t>(position), c1 = 0, c2 = 0, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t first = 0xD2511F53ull * c0, second = 0xCD9E8D57ull * c2;
    c0 = static_cast<std::uint32_t>(second >> 32) ^ c1 ^ key0;
    c2 = static_cast<std::uint32_t>(first >> 32) ^ c3 ^ key1;
    c1 = static_cast<std::uint32_t>(second);
    c3 = static_cast<std::uint32_t>(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const std::uint64_t bits = static_cast<std::uint64_t>(c0) << 21 | c1 >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

// log(1 / (1 + exp(-x))), without overflow.
double log_sigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }

double logsumexp(const double* x, std::int64_t n) {
  const double maximum = *std::max_element(x, x + n);
  if (std::isinf(maximum)) return maximum;
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += std::exp(x[i] - maximum);
  return maximum + std::log(sum);
}

double logaddexp(double a, double b) {
  const double terms[] = {a, b};
  return logsumexp(terms, 2);
}

// What the rows of one thread share: a number per column.
struct Columns {
  explicit Columns(std::int64_t n) : s(n), z(n), u(n) {}
  std::vector<double> s, z, u;
};

// s = sum of w_g f(V_g) over the guides, for the candidates; whether all are finite.
bool compose(const GuideSample& args, std::int64_t n, double* s) {
  const std::int64_t count = args.count[n];
  const bool squash = args.mode[n] & kLogSigmoid;
  std::fill_n(s, count, 0.0);
  for (std::int64_t g = 0; g < args.guides; ++g) {
    const std::int64_t row = g * args.logits.rows + n;
    const double w = args.guide_weights[row];
    if (w == 0.0) continue;
    for (std::int64_t i = 0; i < count; ++i) {
      const double found = args.scores[row * args.columns + i];
      s[i] += w * (squash ? log_sigmoid(found) : found);
    }
  }
  return std::all_of(s, s + count, [](double x) { return std::isfinite(x); });
}

// u = scale * z + weight * (s - shift); a column of z = -inf is no candidate.
void guide(const GuideSample& args, std::int64_t n, const Columns& c, double* u) {
  const std::int64_t count = args.count[n];
  double sum = 0.0, chosen = 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(c.z[i])) continue;
    sum += c.s[i];
    chosen += 1.0;
  }
  const bool centred = (args.mode[n] & kFill) == kFillMean;
  const double shift = centred ? sum / std::max(chosen, 1.0) : 0.0;
  for (std::int64_t i = 0; i < count; ++i) {
    u[i] = args.scale[n] * c.z[i] + args.weight[n] * (c.s[i] - shift);
    if (!std::isfinite(c.z[i])) u[i] = -kInf;
  }
}

// The log-mass of the tokens that are no candidates. A - C cancels where it is small, so it is
// held between what the first of them weighs and what they could weigh if all were like the first.
double tail_mass(const GuideSample& args, std::int64_t n, const double* z, double following) {
  if ((args.mode[n] & kFill) == kFillDrop) return -kInf;
  const double A = args.lse[n], C = logsumexp(z, args.count[n]);
  const double tail = A + std::log1p(-std::exp(std::min(C - A, 0.0)));
  const auto others = std::max<std::int64_t>(args.logits.vocab - args.count[n], 1);
  const double most = following + std::log(static_cast<double>(others));
  return std::min(std::max(tail, following), most);
}

void write(const GuideSample& args, std::int64_t n, std::int64_t token, std::int64_t source,
           double score, double logprob, double base_logprob, double kl) {
  args.token[n] = token;
  args.source[n] = source;
  args.score[n] = static_cast<float>(score);
  args.logprob[n] = static_cast<float>(logprob);
  args.base_logprob[n] = static_cast<float>(base_logprob);
  args.kl[n] = static_cast<float>(kl);
}

// Does all of a row but the draw from its tail: of a row that needs one, it leaves the fraction
// of the tail's mass, which is otherwise negative, and the normaliser.
void sample_row(const GuideSample& args, std::int64_t n, Columns& c, double& fraction,
                double& normaliser) {
  const std::int64_t count = args.count[n];
  const std::int64_t row = n * args.columns;
  const double A = args.lse[n];
  fraction = -1.0;
  if (!compose(args, n, c.s.data()) || !std::isfinite(A)) {
    return write(args, n, -1, kTail, kNaN, kNaN, kNaN, kNaN);
  }
  for (std::int64_t i = 0; i < count; ++i) c.z[i] = args.values[row + i];
  guide(args, n, c, c.u.data());
  const double following = count < args.columns ? args.values[row + count] : -kInf;
  const double tail = tail_mass(args, n, c.z.data(), following);
  const double Z = logaddexp(logsumexp(c.u.data(), count), tail);
  normaliser = Z;

  // The draw inverts the distribution function along the vocabulary in descending order.
  const double draw = philox_uniform(args.seed[n], args.position[n]);
  double cumulative = 0.0, kl = A - Z;
  std::int64_t index = 0, last = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const double prob = std::exp(c.u[i] - Z);
    cumulative += prob;
    index += cumulative <= draw;
    if (!std::isfinite(c.z[i])) continue;
    kl += prob * (c.u[i] - c.z[i]);
    last = i;
  }
  kl = std::max(kl, 0.0);  // rounding can leave -1e-9
  bool other_wins = false;
  if (args.mode[n] & kGreedy) {
    index = std::max_element(c.u.begin(), c.u.begin() + count) - c.u.begin();
    other_wins = (args.mode[n] & kFill) != kFillDrop && following > c.u[index];
    if (other_wins) index = count;
  } else if (tail == -kInf) {
    // Rounding can leave the last sum a little under 1; then the last candidate takes it.
    index = std::min(index, last);
  } else if (index > last) {
    fraction = std::clamp((draw - cumulative) / std::exp(tail - Z), 0.0, 1.0 - 0x1p-53);
    return write(args, n, -1, kTail, kNaN, kNaN, kNaN, kl);
  }
  const double picked_z = args.values[row + index];
  const double picked_u = other_wins ? picked_z : c.u[index];
  write(args, n, args.ids[row + index], other_wins ? kTail : index, other_wins ? kNaN : c.s[index],
        picked_u - Z, picked_z - A, kl);
}

void sample_tails(const GuideSample& args, const std::vector<double>& fractions,
                  const std::vector<double>& normalisers, int threads) {
  const std::int64_t rows = args.logits.rows;
  if (std::none_of(fractions.begin(), fractions.end(), [](double f) { return f >= 0.0; })) return;
  std::vector<std::int64_t> token(rows);
  std::vector<double> z(rows);
  sample_tail(args.logits, args.count, fractions.data(), token.data(), z.data(), threads);
  for (std::int64_t n = 0; n < rows; ++n) {
    if (!(fractions[n] >= 0.0)) continue;
    args.token[n] = token[n];
    args.logprob[n] = static_cast<float>(z[n] - normalisers[n]);
    args.base_logprob[n] = static_cast<float>(z[n] - args.lse[n]);
  }
}

}  // namespace

void guide_sample(const GuideSample& args, int threads) {
  check(args.logits);
  const std::int64_t rows = args.logits.rows;
  for (std::int64_t n = 0; n < rows; ++n) {
    if (args.count[n] < 1 || args.count[n] > args.columns) {
      refuse("count must be 1 to ", args.columns, ", the columns of values, not ", args.count[n],
             " (row ", n, ")");
    }
    const bool tail = (args.mode[n] & kFill) != kFillDrop && args.count[n] < args.logits.vocab;
    if (tail && args.count[n] == args.columns) {
      refuse("count must be at most ", args.columns - 1,
             " in a row with a tail, whose first token ", "is the next of the ", args.columns,
             " columns of values, not ", args.count[n], " (row ", n, ")");
    }
  }
  const auto worth = std::max<std::int64_t>(1, rows * args.columns / kMinColumns);
  const auto team = static_cast<int>(std::min<std::int64_t>(threads, worth));
  std::vector<Columns> columns(team, Columns(args.columns));
  std::vector<double> fractions(rows), normalisers(rows);
  parallel_for(team, rows, [&](std::int64_t n, int thread) {
    sample_row(args, n, columns[thread], fractions[n], normalisers[n]);
  });
  sample_tails(args, fractions, normalisers, threads);
  for (std::int64_t n = 0; n < rows; ++n) {
    if (args.token[n] < -1 || args.token[n] >= args.logits.vocab) {
      refuse("ids must be below ", args.logits.vocab, ", the size of the vocabulary, not ",
             args.token[n], " (row ", n, ")");
    }
  }
}

}  // namespace fastguide

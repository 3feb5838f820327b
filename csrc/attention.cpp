// A task is some query rows of one request against a piece of the slots that they see, block by
// block: keys are widened and transposed once and multiplied with all queries of their head, then
// comes the online softmax, then the same for the values. So every key and value is read from
// memory once per task. Pieces are merged by their log-sum-exp at the end.
#include "attention.hpp"

#include <limits>
#include <vector>

#include "attention_plan.hpp"
#include "matmul.hpp"
#include "parallel.hpp"

namespace fastguide {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// ---------------------------------------------------------------------------------- hot loops

// From dot products to logits.
struct Scale {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(float* scores, std::int64_t n, float scaling,
                                                float softcap) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      const F32 x = S::template load<F32>(scores + i) * scaling;
      S::store(scores + i, softcap == 0.0f ? x : S::tanh(x / softcap) * softcap);
    }
  }
};

// One query's running softmax: the output so far is a sum of values by exp(score - maximum), and
// `sum` the sum of these factors.
struct Running {
  float maximum = -kInf;
  float sum = 0.0f;
};

// Turns the scores of a block into factors of the values, and brings what was summed so far to the
// new maximum.
struct OnlineSoftmax {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(float* scores, std::int64_t queries,
                                                Running* running, float* out,
                                                std::int64_t out_width) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    for (std::int64_t q = 0; q < queries; ++q, scores += kBlock, out += out_width) {
      Running& state = running[q];
      F32 best = S::broadcast(state.maximum);
      for (int i = 0; i < kBlock; i += S::lanes) {
        best = S::max(best, S::template load<F32>(scores + i));
      }
      const float maximum = S::reduce_max(best);
      const float shift = maximum == -kInf ? 0.0f : maximum;
      F32 sum = {};
      for (int i = 0; i < kBlock; i += S::lanes) {
        const F32 factor = S::exp_nonpositive(S::template load<F32>(scores + i) - shift);
        S::store(scores + i, factor);
        sum += factor;
      }
      if (maximum != state.maximum) {
        const F32 shrink = S::exp_nonpositive(S::broadcast(state.maximum - maximum));
        state.sum *= shrink[0];
        for (std::int64_t e = 0; e < out_width; e += S::lanes) {
          S::store(out + e, S::template load<F32>(out + e) * shrink);
        }
        state.maximum = maximum;
      }
      state.sum += S::reduce_add(sum);
    }
  }
};

// One query's output from its pieces, each of which is `stride` after the one before.
template <DType D>
struct Merge {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* out, std::int64_t out_stride,
                                                const Running* running, std::int64_t running_stride,
                                                std::int64_t pieces, std::int64_t width, void* to) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    float maximum = -kInf;
    for (std::int64_t p = 0; p < pieces; ++p) {
      const float other = running[p * running_stride].maximum;
      maximum = other > maximum ? other : maximum;
    }
    F32 factors[kMaxPieces];
    F32 sum = {};
    for (std::int64_t p = 0; p < pieces; ++p) {
      const Running& piece = running[p * running_stride];
      factors[p] = S::exp_nonpositive(S::broadcast(piece.maximum - maximum));
      sum += factors[p] * piece.sum;
    }
    for (std::int64_t e = 0; e < width; e += S::lanes) {
      F32 total = {};
      for (std::int64_t p = 0; p < pieces; ++p) {
        total += factors[p] * S::template load<F32>(out + p * out_stride + e);
      }
      S::template narrow<D>(total / sum, at<D>(to, e), width - e);
    }
  }
};

// ------------------------------------------------------------------------------------- the work

template <DType D>
class Attention {
 public:
  Attention(const TreeAttention& args, const Plan& plan, Isa isa)
      : args_(args),
        plan_(plan),
        isa_(isa),
        key_width_(round_up(args.width, kPad)),
        value_width_(round_up(args.value_width, kPad)),
        running_(plan.queries),
        out_(plan.queries * value_width_),
        workers_(plan.team) {
    for (Worker& worker : workers_) {
      worker.queries.resize(plan.most_heads * plan.most_queries * key_width_);
      worker.scores.resize(plan.most_queries * kBlock);
      worker.packed.resize(kBlock * std::max(round_up(args.width, 2 * kPad), value_width_));
      worker.rows.resize(std::max(plan.most_queries, kBlock));
    }
  }

  void run() {
    const auto tasks = static_cast<std::int64_t>(plan_.tasks.size());
    const auto blocks = static_cast<std::int64_t>(plan_.blocks.size());
    parallel_for(plan_.team, tasks,
                 [&](std::int64_t t, int thread) { attend(plan_.tasks[t], workers_[thread]); });
    parallel_for(plan_.team, blocks * args_.kv_heads, [&](std::int64_t i, int) {
      merge(plan_.blocks[i / args_.kv_heads], i % args_.kv_heads);
    });
  }

 private:
  struct Worker {
    std::vector<float> queries;  // [heads, queries, key width]
    std::vector<float> scores;   // [queries, kBlock]
    std::vector<float> packed;   // keys as [width, kBlock], then values as [kBlock, value width]
    std::vector<const void*> rows;
  };

  // Those of a block.
  struct Slots {
    const std::int32_t* first;
    std::int64_t count;
  };

  std::int64_t scratch(const RowBlock& rows, std::int64_t head, std::int64_t piece) const {
    return rows.scratch + (head * rows.pieces + piece) * rows.count * plan_.group;
  }

  void attend(const Task& task, Worker& worker) {
    const RowBlock& rows = *task.rows;
    const std::int64_t queries = rows.count * plan_.group;
    for (std::int64_t h = 0; h < task.heads; ++h) {
      const std::int64_t head = task.first_head + h;
      for (std::int64_t q = 0; q < queries; ++q) {
        worker.rows[q] =
            args_.query.at(rows.first + q / plan_.group, head * plan_.group + q % plan_.group, D);
      }
      run_loop<Widen<D>>(isa_, worker.rows.data(), queries, args_.width,
                         &worker.queries[h * queries * key_width_]);
      const std::int64_t first = scratch(rows, head, task.piece);
      std::fill_n(&running_[first], queries, Running{});
      std::fill_n(&out_[first * value_width_], queries * value_width_, 0.0f);
    }
    const std::int64_t end = rows.piece_begin(task.piece + 1);
    for (std::int64_t block = rows.piece_begin(task.piece); block < end; ++block) {
      if (!seen(rows, block * kBlock)) continue;
      const Slots slots = slots_of(rows.request, block);
      touch(args_.keys, slots, task, args_.width);
      touch(args_.values, slots, task, args_.value_width);
      for (std::int64_t h = 0; h < task.heads; ++h) {
        const std::int64_t first = scratch(rows, task.first_head + h, task.piece);
        attend_block(rows, task.first_head + h, block * kBlock, slots,
                     &worker.queries[h * queries * key_width_], &running_[first],
                     &out_[first * value_width_], worker);
      }
    }
  }

  Slots slots_of(std::int64_t request, std::int64_t block) const {
    const TreeLayout& layout = args_.layout;
    const std::int64_t left = layout.slot_counts[request] - block * kBlock;
    return {layout.slots + layout.slot_starts[request] + block * kBlock, std::min(left, kBlock)};
  }

  // Reads a word of every cache line, slot after slot. The loops that follow go head by head, an
  // order in which memory gives a quarter of its bandwidth.
  void touch(const Heads& heads, const Slots& slots, const Task& task, std::int64_t width) const {
    constexpr std::int64_t line = 64 / size_of(D);
    for (std::int64_t i = 0; i < slots.count; ++i) {
      for (std::int64_t h = task.first_head; h < task.first_head + task.heads; ++h) {
        const void* row = heads.at(slots.first[i], h, D);
        for (std::int64_t j = 0; j < width; j += line) {
          static_cast<void>(*static_cast<const volatile char*>(at<D>(row, j)));
        }
      }
    }
  }

  void attend_block(const RowBlock& rows, std::int64_t head, std::int64_t begin, const Slots& slots,
                    const float* queries, Running* running, float* out, Worker& worker) {
    const std::int64_t count = rows.count * plan_.group, n = slots.count;
    float* scores = worker.scores.data();
    float* packed = worker.packed.data();
    const void** from = worker.rows.data();

    for (std::int64_t i = 0; i < n; ++i) from[i] = args_.keys.at(slots.first[i], head, D);
    run_loop<Transpose<D>>(isa_, from, n, args_.width, packed, kBlock);
    run_loop<MatMul>(isa_, queries, key_width_, packed, kBlock, scores, kBlock, count, kBlock,
                     args_.width, false);
    run_loop<Scale>(isa_, scores, count * kBlock, args_.scaling, args_.softcap);
    hide(rows, begin, scores);
    run_loop<OnlineSoftmax>(isa_, scores, count, running, out, value_width_);
    for (std::int64_t i = 0; i < n; ++i) from[i] = args_.values.at(slots.first[i], head, D);
    run_loop<Widen<D>>(isa_, from, n, args_.value_width, packed);
    run_loop<MatMul>(isa_, scores, kBlock, packed, value_width_, out, value_width_, count,
                     value_width_, n, true);
  }

  bool seen(const RowBlock& rows, std::int64_t begin) const {
    const auto first = plan_.sights.begin() + rows.first;
    return std::any_of(first, first + rows.count,
                       [&](const Sight& sight) { return sight.any(begin, begin + kBlock); });
  }

  // Scores of slots that a row does not see, and of those past the last, become -inf.
  void hide(const RowBlock& rows, std::int64_t begin, float* scores) const {
    for (std::int64_t i = 0; i < rows.count; ++i) {
      const Sight& sight = plan_.sights[rows.first + i];
      if (sight.all(begin, begin + kBlock)) continue;
      const std::int64_t hidden[3][2] = {{begin, sight.trunk_begin},
                                         {sight.trunk_end, sight.branch_begin},
                                         {sight.branch_end, begin + kBlock}};
      for (const auto& range : hidden) {
        const std::int64_t from = std::max(range[0] - begin, std::int64_t{0});
        const std::int64_t to = std::min(range[1] - begin, kBlock);
        for (std::int64_t g = 0; from < to && g < plan_.group; ++g) {
          std::fill_n(scores + (i * plan_.group + g) * kBlock + from, to - from, -kInf);
        }
      }
    }
  }

  void merge(const RowBlock& rows, std::int64_t head) {
    const std::int64_t queries = rows.count * plan_.group;
    const std::int64_t first = scratch(rows, head, 0);
    for (std::int64_t q = 0; q < queries; ++q) {
      const std::int64_t row = rows.first + q / plan_.group;
      const std::int64_t of = head * plan_.group + q % plan_.group;
      run_loop<Merge<D>>(isa_, &out_[(first + q) * value_width_], queries * value_width_,
                         &running_[first + q], queries, rows.pieces, args_.value_width,
                         at<D>(args_.out, (row * args_.heads + of) * args_.value_width));
    }
  }

  const TreeAttention& args_;
  const Plan& plan_;
  const Isa isa_;
  const std::int64_t key_width_, value_width_;  // padded
  std::vector<Running> running_;                // of each query, head and piece
  std::vector<float> out_;                      // likewise, [value width]
  std::vector<Worker> workers_;
};

}  // namespace

void tree_attention(const TreeAttention& args, Isa isa, int threads) {
  const Plan plan(args, threads);
  with_dtype(args.dtype, [&](auto dtype) { Attention<dtype()>(args, plan, isa).run(); });
}

}  // namespace fastguide

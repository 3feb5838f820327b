// Two passes over the adapters. The first multiplies chunks of the inputs with A, each by itself;
// their sums, of `rank` numbers per row, are small. The second multiplies them with B, block by
// block of the outputs.
#include "lora.hpp"

#include <algorithm>
#include <vector>

#include "check.hpp"
#include "matmul.hpp"
#include "parallel.hpp"

namespace fastguide {
namespace {

constexpr std::int64_t kChunk = 256;         // inputs
constexpr std::int64_t kBlock = 64;          // outputs
constexpr std::int64_t kRows = 72;           // rows that stay in the caches
constexpr std::int64_t kMinShare = 1 << 19;  // multiplications that are worth a thread

// out = base + sums, for a row.
template <DType D>
struct Add {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const void* base, const float* sums, std::int64_t n,
                                                void* out) {
    using S = Simd<Bytes>;
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      const auto before = S::template widen<D>(at<D>(base, i), n - i);
      const auto sum = S::template load<typename S::F32>(sums + i);
      S::template narrow<D>(before + sum, at<D>(out, i), n - i);
    }
  }
};

template <DType D>
class Lora {
 public:
  Lora(const LoraRows& args, Isa isa, int threads)
      : args_(args),
        isa_(isa),
        padded_rank_(round_up(args.rank, kPad)),
        chunks_((args.inputs + kChunk - 1) / kChunk),
        blocks_((args.outputs + kBlock - 1) / kBlock),
        sums_(chunks_ * args.rows * padded_rank_) {
    const std::int64_t products = args.rows * args.rank * (args.inputs + args.outputs);
    team_ = static_cast<int>(std::clamp<std::int64_t>(products / kMinShare, 1, threads));
    workers_.resize(team_);
    for (Worker& worker : workers_) {
      worker.packed.resize(std::max(kChunk * padded_rank_, round_up(args.rank, 2 * kPad) * kBlock));
      worker.rows.resize(kRows * kChunk);
      worker.pointers.resize(std::max({kRows, kBlock, args.rank}));
    }
  }

  void run() {
    const std::int64_t row_size = args_.outputs * size_of(D);
    const auto copy = [&](std::int64_t n) {
      if (args_.out == args_.base) return;
      std::memcpy(at<D>(args_.out, n * args_.outputs), at<D>(args_.base, n * args_.base_stride),
                  row_size);
    };
    for (std::int64_t n = 0; n < args_.segments[0]; ++n) copy(n);
    for (std::int64_t n = args_.segments[args_.adapters]; n < args_.rows; ++n) copy(n);
    parallel_for(team_, args_.adapters * chunks_, [&](std::int64_t task, int thread) {
      shrink(task / chunks_, task % chunks_, workers_[thread]);
    });
    const std::int64_t size = args_.rows * padded_rank_;
    for (std::int64_t chunk = 1; chunk < chunks_; ++chunk) {
      for (std::int64_t i = 0; i < size; ++i) sums_[i] += sums_[chunk * size + i];
    }
    parallel_for(team_, args_.adapters * blocks_, [&](std::int64_t task, int thread) {
      expand(task / blocks_, task % blocks_, workers_[thread]);
    });
  }

 private:
  struct Worker {
    std::vector<float> packed;  // a chunk of A or a block of B, transposed
    std::vector<float> rows;    // of x, or of the result
    std::vector<const void*> pointers;
  };

  // sums[chunk][n] = A x[n] over a chunk of the inputs.
  void shrink(std::int64_t g, std::int64_t chunk, Worker& worker) {
    const std::int64_t first = chunk * kChunk, width = std::min(kChunk, args_.inputs - first);
    for (std::int64_t j = 0; j < args_.rank; ++j) {
      worker.pointers[j] = at<D>(args_.a, (g * args_.rank + j) * args_.inputs + first);
    }
    run_loop<Transpose<D>>(isa_, worker.pointers.data(), args_.rank, width, worker.packed.data(),
                           padded_rank_);
    for (std::int64_t n = args_.segments[g]; n < args_.segments[g + 1]; n += kRows) {
      const std::int64_t count = std::min<std::int64_t>(kRows, args_.segments[g + 1] - n);
      for (std::int64_t i = 0; i < count; ++i) {
        worker.pointers[i] = at<D>(args_.x, (n + i) * args_.x_stride + first);
      }
      run_loop<Widen<D>>(isa_, worker.pointers.data(), count, width, worker.rows.data());
      run_loop<MatMul>(isa_, worker.rows.data(), round_up(width, kPad), worker.packed.data(),
                       padded_rank_, &sums_[(chunk * args_.rows + n) * padded_rank_], padded_rank_,
                       count, padded_rank_, width, false);
    }
  }

  // out[n] = base[n] + B sums[n], for a block of the outputs.
  void expand(std::int64_t g, std::int64_t block, Worker& worker) {
    const std::int64_t first = block * kBlock, width = std::min(kBlock, args_.outputs - first);
    for (std::int64_t o = 0; o < width; ++o) {
      worker.pointers[o] = at<D>(args_.b, (g * args_.outputs + first + o) * args_.rank);
    }
    run_loop<Transpose<D>>(isa_, worker.pointers.data(), width, args_.rank, worker.packed.data(),
                           kBlock);
    for (std::int64_t n = args_.segments[g]; n < args_.segments[g + 1]; n += kRows) {
      const std::int64_t count = std::min<std::int64_t>(kRows, args_.segments[g + 1] - n);
      run_loop<MatMul>(isa_, &sums_[n * padded_rank_], padded_rank_, worker.packed.data(), kBlock,
                       worker.rows.data(), kBlock, count, kBlock, args_.rank, false);
      for (std::int64_t i = n; i < n + count; ++i) {
        run_loop<Add<D>>(isa_, at<D>(args_.base, i * args_.base_stride + first),
                         &worker.rows[(i - n) * kBlock], width,
                         at<D>(args_.out, i * args_.outputs + first));
      }
    }
  }

  const LoraRows& args_;
  const Isa isa_;
  const std::int64_t padded_rank_, chunks_, blocks_;
  std::vector<float> sums_;  // [chunks, rows, padded rank]; the first of chunks is their total
  int team_;
  std::vector<Worker> workers_;
};

}  // namespace

void add_lora(const PackedLora& args, Isa isa, int threads) {
  constexpr std::int64_t kTile = 24, kColumns = 256;  // of rows and outputs, for a task
  const std::int64_t products = args.rows * args.rank * (args.inputs + args.outputs);
  const int team = static_cast<int>(std::clamp<std::int64_t>(products / kMinShare, 1, threads));
  const std::int64_t tiles = (args.rows + kTile - 1) / kTile;
  const std::int64_t blocks = (args.outputs + kColumns - 1) / kColumns;
  parallel_for(team, args.adapters * tiles, [&](std::int64_t task, int) {
    const std::int64_t g = task / tiles, first = args.segments[g] + task % tiles * kTile;
    const std::int64_t count = std::min<std::int64_t>(kTile, args.segments[g + 1] - first);
    if (count <= 0) return;
    run_loop<MatMul>(isa, args.x + first * args.inputs, args.inputs,
                     args.a + g * args.inputs * args.rank, args.rank, args.sums + first * args.rank,
                     args.rank, count, args.rank, args.inputs, false);
  });
  parallel_for(team, args.adapters * blocks, [&](std::int64_t task, int) {
    const std::int64_t g = task / blocks, column = task % blocks * kColumns;
    const std::int64_t first = args.segments[g], count = args.segments[g + 1] - first;
    if (count <= 0) return;
    run_loop<MatMul>(isa, args.sums + first * args.rank, args.rank,
                     args.b + g * args.rank * args.outputs + column, args.outputs,
                     args.out + first * args.outputs + column, args.outputs, count,
                     std::min(kColumns, args.outputs - column), args.rank, true);
  });
}

void lora_rows(const LoraRows& args, Isa isa, int threads) {
  for (std::int64_t g = 0; g <= args.adapters; ++g) {
    const std::int64_t least = g ? args.segments[g - 1] : 0;
    if (args.segments[g] >= least && args.segments[g] <= args.rows) continue;
    refuse("segments must ascend from 0 to at most ", args.rows, ", not hold ", args.segments[g],
           " after ", least, " (index ", g, ")");
  }
  with_dtype(args.dtype, [&](auto dtype) { Lora<dtype()>(args, isa, threads).run(); });
}

}  // namespace fastguide

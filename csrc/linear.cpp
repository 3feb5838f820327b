#include "linear.hpp"

#include <algorithm>
#include <vector>

#include "parallel.hpp"

namespace fastguide {
namespace {

constexpr std::int64_t kHeight = 6;   // rows of a tile
constexpr std::int64_t kDepth = 256;  // inputs whose products are summed before they are added
constexpr std::int64_t kRows = 96;    // of x, that stay in the L2 cache beside a panel
constexpr std::int64_t kMinShare = 1 << 16;  // multiplications that are worth a thread

// sums[h][j] = x[h] panel for `height` rows: a tile of height x kPanel numbers.
template <DType D>
struct Tile {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* x, std::int64_t stride,
                                                const void* panel, std::int64_t inputs,
                                                std::int64_t height, float* sums) {
    constexpr int width = Bytes == 64 ? 4 : 2;  // with kHeight rows, these fill the registers
    for (std::int64_t d = 0; d < inputs; d += kDepth) {
      const std::int64_t depth = std::min(kDepth, inputs - d);
      const std::uint32_t* words =
          static_cast<const std::uint32_t*>(panel) + kPanel * (D == DType::float32 ? d : d / 2);
      for (std::int64_t j = 0; j < kPanel; j += width * Simd<Bytes>::lanes) {
        any_height<Bytes, kHeight, width>(x + d, stride, words + j, depth, height, sums + j, d > 0);
      }
    }
  }

 private:
  template <int Bytes, int Height, int Width>
  [[gnu::always_inline]] static inline void any_height(const float* x, std::int64_t stride,
                                                       const std::uint32_t* words,
                                                       std::int64_t depth, std::int64_t height,
                                                       float* sums, bool add) {
    if (height == Height) return tile<Bytes, Height, Width>(x, stride, words, depth, sums, add);
    if constexpr (Height > 1) {
      any_height<Bytes, Height - 1, Width>(x, stride, words, depth, height, sums, add);
    }
  }

  template <int Bytes, int Height, int Width>
  [[gnu::always_inline]] static inline void tile(const float* x, std::int64_t stride,
                                                 const std::uint32_t* words, std::int64_t depth,
                                                 float* out, bool add) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    using U32 = typename S::U32;
    F32 sums[Height][Width] = {};
    if constexpr (D == DType::float32) {
      for (std::int64_t i = 0; i < depth; ++i, words += kPanel) {
        F32 w[Width];
#pragma GCC unroll 4
        for (int j = 0; j < Width; ++j) w[j] = S::template load<F32>(words + j * S::lanes);
#pragma GCC unroll 6
        for (int h = 0; h < Height; ++h) {
          const float a = x[h * stride + i];
#pragma GCC unroll 4
          for (int j = 0; j < Width; ++j) sums[h][j] += a * w[j];
        }
      }
    } else {
      std::int64_t i = 0;
      for (; i + 1 < depth; i += 2, words += kPanel) {
#pragma GCC unroll 4
        for (int j = 0; j < Width; ++j) {
          const U32 word = S::template load<U32>(words + j * S::lanes);
          const F32 low = S::template low<D>(word), high = S::template high<D>(word);
#pragma GCC unroll 6
          for (int h = 0; h < Height; ++h) sums[h][j] += x[h * stride + i] * low;
#pragma GCC unroll 6
          for (int h = 0; h < Height; ++h) sums[h][j] += x[h * stride + i + 1] * high;
        }
      }
      if (i < depth) {  // an odd number of inputs: the other half of the last word is no weight
#pragma GCC unroll 4
        for (int j = 0; j < Width; ++j) {
          const F32 low = S::template low<D>(S::template load<U32>(words + j * S::lanes));
#pragma GCC unroll 6
          for (int h = 0; h < Height; ++h) sums[h][j] += x[h * stride + i] * low;
        }
      }
    }
#pragma GCC unroll 6
    for (int h = 0; h < Height; ++h) {
#pragma GCC unroll 4
      for (int j = 0; j < Width; ++j) {
        float* to = out + h * kPanel + j * S::lanes;
        S::store(to, add ? S::template load<F32>(to) + sums[h][j] : sums[h][j]);
      }
    }
  }
};

// A finished tile goes to the outputs of its panel.
void hand_over(const Product& product, std::int64_t panel, std::int64_t first, std::int64_t height,
               const float* sums) {
  const std::int64_t column = panel * kPanel;
  const std::int64_t width = std::min(kPanel, product.weight.outputs - column);
  for (std::int64_t h = 0; h < height; ++h, sums += kPanel) {
    float* out = product.out + (first + h) * product.weight.outputs + column;
    for (std::int64_t j = 0; j < width; ++j) {
      const float sum = product.bias ? sums[j] + product.bias[column + j] : sums[j];
      out[j] = product.add ? out[j] + sum : sum;
    }
  }
}

// The panel of a product by its number among the panels of all.
std::int64_t locate(const Product* products, std::int64_t panel, std::int64_t& which) {
  which = 0;
  while (panel >= products[which].weight.panels()) panel -= products[which++].weight.panels();
  return panel;
}

struct Round {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* x, std::int64_t n, void* out) {
    using S = Simd<Bytes>;
    for (std::int64_t i = 0; i < n; i += S::lanes) {
      const auto v = S::template widen<DType::float32>(x + i, n - i);
      S::template narrow<DType::bfloat16>(v, at<DType::bfloat16>(out, i), n - i);
    }
  }
};

}  // namespace

void pack_weight(const PackedWeight& shape, const void* weight, std::int64_t stride, void* packed,
                 int threads) {
  with_dtype(shape.dtype, [&](auto dtype) {
    constexpr DType D = dtype();
    constexpr std::int64_t together = D == DType::float32 ? 1 : 2;  // inputs of a word
    parallel_for(threads, shape.panels(), [&](std::int64_t panel, int) {
      auto* words = static_cast<std::uint32_t*>(packed) + panel * shape.panel_bytes() / 4;
      for (std::int64_t i = 0; i < shape.inputs; i += together) {
        for (std::int64_t o = panel * kPanel; o < (panel + 1) * kPanel; ++o, ++words) {
          const std::int64_t from = o * stride + i;
          *words = o < shape.outputs ? std::uint32_t{read_bits<D>(weight, from)} : 0;
          if (together == 2 && o < shape.outputs && i + 1 < shape.inputs) {
            *words |= std::uint32_t{read_bits<D>(weight, from + 1)} << 16;
          }
        }
      }
    });
  });
}

void multiply(const float* x, std::int64_t rows, const Product* products, std::int64_t count,
              Isa isa, int threads) {
  const std::int64_t inputs = products[0].weight.inputs;
  std::int64_t panels = 0;
  for (std::int64_t p = 0; p < count; ++p) panels += products[p].weight.panels();
  const std::int64_t blocks = (rows + kRows - 1) / kRows;
  const std::int64_t share = rows * inputs * panels * kPanel / kMinShare;
  const int team = static_cast<int>(std::clamp<std::int64_t>(share, 1, threads));
  const bool exact =
      products[0].weight.dtype != DType::bfloat16 || isa != Isa::avx512 || !has_bf16_products();
  const std::int64_t pairs = (inputs + 1) / 2;
  std::vector<std::uint32_t> halves;
  if (!exact) {
    halves.resize(rows * pairs);
    for (std::int64_t n = 0; n < rows; ++n) {
      run_loop<Round>(isa, x + n * inputs, inputs, static_cast<void*>(&halves[n * pairs]));
    }
  }
  parallel_for(team, blocks * panels, [&](std::int64_t task, int) {
    std::int64_t which;
    const std::int64_t panel = locate(products, task % panels, which);
    const Product& product = products[which];
    const PackedWeight& weight = product.weight;
    const char* data = static_cast<const char*>(weight.data) + panel * weight.panel_bytes();
    const std::int64_t end = std::min(rows, (task / panels + 1) * kRows);
    float sums[kHeight * kPanel];
    for (std::int64_t n = task / panels * kRows; n < end; n += kHeight) {
      const std::int64_t height = std::min(kHeight, end - n);
      if (exact) {
        with_dtype(weight.dtype, [&](auto dtype) {
          run_loop<Tile<dtype()>>(isa, x + n * inputs, inputs, static_cast<const void*>(data),
                                  inputs, height, static_cast<float*>(sums));
        });
      } else {
        bf16_tile(&halves[n * pairs], pairs, reinterpret_cast<const std::uint32_t*>(data), pairs,
                  height, sums);
      }
      hand_over(product, panel, n, height, sums);
    }
  });
}

}  // namespace fastguide

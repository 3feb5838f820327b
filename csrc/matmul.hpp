// Small matrix products in fp32, and the packing of their operands from rows of any format that
// lie anywhere. Hot loops: see simd.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtype.hpp"
#include "simd.hpp"

namespace fastguide {

constexpr std::int64_t round_up(std::int64_t n, std::int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Padding of rows of floats: a vector of any width then ends where a row does.
constexpr std::int64_t kPad = 16;

// out[i][j] = rows[i][j], for i < n and j < width, and 0 up to the padding.
template <DType D>
struct Widen {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const void* const* rows, std::int64_t n,
                                                std::int64_t width, float* out) {
    using S = Simd<Bytes>;
    const std::int64_t padded = round_up(width, kPad);
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < padded; j += S::lanes) {
        S::store(out + j, S::template widen<D>(at<D>(rows[i], j), width - j));
      }
      out += padded;
    }
  }
};

// out[j][i] = rows[i][j], for i < n and j < width; out has `columns` columns, a multiple of kPad,
// and round_up(width, 2 * kPad) rows. What is past n or width is 0. Words that hold two 16-bit
// numbers are transposed as they are, and split afterwards.
template <DType D>
struct Transpose {
  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const void* const* rows, std::int64_t n,
                                                std::int64_t width, float* out,
                                                std::int64_t columns) {
    using S = Simd<Bytes>;
    using U32 = typename S::U32;
    const std::int64_t bytes = width * size_of(D);
    for (std::int64_t i = 0; i < columns; i += S::lanes) {
      for (std::int64_t at = 0; at < bytes; at += Bytes) {
        U32 square[S::lanes];
#pragma GCC unroll 16
        for (int r = 0; r < S::lanes; ++r) {
          square[r] = U32{};
          if (i + r >= n) continue;
          const char* from = static_cast<const char*>(rows[i + r]) + at;
          if (at + Bytes <= bytes) {
            square[r] = S::template load<U32>(from);
          } else {
            std::memcpy(&square[r], from, bytes - at);
          }
        }
        S::transpose(square);
        float* to = out + at / size_of(D) * columns + i;
#pragma GCC unroll 16
        for (int w = 0; w < S::lanes; ++w) {
          if constexpr (D == DType::float32) {
            S::store(to + w * columns, square[w]);
          } else {
            S::store(to + 2 * w * columns, S::template low<D>(square[w]));
            S::store(to + (2 * w + 1) * columns, S::template high<D>(square[w]));
          }
        }
      }
    }
  }
};

// c = a b, or c += a b: a is [rows, depth], b is [depth, columns] with columns a multiple of kPad.
// Sums are made of sums of kDepth products, for precision; those of a row do not depend on the
// other rows.
struct MatMul {
  static constexpr std::int64_t kDepth = 64;

  template <int Bytes>
  [[gnu::always_inline]] static inline void run(const float* a, std::int64_t a_stride,
                                                const float* b, std::int64_t b_stride, float* c,
                                                std::int64_t c_stride, std::int64_t rows,
                                                std::int64_t columns, std::int64_t depth,
                                                bool add) {
    // With 6 rows, this many vectors fill the registers.
    constexpr int wide = Bytes == 64 ? 4 : 2;
    constexpr int lanes = Simd<Bytes>::lanes;
    for (std::int64_t d = 0; d < depth; d += kDepth) {
      const std::int64_t products = depth - d < kDepth ? depth - d : kDepth;
      for (std::int64_t j = 0; j < columns;) {
        const bool whole = columns - j >= wide * lanes;
        for (std::int64_t i = 0; i < rows; i += 6) {
          const Tile tile = {a + i * a_stride + d,
                             a_stride,
                             b + d * b_stride + j,
                             b_stride,
                             c + i * c_stride + j,
                             c_stride,
                             products,
                             add || d > 0};
          const int height = static_cast<int>(rows - i < 6 ? rows - i : 6);
          whole ? any_height<Bytes, 6, wide>(tile, height) : any_height<Bytes, 6, 1>(tile, height);
        }
        j += whole ? wide * lanes : lanes;
      }
    }
  }

 private:
  struct Tile {
    const float* a;
    std::int64_t a_stride;
    const float* b;
    std::int64_t b_stride;
    float* c;
    std::int64_t c_stride;
    std::int64_t depth;
    bool add;
  };

  template <int Bytes, int Height, int Width>
  [[gnu::always_inline]] static inline void any_height(const Tile& tile, int height) {
    if (height == Height) return multiply<Bytes, Height, Width>(tile);
    if constexpr (Height > 1) any_height<Bytes, Height - 1, Width>(tile, height);
  }

  // Height x Width vectors of sums stay in registers.
  template <int Bytes, int Height, int Width>
  [[gnu::always_inline]] static inline void multiply(const Tile& tile) {
    using S = Simd<Bytes>;
    using F32 = typename S::F32;
    F32 sums[Height][Width] = {};
    for (std::int64_t d = 0; d < tile.depth; ++d) {
      F32 b[Width];
#pragma GCC unroll 4
      for (int j = 0; j < Width; ++j) {
        b[j] = S::template load<F32>(tile.b + d * tile.b_stride + j * S::lanes);
      }
#pragma GCC unroll 6
      for (int i = 0; i < Height; ++i) {
        const float a = tile.a[i * tile.a_stride + d];
#pragma GCC unroll 4
        for (int j = 0; j < Width; ++j) sums[i][j] += a * b[j];
      }
    }
#pragma GCC unroll 6
    for (int i = 0; i < Height; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < Width; ++j) {
        float* c = tile.c + i * tile.c_stride + j * S::lanes;
        S::store(c, tile.add ? S::template load<F32>(c) + sums[i][j] : sums[i][j]);
      }
    }
  }
};

}  // namespace fastguide

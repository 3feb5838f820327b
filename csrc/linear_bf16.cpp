// Products of bf16 numbers by AVX-512 BF16, in a file of its own because it is written in
// intrinsics.
#include "linear.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastguide {

#if defined(__x86_64__)

bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16"); }

namespace {

constexpr std::int64_t kDepth = 256;  // pairs whose products are summed before they are added

template <int Height>
[[gnu::target("arch=x86-64-v4,avx512bf16")]] void tile(const std::uint32_t* x,
                                                       std::int64_t x_stride,
                                                       const std::uint32_t* panel,
                                                       std::int64_t pairs, float* out) {
  for (std::int64_t d = 0; d < pairs; d += kDepth) {
    const std::int64_t end = d + kDepth < pairs ? d + kDepth : pairs;
    __m512 sums[Height][4];
#pragma GCC unroll 6
    for (int h = 0; h < Height; ++h) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[h][j] = _mm512_setzero_ps();
    }
    for (std::int64_t i = d; i < end; ++i) {
      __m512i words[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) words[j] = _mm512_loadu_si512(panel + i * kPanel + 16 * j);
#pragma GCC unroll 6
      for (int h = 0; h < Height; ++h) {
        const __m512i pair = _mm512_set1_epi32(static_cast<int>(x[h * x_stride + i]));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          sums[h][j] = _mm512_dpbf16_ps(sums[h][j], (__m512bh)pair, (__m512bh)words[j]);
        }
      }
    }
#pragma GCC unroll 6
    for (int h = 0; h < Height; ++h) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        float* to = out + h * kPanel + 16 * j;
        const __m512 before = d ? _mm512_loadu_ps(to) : _mm512_setzero_ps();
        _mm512_storeu_ps(to, _mm512_add_ps(before, sums[h][j]));
      }
    }
  }
}

}  // namespace

void bf16_tile(const std::uint32_t* x, std::int64_t x_stride, const std::uint32_t* panel,
               std::int64_t pairs, std::int64_t height, float* sums) {
  switch (height) {
    case 1:
      return tile<1>(x, x_stride, panel, pairs, sums);
    case 2:
      return tile<2>(x, x_stride, panel, pairs, sums);
    case 3:
      return tile<3>(x, x_stride, panel, pairs, sums);
    case 4:
      return tile<4>(x, x_stride, panel, pairs, sums);
    case 5:
      return tile<5>(x, x_stride, panel, pairs, sums);
    default:
      return tile<6>(x, x_stride, panel, pairs, sums);
  }
}

#else

bool has_bf16_products() { return false; }

void bf16_tile(const std::uint32_t*, std::int64_t, const std::uint32_t*, std::int64_t, std::int64_t,
               float*) {}

#endif

}  // namespace fastguide

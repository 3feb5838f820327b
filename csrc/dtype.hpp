// The number formats of tensors, read without torch: 16-bit formats arrive as raw words.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace fastguide {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr std::int64_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// A word that holds nothing but -infinity, once or twice.
constexpr std::uint32_t minus_infinity(DType dtype) {
  if (dtype == DType::float32) return 0xff800000u;
  return dtype == DType::bfloat16 ? 0xff80ff80u : 0xfc00fc00u;
}

template <typename To, typename From>
[[gnu::always_inline]] inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The number of format D in the low bits of a word; F and U are scalars or vectors.
template <DType D, typename F, typename U>
[[gnu::always_inline]] inline F from_bits(U bits) {
  if constexpr (D == DType::float32) return bits_as<F>(bits);
  if constexpr (D == DType::bfloat16) return bits_as<F>(bits << 16);
  // The exponent is rebiased by a multiplication, which also makes subnormals right.
  const F magnitude = bits_as<F>((bits & 0x7fffu) << 13) * 0x1p112f;
  const U infinite = magnitude >= 65536.0f ? U{} + 0x7f800000u : U{};
  return bits_as<F>(bits_as<U>(magnitude) | infinite | (bits & 0x8000u) << 16);
}

// The bits of one number of format D.
template <DType D>
using Bits = std::conditional_t<D == DType::float32, std::uint32_t, std::uint16_t>;

// The address of element i of an array of format D.
template <DType D>
[[gnu::always_inline]] inline const char* at(const void* array, std::int64_t i) {
  return static_cast<const char*>(array) + i * size_of(D);
}
template <DType D>
[[gnu::always_inline]] inline char* at(void* array, std::int64_t i) {
  return static_cast<char*>(array) + i * size_of(D);
}

// That element, as bits and as a number.
template <DType D>
[[gnu::always_inline]] inline Bits<D> read_bits(const void* array, std::int64_t i) {
  Bits<D> bits;
  std::memcpy(&bits, at<D>(array, i), sizeof bits);
  return bits;
}
template <DType D>
[[gnu::always_inline]] inline float read(const void* array, std::int64_t i) {
  return from_bits<D, float>(std::uint32_t{read_bits<D>(array, i)});
}

// Calls body with the format as a compile-time constant.
template <typename Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::float32:
      return body(std::integral_constant<DType, DType::float32>{});
    case DType::bfloat16:
      return body(std::integral_constant<DType, DType::bfloat16>{});
    case DType::float16:
      return body(std::integral_constant<DType, DType::float16>{});
  }
}

}  // namespace fastguide

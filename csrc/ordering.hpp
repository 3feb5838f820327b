// The order of logits that every op shares: descending, ties by the lower id.
#pragma once

#include <cstdint>

#include "dtype.hpp"

namespace fastguide {

// Unsigned numbers, ordered like the floating-point numbers that the bits stand for: -0 and 0 are
// one number, NaN comes before infinity or after -infinity.
template <typename Bits>
[[gnu::always_inline]] inline Bits ordered(Bits bits) {
  constexpr int top = 8 * sizeof(Bits) - 1;
  constexpr Bits sign = Bits(1) << top;
  const Bits flipped = Bits(-(bits >> top)) | sign;  // all bits of a negative number
  return Bits(bits ^ flipped) + Bits(bits == sign);  // a branch would be mispredicted
}

template <typename Bits>
[[gnu::always_inline]] inline Bits disordered(Bits bits) {
  constexpr Bits sign = Bits(1) << (8 * sizeof(Bits) - 1);
  return bits & sign ? Bits(bits ^ sign) : Bits(~bits);
}

// A logit with its token: a larger key is a larger logit, then a lower id.
using Key = std::uint64_t;

inline Key to_key(float logit, std::int64_t id) {
  const Key upper = ordered(bits_as<std::uint32_t>(logit));
  return upper << 32 | (0xffffffffu - static_cast<std::uint32_t>(id));
}

inline float key_logit(Key key) {
  return bits_as<float>(disordered(static_cast<std::uint32_t>(key >> 32)));
}

inline std::int32_t key_id(Key key) {
  return static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(key));
}

}  // namespace fastguide

// Vectors whose width is a template argument, and the choice of a width at run time.
//
// A hot loop is written once, as a struct with an always_inline `template <int Bytes> run`, and
// `run_loop` compiles it for every instruction set: GCC and Clang lower operations on their vector
// types after inlining, into the instructions of the function they end up in. Only the functions
// `on_*` carry a target. All else is compiled for the plain machine, so that no function which the
// linker shares between files can need a newer one.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "dtype.hpp"

namespace fastguide {

enum class Isa : int { generic = 0, avx2 = 1, avx512 = 2 };

inline bool supported(Isa isa) {
#ifdef __x86_64__
  if (isa == Isa::avx512) return __builtin_cpu_supports("x86-64-v4");
  if (isa == Isa::avx2) return __builtin_cpu_supports("x86-64-v3");
#endif
  return isa == Isa::generic;
}

// A template of its own, because GCC takes a type that depends on an attribute's argument for a
// vector only where it comes from elsewhere.
template <typename T, int Bytes>
struct Vector {
  typedef T type __attribute__((vector_size(Bytes)));
};

template <int Bytes>
struct Simd {
  static constexpr int lanes = Bytes / 4;

  using F32 = typename Vector<float, Bytes>::type;
  using U32 = typename Vector<std::uint32_t, Bytes>::type;
  using U16 = typename Vector<std::uint16_t, Bytes / 2>::type;
  using Mask = typename Vector<std::int32_t, Bytes>::type;  // of a comparison: 0 or -1

  template <typename V>
  [[gnu::always_inline]] static inline V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
  }

  template <typename V>
  [[gnu::always_inline]] static inline void store(void* to, V v) {
    std::memcpy(to, &v, sizeof v);
  }

  // -0 becomes 0.
  [[gnu::always_inline]] static inline F32 broadcast(float x) { return x + F32{}; }

  // A NaN in `next` is passed over, one in `best` stays.
  [[gnu::always_inline]] static inline F32 max(F32 best, F32 next) {
    return next > best ? next : best;
  }

  // ----------------------------------------------------------------------------- conversions

  // `lanes` numbers of format D.
  template <DType D>
  [[gnu::always_inline]] static inline F32 widen(const void* from) {
    if constexpr (D == DType::float32) return load<F32>(from);
    return from_bits<D, F32>(__builtin_convertvector(load<U16>(from), U32));
  }

  // The 16-bit number of format D in the low or the high half of each word.
  template <DType D>
  [[gnu::always_inline]] static inline F32 low(U32 words) {
    if constexpr (D == DType::bfloat16) return bits_as<F32>(words << 16);
    return from_bits<D, F32>(words & 0xffffu);
  }
  template <DType D>
  [[gnu::always_inline]] static inline F32 high(U32 words) {
    if constexpr (D == DType::bfloat16) return bits_as<F32>(words & 0xffff0000u);
    return from_bits<D, F32>(words >> 16);
  }

  // Rounds to the nearest, ties to even.
  template <DType D>
  [[gnu::always_inline]] static inline void narrow(F32 v, void* to) {
    const U32 bits = bits_as<U32>(v);
    const U32 magnitude = bits & 0x7fffffffu;
    const Mask nan = magnitude > 0x7f800000u;
    if constexpr (D == DType::float32) {
      store(to, v);
    } else if constexpr (D == DType::bfloat16) {
      const U32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
      store(to, __builtin_convertvector(nan ? U32{} + 0x7fc0u : rounded, U16));
    } else {
      const U32 normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
      // The addition rounds: the last bit of a number in [1/2, 1) is 2^-24, as of a subnormal.
      const U32 subnormal = bits_as<U32>(bits_as<F32>(magnitude) + 0.5f) - 0x3f000000u;
      const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
      const U32 special = nan ? U32{} + 0x7e00u : U32{} + 0x7c00u;
      const U32 half = magnitude < 0x477ff000u ? finite : special;
      store(to, __builtin_convertvector(half | (bits >> 16 & 0x8000u), U16));
    }
  }

  // The same for the first n numbers, at most `lanes`: nothing past them is touched, and what is
  // read in their place is 0.
  template <DType D>
  [[gnu::always_inline]] static inline F32 widen(const void* from, std::int64_t n) {
    if (n >= lanes) return widen<D>(from);
    alignas(Bytes) char part[Bytes] = {};
    if (n > 0) std::memcpy(part, from, n * size_of(D));
    return widen<D>(part);
  }
  template <DType D>
  [[gnu::always_inline]] static inline void narrow(F32 v, void* to, std::int64_t n) {
    if (n >= lanes) return narrow<D>(v, to);
    alignas(Bytes) char part[Bytes];
    narrow<D>(v, part);
    std::memcpy(to, part, n * size_of(D));
  }

  // ------------------------------------------------------------------------------- functions

  // 2^(x * rate) for products in [-126, 0]; its relative error is below 2e-7. NaN stays NaN.
  [[gnu::always_inline]] static inline F32 exp2_product(F32 x, float rate) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const F32 shifted = x * rate + round;
    const F32 r = x * rate - (shifted - round);   // rounded once where there is an FMA
    F32 p = r * 1.32746331e-3f + 9.67196189e-3f;  // 2^r on [-1/2, 1/2], off by at most 1e-7
    p = p * r + 5.55067845e-2f;
    p = p * r + 2.4022235e-1f;
    p = p * r + 6.93147063e-1f;
    p = p * r + 1.0f;
    return p * bits_as<F32>((bits_as<U32>(shifted) + 127u) << 23);
  }

  // exp(x) for x <= 0, and 0 below -87; its relative error is below 2e-7 there. NaN stays NaN.
  [[gnu::always_inline]] static inline F32 exp_nonpositive(F32 x) {
    return x < -87.0f ? F32{} : exp2_product(x, 1.44269504f);
  }

  // The relative error is below 3e-7.
  [[gnu::always_inline]] static inline F32 tanh(F32 x) {
    const F32 magnitude = bits_as<F32>(bits_as<U32>(x) & 0x7fffffffu);
    const F32 e = exp_nonpositive(-2.0f * magnitude);
    const F32 far = (1.0f - e) / (1.0f + e);
    const F32 square = x * x;  // near 0, where 1 - e cancels: Cephes tanhf
    F32 p = square * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const F32 near = p * square * magnitude + magnitude;
    const U32 sign = bits_as<U32>(x) & 0x80000000u;
    return bits_as<F32>(bits_as<U32>(magnitude < 0.625f ? near : far) | sign);
  }

  // ---------------------------------------------------------------------------- across lanes

  // Halves the vector until one number is left.
  template <typename V, typename Op>
  [[gnu::always_inline]] static inline auto reduce(V v, const Op& op) {
    if constexpr (lanes == 4) {
      v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
      v = op(v, __builtin_shufflevector(v, v, 1, 0, 3, 2));
      return v[0];
    } else {
      constexpr std::make_integer_sequence<int, lanes / 2> indices;
      return Simd<Bytes / 2>::reduce(op(half<0>(v, indices), half<lanes / 2>(v, indices)), op);
    }
  }

  [[gnu::always_inline]] static inline float reduce_max(F32 v) {
    return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return b > a ? b : a; });
  }
  [[gnu::always_inline]] static inline float reduce_add(F32 v) {
    return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
  }
  [[gnu::always_inline]] static inline bool any(Mask v) {
    return reduce(v, [](auto a, auto b) __attribute__((always_inline)) { return a | b; }) != 0;
  }

  // Transposes a square of words, by shuffling its upper half of rows into its lower half until
  // every row has been split `lanes` times.
  [[gnu::always_inline]] static inline void transpose(U32 (&rows)[lanes]) {
    constexpr std::make_integer_sequence<int, lanes> indices;
#pragma GCC unroll 4
    for (int stage = 1; stage < lanes; stage *= 2) {
      U32 shuffled[lanes];
#pragma GCC unroll 8
      for (int i = 0; i < lanes / 2; ++i) {
        shuffled[2 * i] = interleave<0>(rows[i], rows[i + lanes / 2], indices);
        shuffled[2 * i + 1] = interleave<lanes / 2>(rows[i], rows[i + lanes / 2], indices);
      }
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) rows[i] = shuffled[i];
    }
  }

 private:
  template <int First, typename V, int... I>
  [[gnu::always_inline]] static inline auto half(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (First + I)...);
  }

  template <int First, typename V, int... I>
  [[gnu::always_inline]] static inline V interleave(V a, V b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * lanes)...);
  }
};

// ------------------------------------------------------------------------- the choice of a width

#ifdef __x86_64__
template <typename Loop, typename... Args>
[[gnu::target("arch=x86-64-v4")]] auto on_avx512(Args... args) {
  return Loop::template run<64>(args...);
}

template <typename Loop, typename... Args>
[[gnu::target("arch=x86-64-v3")]] auto on_avx2(Args... args) {
  return Loop::template run<32>(args...);
}
#endif

// Runs a hot loop on one instruction set.
template <typename Loop, typename... Args>
auto run_loop(Isa isa, Args... args) {
#ifdef __x86_64__
  if (isa == Isa::avx512) return on_avx512<Loop>(args...);
  if (isa == Isa::avx2) return on_avx2<Loop>(args...);
#endif
  return Loop::template run<16>(args...);
}

}  // namespace fastguide

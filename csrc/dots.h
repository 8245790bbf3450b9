// Dot products of 128 codes with 128 activations of 8 bits, in integers: the inner loops of matvec.cpp.
//
// `Dots<bits>::add<parts>` cuts a block into 1, 2 or 4 parts and adds scale * dot of each part to a register of floats
// whose lanes are summed at the end of a row. Codes are unsigned and at most 63 wherever four products are added in 16
// bits (63 * 127 * 4 < 2^15), at most 127 where two are; codes of 8 bits are made signed first. The name of a code register is its position: c[s]
// holds codes 32 s to 32 s + 31 of the block, in order, which is what the planes' fields give (docs/format.md).
#pragma once

#include <cstdint>

#include "lanes.h"
#include "types.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define MOEQ_DOTS 1

namespace moeq::MOEQ_ISA {

using V = __m256i;

MOEQ_INLINE V load_codes(const uint8_t* from) { return _mm256_loadu_si256((const V*)from); }
// 16 bytes, twice.
MOEQ_INLINE V load_twice(const uint8_t* from) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
}
MOEQ_INLINE V bytes_of(int value) { return _mm256_set1_epi8((char)value); }

// Bits of a where the mask has them, else of b.
MOEQ_INLINE V bits_from(V a, int mask, V b) {
#if defined(__AVX512VL__)
  return _mm256_ternarylogic_epi32(bytes_of(mask), a, b, 0xca);
#else
  return _mm256_or_si256(_mm256_and_si256(a, bytes_of(mask)), _mm256_andnot_si256(bytes_of(mask), b));
#endif
}
MOEQ_INLINE V twice(V bits) { return _mm256_add_epi8(bits, bits); }

template <int kShift>
MOEQ_INLINE V shifted(V bytes) {
  return kShift ? _mm256_srli_epi16(bytes, kShift) : bytes;
}
template <int kShift>
MOEQ_INLINE V field(V bytes, int mask) {
  return _mm256_and_si256(shifted<kShift>(bytes), bytes_of(mask));
}

// Fields of one bit made fields of two, with the bit as the lower one: the even fields of the lower half of a register, the odd
// ones of the upper.
MOEQ_INLINE V as_lower(V bits) { return _mm256_srlv_epi32(bits, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1)); }
// A plane of one bit: field 2 s is for the lower half of c[s], field 2 s + 1 for the upper.
MOEQ_INLINE V spread1(const uint8_t* from) { return as_lower(load_twice(from)); }

// The four registers of codes of a plane, scaled by nothing.
MOEQ_INLINE void unpack1(const uint8_t* from, V* c) {
  const V bytes = spread1(from);
  c[0] = field<0>(bytes, 1);
  c[1] = field<2>(bytes, 1);
  c[2] = field<4>(bytes, 1);
  c[3] = field<6>(bytes, 1);
}
MOEQ_INLINE void unpack2(const uint8_t* from, V* c) {
  const V bytes = load_codes(from);
  c[0] = field<0>(bytes, 3);
  c[1] = field<2>(bytes, 3);
  c[2] = field<4>(bytes, 3);
  c[3] = field<6>(bytes, 3);
}
MOEQ_INLINE void unpack4(const uint8_t* from, V* c) {
  const V low = load_codes(from), high = load_codes(from + 32);
  c[0] = field<0>(low, 15);
  c[1] = field<0>(high, 15);
  c[2] = field<4>(low, 15);
  c[3] = field<4>(high, 15);
}

template <int kBits>
MOEQ_INLINE void unpack_codes(const uint8_t* first, const uint8_t* second, V* c) {
  if (kBits == 1) {
    unpack1(first, c);
  } else if (kBits == 2) {
    unpack2(first, c);
  } else if (kBits == 3) {
    // Two codes in each byte, as in a plane of 4 bits, so that planes are joined half as often.
    const V two = load_codes(first), one = spread1(second);
    const V even = bits_from(twice(two), 0x66, one), odd = bits_from(shifted<1>(two), 0x66, shifted<2>(one));
    c[0] = field<0>(even, 7);
    c[1] = field<0>(odd, 7);
    c[2] = field<4>(even, 7);
    c[3] = field<4>(odd, 7);
  } else if (kBits == 4) {
    unpack4(first, c);
  } else if (kBits == 5) {
    V one[4];
    unpack4(first, c);
    unpack1(second, one);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) c[s] = _mm256_or_si256(_mm256_add_epi8(c[s], c[s]), one[s]);
  } else if (kBits == 6) {
    V two[4];
    unpack4(first, c);
    unpack2(second, two);
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) c[s] = _mm256_or_si256(_mm256_slli_epi16(c[s], 2), two[s]);
  } else {
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) c[s] = load_codes(first + 32 * s);
  }
}

MOEQ_INLINE V load_x(const int8_t* from) { return _mm256_loadu_si256((const V*)from); }
MOEQ_INLINE V pairs(V codes, const int8_t* x) { return _mm256_maddubs_epi16(codes, load_x(x)); }
MOEQ_INLINE V to32(V sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
MOEQ_INLINE __m256 add_scaled_dot(V dot, const float* scale, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_broadcast_ss(scale), sum);
}

// kUnit: what one code counts in the sums of Dots<bits>; the scales are divided by it. kOffset: what codes lose before they are
// multiplied.
template <int kBits>
struct Dots {
  static constexpr float kUnit = 1.0f, kOffset = 0.0f;
  V c[4];

  inline __attribute__((always_inline)) void load(const uint8_t* first, const uint8_t* second) { unpack_codes<kBits>(first, second, c); }

  template <int kParts>
  inline __attribute__((always_inline)) __m256 add(const int8_t* x, const float* scale, __m256 sum) const {
    constexpr int count = 4 / kParts;
#pragma GCC unroll 4
    for (int part = 0; part < kParts; part++) {
      V dot;
#if defined(__AVX512VNNI__)
      dot = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int s = part * count; s < (part + 1) * count; s++) dot = _mm256_dpbusd_epi32(dot, c[s], load_x(x + 32 * s));
#else
      if (kBits == 7) {
        // Two products of 7 bits and 8 fit into 16, four do not.
        dot = to32(pairs(c[part * count], x + 32 * part * count));
#pragma GCC unroll 4
        for (int s = part * count + 1; s < (part + 1) * count; s++) dot = _mm256_add_epi32(dot, to32(pairs(c[s], x + 32 * s)));
        sum = add_scaled_dot(dot, scale + part, sum);
        continue;
      }
      V sums = pairs(c[part * count], x + 32 * part * count);
      if (count > 1) sums = _mm256_add_epi16(sums, pairs(c[part * count + 1], x + 32 * (part * count + 1)));
      dot = to32(sums);
      if (count > 2) {
        V more = _mm256_add_epi16(pairs(c[2], x + 64), pairs(c[3], x + 96));
        // Four products of codes of 6 bits may not fit.
        dot = kBits > 5 ? _mm256_add_epi32(dot, to32(more)) : to32(_mm256_add_epi16(sums, more));
      }
#endif
      sum = add_scaled_dot(dot, scale + part, sum);
    }
    return sum;
  }
};

#if !defined(__AVX512VNNI__)
// The bits stay where they are: c[0] and c[2] hold 1 (lower half) or 2 (upper half) where the code is 1, c[1] and c[3]
// four times as much.
template <>
struct Dots<1> {
  static constexpr float kUnit = 2.0f, kOffset = 0.0f;
  V c[4];

  inline __attribute__((always_inline)) void load(const uint8_t* first, const uint8_t*) {
    const V bytes = load_twice(first);
    const V one = _mm256_set_m128i(_mm_set1_epi8(2), _mm_set1_epi8(1));
    const V four = _mm256_set_m128i(_mm_set1_epi8(8), _mm_set1_epi8(4));
    const V upper = _mm256_srli_epi16(bytes, 4);
    c[0] = _mm256_and_si256(bytes, one);
    c[1] = _mm256_and_si256(bytes, four);
    c[2] = _mm256_and_si256(upper, one);
    c[3] = _mm256_and_si256(upper, four);
  }

  template <int kParts>
  inline __attribute__((always_inline)) __m256 add(const int8_t* x, const float* scale, __m256 sum) const {
    const V weight = _mm256_set_m128i(_mm_set1_epi16(1), _mm_set1_epi16(2));
    if (kParts == 4) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) {
        const V sums = pairs(c[s], x + 32 * s);
        sum = add_scaled_dot(_mm256_madd_epi16(s & 1 ? _mm256_srai_epi16(sums, 2) : sums, weight), scale + s, sum);
      }
      return sum;
    }
    const V first = pairs(c[0], x), second = pairs(c[1], x + 32);
    const V third = pairs(c[2], x + 64), fourth = pairs(c[3], x + 96);
    if (kParts == 2) {
      const V low = _mm256_add_epi16(first, _mm256_srai_epi16(second, 2));
      const V high = _mm256_add_epi16(third, _mm256_srai_epi16(fourth, 2));
      return add_scaled_dot(_mm256_madd_epi16(high, weight), scale + 1,
                            add_scaled_dot(_mm256_madd_epi16(low, weight), scale, sum));
    }
    const V quarters = _mm256_srai_epi16(_mm256_add_epi16(second, fourth), 2);
    const V sums = _mm256_add_epi16(_mm256_add_epi16(first, third), quarters);
    return add_scaled_dot(_mm256_madd_epi16(sums, weight), scale, sum);
  }
};
#endif

#if !defined(__AVX512VNNI__)
// c[1] and c[3] hold four times the code, so that one shift unpacks all.
template <>
struct Dots<2> {
  static constexpr float kUnit = 4.0f, kOffset = 0.0f;
  V c[4];

  inline __attribute__((always_inline)) void load(const uint8_t* first, const uint8_t*) {
    const V bytes = load_codes(first), upper = _mm256_srli_epi16(bytes, 4);
    c[0] = _mm256_and_si256(bytes, bytes_of(3));
    c[1] = _mm256_and_si256(bytes, bytes_of(12));
    c[2] = _mm256_and_si256(upper, bytes_of(3));
    c[3] = _mm256_and_si256(upper, bytes_of(12));
  }

  template <int kParts>
  inline __attribute__((always_inline)) __m256 add(const int8_t* x, const float* scale, __m256 sum) const {
    const V first = pairs(c[0], x), second = pairs(c[1], x + 32);
    const V third = pairs(c[2], x + 64), fourth = pairs(c[3], x + 96);
    if (kParts == 4) {
      const V four = _mm256_set1_epi16(4);
      sum = add_scaled_dot(_mm256_madd_epi16(first, four), scale, sum);
      sum = add_scaled_dot(to32(second), scale + 1, sum);
      sum = add_scaled_dot(_mm256_madd_epi16(third, four), scale + 2, sum);
      return add_scaled_dot(to32(fourth), scale + 3, sum);
    }
    if (kParts == 2) {
      const V low = _mm256_add_epi16(_mm256_slli_epi16(first, 2), second);
      const V high = _mm256_add_epi16(_mm256_slli_epi16(third, 2), fourth);
      return add_scaled_dot(to32(high), scale + 1, add_scaled_dot(to32(low), scale, sum));
    }
    const V ones = _mm256_add_epi16(first, third), fours = _mm256_add_epi16(second, fourth);
    return add_scaled_dot(to32(_mm256_add_epi16(_mm256_slli_epi16(ones, 2), fours)), scale, sum);
  }
};
#endif

// Signed codes: their signs go to the activations, so that |code| is unsigned and |code| * |x| * 2 fits.
struct SignedDots {
  V c[4];

  template <int kParts>
  inline __attribute__((always_inline)) __m256 add(const int8_t* x, const float* scale, __m256 sum) const {
    constexpr int count = 4 / kParts;
#pragma GCC unroll 4
    for (int part = 0; part < kParts; part++) {
      V dot = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int s = part * count; s < (part + 1) * count; s++) {
        const V signed_x = _mm256_sign_epi8(load_x(x + 32 * s), c[s]);
        dot = _mm256_add_epi32(dot, to32(_mm256_maddubs_epi16(_mm256_abs_epi8(c[s]), signed_x)));
      }
      sum = add_scaled_dot(dot, scale + part, sum);
    }
    return sum;
  }
};

#if !defined(__AVX512VNNI__)
// Products of codes of 8 bits do not fit, those of codes minus 128 do.
template <>
struct Dots<8> : SignedDots {
  static constexpr float kUnit = 1.0f, kOffset = 128.0f;

  inline __attribute__((always_inline)) void load(const uint8_t* first, const uint8_t*) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; s++) c[s] = _mm256_xor_si256(load_codes(first + 32 * s), bytes_of(128));
  }
};
#endif

}  // namespace moeq::MOEQ_ISA

#else
#define MOEQ_DOTS 0
#endif

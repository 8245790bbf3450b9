// What readers of matrix records share: bytes of planes to codes, 16-bit floats to float. Plain loops over arrays, which
// compilers turn into vector code for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#define MOEQ_SMALL static inline __attribute__((unused))

namespace moeq::MOEQ_ISA {

// Bytes of a row of `columns` codes in a plane.
MOEQ_SMALL int64_t row_bytes(int64_t columns, int width) {
  return columns / kBlock * (kBlock / 8 * width) + (columns % kBlock + 7) / 8 * width;
}

MOEQ_SMALL float float_from_bits(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

MOEQ_SMALL uint32_t bits_from_float(float value) {
  uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

MOEQ_SMALL float half_to_float(uint16_t bits) {
  const uint32_t size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  if (size >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (size << 13));
  if (size >= 0x400u) return float_from_bits(sign | ((size << 13) + (112u << 23)));
  return float_from_bits(sign | bits_from_float((float)size * 0x1p-24f));
}

// To nearest, ties to even; NaN stays NaN.
MOEQ_SMALL uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MOEQ_SMALL uint16_t to_half(float value) {
  const uint32_t bits = bits_from_float(value), size = bits & 0x7fffffffu;
  const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  // Numbers from 0.5 to 1 are 2^-24 apart, as float16 below 2^-14 are.
  const uint32_t small = bits_from_float(float_from_bits(size < 0x38800000u ? size : 0u) + 0.5f) - 0x3f000000u;
  const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t out = size >= 0x477ff000u ? large : size < 0x38800000u ? small : normal;
  return (uint16_t)(out | ((bits >> 16) & 0x8000u));
}

// Numbers `at` .. `at + count` of `out`, in a dtype.
MOEQ_SMALL void store_as(const float* w, int64_t count, Dtype dtype, void* out, int64_t at) {
  if (dtype == Dtype::float32) {
    std::memcpy((float*)out + at, w, (size_t)count * sizeof(float));
  } else if (dtype == Dtype::bfloat16) {
    uint16_t* to = (uint16_t*)out + at;
    for (int64_t j = 0; j < count; j++) to[j] = to_bfloat16(w[j]);
  } else {
    uint16_t* to = (uint16_t*)out + at;
    int64_t j = 0;
#if defined(__F16C__)
    for (; j + 8 <= count; j += 8)
      _mm_storeu_si128((__m128i*)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(w + j), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; j < count; j++) to[j] = to_half(w[j]);
  }
}

// Field s of byte j of m bytes is the code s * m + j. The first plane sets the codes, the next ones append to them.
template <int kWidth, bool kFirst>
static inline __attribute__((always_inline)) void unpack(const uint8_t* in, int m, uint8_t* codes) {
  constexpr unsigned mask = (1u << kWidth) - 1;
#pragma GCC unroll 8
  for (int s = 0; s < 8 / kWidth; s++)
    for (int j = 0; j < m; j++) {
      const unsigned part = (unsigned)(in[j] >> (s * kWidth)) & mask;
      codes[s * m + j] = (uint8_t)(kFirst ? part : ((unsigned)codes[s * m + j] << kWidth) | part);
    }
}

template <int kWidth>
static inline __attribute__((always_inline)) void unpack_block(const uint8_t* in, int codes_here, bool first, uint8_t* codes) {
  // The constant lets the usual case be unrolled.
  if (codes_here == kBlock) {
    if (first)
      unpack<kWidth, true>(in, kBlock * kWidth / 8, codes);
    else
      unpack<kWidth, false>(in, kBlock * kWidth / 8, codes);
  } else if (first) {
    unpack<kWidth, true>(in, (codes_here + 7) / 8 * kWidth, codes);
  } else {
    unpack<kWidth, false>(in, (codes_here + 7) / 8 * kWidth, codes);
  }
}

// `codes_here` codes of a block or tail that starts at `in`.
MOEQ_SMALL void unpack_plane(const uint8_t* in, int width, int codes_here, bool first, uint8_t* codes) {
  switch (width) {
    case 1:
      return unpack_block<1>(in, codes_here, first, codes);
    case 2:
      return unpack_block<2>(in, codes_here, first, codes);
    case 4:
      return unpack_block<4>(in, codes_here, first, codes);
    default:
      return unpack_block<8>(in, codes_here, first, codes);
  }
}

}  // namespace moeq::MOEQ_ISA

// Sixteen numbers of any dtype as floats.
#pragma once

#include "lanes.h"
#include "planes.h"

namespace moeq::MOEQ_ISA {

typedef uint16_t Shorts __attribute__((vector_size(sizeof(I1) / 2)));

MOEQ_INLINE void load_bfloats(const uint16_t* from, F1& to) {
  Shorts half;
  std::memcpy(&half, from, sizeof half);
  to = (F1)(__builtin_convertvector(half, I1) << 16);
}
#if !defined(__AVX512F__)
template <class H>
MOEQ_INLINE void load_bfloats(const uint16_t* from, Two<H>& to) {
  load_bfloats(from, to.low);
  load_bfloats(from + sizeof to.low / sizeof(float), to.high);
}
#endif

MOEQ_INLINE F load_halves(const uint16_t* from) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__AVX2__) && defined(__F16C__)
  const auto half = [](const uint16_t* at) { return (F1)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)at)); };
  return {half(from), half(from + 8)};
#else
  alignas(64) float some[kLanes];
  for (int j = 0; j < kLanes; j++) some[j] = half_to_float(from[j]);
  return load(some);
#endif
}

// From number `at` on.
template <Dtype kDtype>
MOEQ_INLINE F load_as(const void* from, int64_t at) {
  if (kDtype == Dtype::float32) return load((const float*)from + at);
  if (kDtype == Dtype::float16) return load_halves((const uint16_t*)from + at);
  F out;
  load_bfloats((const uint16_t*)from + at, out);
  return out;
}

// To the nearest number of the dtype, ties to even.
template <Dtype kDtype>
MOEQ_INLINE F round_as(F a) {
  if (kDtype == Dtype::float32) return a;
  if (kDtype == Dtype::float16) return round_half(min(max(a, all(-65504.0f)), all(65504.0f)));
  return float_of((bits_of(a) + all_int(0x7fff) + ((bits_of(a) >> 16) & all_int(1))) & all_int(~0xffff));
}

template <Dtype kDtype>
MOEQ_INLINE float one_as(const void* from, int64_t at) {
  if (kDtype == Dtype::float32) return ((const float*)from)[at];
  const uint16_t bits = ((const uint16_t*)from)[at];
  return kDtype == Dtype::float16 ? half_to_float(bits) : float_from_bits((uint32_t)bits << 16);
}

}  // namespace moeq::MOEQ_ISA

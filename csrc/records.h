// What the kernels that multiply share: zeros, scales and codes of a matrix record.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"
#include "matvec.h"
#include "planes.h"

namespace moeq::MOEQ_ISA {

MOEQ_SMALL bool is_grouped(int64_t group_size) { return group_size == 32 || group_size == 64 || group_size == 128; }
MOEQ_SMALL int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

struct Zeros {
  explicit Zeros(const Matrix& m)
      : shared(m.levels == Levels::sym ? (float)(1 << (m.bits - 1)) : (float)((1 << m.bits) - 1) / 2),
        step((float)(((1 << m.bits) - 1) / 255.0)) {}

  float at(const Matrix& m, int64_t group) const {
    if (m.levels == Levels::asym) return (float)((const uint8_t*)m.zero)[group] * step;
    if (m.levels == Levels::asym16) return half_to_float(((const uint16_t*)m.zero)[group]);
    return shared;
  }

  float shared;  // of all groups
  float step;    // of zeros in bytes
};

// The codes of block `block` of a row.
MOEQ_SMALL int unpack_row(const Matrix& m, int64_t row, int64_t block, uint8_t* codes) {
  const int here = (int)min_of(m.columns - block * kBlock, kBlock);
  for (int plane = 0; plane < 2 && m.widths[plane]; plane++) {
    const int width = m.widths[plane];
    const uint8_t* in = m.planes[plane] + row * row_bytes(m.columns, width) + block * (kBlock / 8 * width);
    unpack_plane(in, width, here, plane == 0, codes);
  }
  return here;
}

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

// Eight scales or zeros, of which `there` may be read; what is not there is 0.
MOEQ_INLINE __m256 eight_halves(const uint16_t* from, int64_t there) {
  if (there >= 8) return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  alignas(16) uint16_t some[8] = {};
  std::memcpy(some, from, (size_t)there * 2);
  return _mm256_cvtph_ps(_mm_load_si128((const __m128i*)some));
}
MOEQ_INLINE __m256 eight_bytes(const uint8_t* from, int64_t there) {
  uint64_t some = 0;
  std::memcpy(&some, from, there >= 8 ? 8 : (size_t)there);
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)some)));
}

#endif

}  // namespace moeq::MOEQ_ISA

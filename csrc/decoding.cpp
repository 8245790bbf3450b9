// See decoding.h. A block of 128 codes is unpacked into bytes, then turned into weights group by group; all loops are
// over plain arrays, which compilers turn into vector code for each instruction set.
#include "decoding.h"

#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace moeq::MOEQ_ISA {
namespace {

inline float float_of(uint32_t bits) {
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline uint32_t bits_of(float value) {
  uint32_t out;
  std::memcpy(&out, &value, sizeof out);
  return out;
}

inline float half_to_float(uint16_t bits) {
  const uint32_t size = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  if (size >= 0x7c00u) return float_of(sign | 0x7f800000u | (size << 13));
  if (size >= 0x400u) return float_of(sign | ((size << 13) + (112u << 23)));
  return float_of(sign | bits_of((float)size * 0x1p-24f));
}

// To nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline uint16_t to_half(float value) {
  const uint32_t bits = bits_of(value), size = bits & 0x7fffffffu;
  const uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
  // Numbers from 0.5 to 1 are 2^-24 apart, as float16 below 2^-14 are.
  const uint32_t small = bits_of(float_of(size < 0x38800000u ? size : 0u) + 0.5f) - 0x3f000000u;
  const uint32_t large = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t out = size >= 0x477ff000u ? large : size < 0x38800000u ? small : normal;
  return (uint16_t)(out | ((bits >> 16) & 0x8000u));
}

// Field s of byte j of m bytes is the code s * m + j. The first plane sets the codes, the next ones append to them.
template <int kWidth, bool kFirst>
inline __attribute__((always_inline)) void unpack(const uint8_t* in, int m, uint8_t* codes) {
  constexpr unsigned mask = (1u << kWidth) - 1;
#pragma GCC unroll 8
  for (int s = 0; s < 8 / kWidth; s++)
    for (int j = 0; j < m; j++) {
      const unsigned part = (unsigned)(in[j] >> (s * kWidth)) & mask;
      codes[s * m + j] = (uint8_t)(kFirst ? part : ((unsigned)codes[s * m + j] << kWidth) | part);
    }
}

template <int kWidth>
inline __attribute__((always_inline)) void unpack_block(const uint8_t* in, int codes_here, bool first, uint8_t* codes) {
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

void unpack_plane(const Plane& plane, int64_t offset, int codes_here, bool first, uint8_t* codes) {
  const uint8_t* in = plane.data + offset;
  switch (plane.width) {
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

inline void write(const uint8_t* codes, int count, float scale, float zero, float* w) {
  for (int j = 0; j < count; j++) w[j] = ((float)codes[j] - zero) * scale;
}

struct Reader {
  const DecodeJob& job;
  float shared;  // the zero of all groups
  float step;    // of zeros in bytes

  float zero(int64_t group) const {
    if (job.levels == Levels::asym) return (float)((const uint8_t*)job.zero)[group] * step;
    if (job.levels == Levels::asym16) return half_to_float(((const uint16_t*)job.zero)[group]);
    return shared;
  }
};

void store(const float* w, int count, Dtype dtype, void* out, int64_t at) {
  if (dtype == Dtype::float32) {
    std::memcpy((float*)out + at, w, (size_t)count * sizeof(float));
  } else if (dtype == Dtype::bfloat16) {
    uint16_t* to = (uint16_t*)out + at;
    for (int j = 0; j < count; j++) to[j] = to_bfloat16(w[j]);
  } else {
    uint16_t* to = (uint16_t*)out + at;
    int j = 0;
#if defined(__F16C__)
    for (; j + 8 <= count; j += 8)
      _mm_storeu_si128((__m128i*)(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(w + j), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; j < count; j++) to[j] = to_half(w[j]);
  }
}

}  // namespace

void decode_matrix(const DecodeJob& job) {
  const int top = (1 << job.bits) - 1;
  const float shared = job.levels == Levels::sym ? (float)(1 << (job.bits - 1)) : (float)top / 2;
  const Reader reader{job, shared, (float)(top / 255.0)};
  const int64_t groups = (job.columns + job.group_size - 1) / job.group_size;
  for (int64_t row = 0; row < job.rows; row++) {
    for (int64_t column = 0; column < job.columns; column += kBlock) {
      const int here = (int)(job.columns - column < kBlock ? job.columns - column : kBlock);
      alignas(64) uint8_t codes[kBlock];
      alignas(64) float w[kBlock];
      for (int plane = 0; plane < job.num_planes; plane++) {
        const int64_t width = job.planes[plane].width;
        const int64_t row_bytes = job.columns / kBlock * (kBlock / 8 * width) + (job.columns % kBlock + 7) / 8 * width;
        unpack_plane(job.planes[plane], row * row_bytes + column / 8 * width, here, plane == 0, codes);
      }
      for (int64_t start = column; start < column + here;) {
        const int64_t group = start / job.group_size;
        const int64_t end = (group + 1) * job.group_size, stop = end < column + here ? end : column + here;
        const int64_t at = row * groups + group;
        const int64_t first = start - column;
        write(codes + first, (int)(stop - start), half_to_float(job.scale[at]), reader.zero(at), w + first);
        start = stop;
      }
      store(w, here, job.dtype, job.w, row * job.columns + column);
    }
  }
}

}  // namespace moeq::MOEQ_ISA

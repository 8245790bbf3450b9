// Reads sixteen runs of weights, one per lane, as floats: v[j] holds weight j of each.
#pragma once

#include <cstddef>
#include <cstring>

#include "lanes.h"
#include "types.h"

namespace moeq::MOEQ_ISA {

// One block of 64 bytes of each lane's weights as floats, columns first; 16 or 32 columns.
template <Dtype kDtype>
MOEQ_INLINE void widen(const void* const* rows, size_t offset, F* v) {
  I x[kLanes];
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; lane++) x[lane] = load_int((const char*)rows[lane] + offset);
  transpose(x);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; j++) {
    if (kDtype == Dtype::float32) {
      v[j] = float_of(x[j]);
    } else if (kDtype == Dtype::bfloat16) {
      v[2 * j] = float_of(x[j] << 16);
      v[2 * j + 1] = float_of(x[j] & all_int(~0xffff));
    } else {
      v[2 * j] = half_to_float(x[j]);
      v[2 * j + 1] = half_to_float((x[j] >> 16) & all_int(0xffff));
    }
  }
}

// `v` has room for `width` rounded up to whole blocks of 64 bytes.
template <Dtype kDtype>
void gather(const void* const* rows, int width, F* v) {
  constexpr int size = kDtype == Dtype::float32 ? 4 : 2;
  constexpr int block = 64 / size;
  int j = 0;
  for (; j + block <= width; j += block) widen<kDtype>(rows, (size_t)j * size, v + j);
  if (j == width) return;
  alignas(64) char tail[kLanes][64] = {};
  const void* tails[kLanes];
  for (int lane = 0; lane < kLanes; lane++) {
    std::memcpy(tail[lane], (const char*)rows[lane] + (size_t)j * size, (size_t)(width - j) * size);
    tails[lane] = tail[lane];
  }
  widen<kDtype>(tails, 0, v + j);
}

}  // namespace moeq::MOEQ_ISA

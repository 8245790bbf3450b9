// Matrix records back to weights, w = scale * (code - zero) in float32 (docs/format.md). The truth is
// src/moeq/format/packing.py, bit for bit.
#pragma once

#include <cstdint>

#include "types.h"

namespace moeq {

struct Plane {
  const uint8_t* data;  // rows x plane_row_bytes(columns, width)
  int width;
};

struct DecodeJob {
  Plane planes[2];  // most significant first
  int num_planes;
  const uint16_t* scale;  // rows x groups, float16 bits
  const void* zero;       // rows x groups: uint8 or float16 bits, or none
  Levels levels;
  int bits;
  int64_t rows;
  int64_t columns;
  int64_t group_size;
  void* w;  // rows x columns
  Dtype dtype;
};

using DecodeMatrix = void(const DecodeJob&);

namespace base {
DecodeMatrix decode_matrix;
}
namespace avx2 {
DecodeMatrix decode_matrix;
}
namespace avx512 {
DecodeMatrix decode_matrix;
}

}  // namespace moeq

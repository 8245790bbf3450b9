// Codes to bytes: the planes of docs/format.md. The truth is src/moeq/format/packing.py, bit for bit.
#pragma once

#include <cstdint>

namespace moeq {

// Packs bits `shift` .. `shift + width` of every code.
struct PackJob {
  const uint8_t* codes;  // rows x columns
  int64_t rows;
  int64_t columns;
  int width;  // 1, 2, 4 or 8
  int shift;
  uint8_t* out;  // rows x plane_row_bytes(columns, width)
};

using PackPlane = void(const PackJob&);

namespace base {
PackPlane pack_plane;
}
namespace avx2 {
PackPlane pack_plane;
}
namespace avx512 {
PackPlane pack_plane;
}

}  // namespace moeq

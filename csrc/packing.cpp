// See packing.h. Plain loops over bytes, which compilers turn into vector code for each instruction set.
#include "packing.h"

#include <cstring>

#include "types.h"

namespace moeq::MOEQ_ISA {
namespace {

// Byte j of a block of m bytes holds in its field s the code s * m + j.
template <int kWidth>
inline __attribute__((always_inline)) void pack_block(const uint8_t* codes, int m, int shift, uint8_t* out) {
  constexpr int fields = 8 / kWidth;
  constexpr unsigned mask = (1u << kWidth) - 1;
  for (int j = 0; j < m; j++) {
    unsigned byte = 0;
#pragma GCC unroll 8
    for (int s = 0; s < fields; s++) byte |= ((codes[s * m + j] >> shift) & mask) << (s * kWidth);
    out[j] = (uint8_t)byte;
  }
}

template <int kWidth>
void pack_rows(const PackJob& job) {
  const int64_t blocks = job.columns / kBlock;
  const int tail = (int)(job.columns % kBlock);
  const int tail_bytes = (tail + 7) / 8 * kWidth;
  const uint8_t* codes = job.codes;
  uint8_t* out = job.out;
  for (int64_t row = 0; row < job.rows; row++) {
    for (int64_t block = 0; block < blocks; block++) {
      pack_block<kWidth>(codes, kBlock * kWidth / 8, job.shift, out);
      codes += kBlock;
      out += kBlock * kWidth / 8;
    }
    if (!tail) continue;
    uint8_t padded[kBlock] = {};
    std::memcpy(padded, codes, (size_t)tail);
    pack_block<kWidth>(padded, tail_bytes, job.shift, out);
    codes += tail;
    out += tail_bytes;
  }
}

}  // namespace

void pack_plane(const PackJob& job) {
  switch (job.width) {
    case 1:
      return pack_rows<1>(job);
    case 2:
      return pack_rows<2>(job);
    case 4:
      return pack_rows<4>(job);
    default:
      return pack_rows<8>(job);
  }
}

}  // namespace moeq::MOEQ_ISA

// From packed codes of a trellis to levels, a block at a time. Parities of codes and of those above them are made where codes
// lie packed, four or eight to a byte: a row is read with the rows above it, which are in the cache. A byte shuffle turns
// indices into levels. For trellis.cpp alone.
#pragma once

#include "dots.h"
#include "fetch.h"
#include "planes.h"
#include "records.h"
#include "trellis_tables.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr int64_t kSegment = 4096;  // columns that are looked at at a time
constexpr int64_t kSegmentBlocks = kSegment / kBlock;
constexpr int kMost = 6;  // rows above that can matter

// What rows that are not there have in the plane of lowest bits.
alignas(64) constexpr uint8_t kNothing[kSegment / 2 + 64] = {};

MOEQ_INLINE int64_t groups_of(const Matrix& m) { return (m.columns + m.group_size - 1) / m.group_size; }

// Some rows from block `first` on: the plane with their upper bits, that with the lowest, and those above.
struct Rows {
  static constexpr int kMany = 4;
  const uint8_t *upper[kMany], *lowest[kMost + kMany];

  // `count` of them, from `row` on.
  Rows(const Matrix& m, int64_t row, int count, int64_t first) {
    const int last = m.widths[1] ? 1 : 0;
    const int64_t upper_pitch = row_bytes(m.columns, m.widths[0]), pitch = row_bytes(m.columns, m.widths[last]);
    const uint8_t* from = m.planes[0] + row * upper_pitch + first * (kBlock / 8 * m.widths[0]);
    for (int r = 0; r < count; r++) upper[r] = from + r * upper_pitch;
    from = m.planes[last] + row * pitch + first * (kBlock / 8 * m.widths[last]);
    for (int k = -kMost; k < count; k++) lowest[k + kMost] = -k <= row ? from + k * pitch : kNothing;
  }

  // The plane of lowest bits of the row that is `back` above row r of these.
  inline __attribute__((always_inline)) const uint8_t* at(int r, int back) const { return lowest[r - back + kMost]; }
};

#if MOEQ_DOTS

// Bytes of a block in the plane of lowest bits. Where fields are of one bit, 16 bytes twice: even fields of 16 codes are for
// the lower half of a register, odd ones for the upper (see `unpack1`).
template <int kBits>
constexpr bool kOneBit = kBits == 1 || kBits == 3;
template <int kBits>
constexpr int kLowBytes = kOneBit<kBits> ? 16 : kBits * 16;

// What is in the plane of lowest bits, some bytes from `from` on: of kRows rows and of those above them that matter.
template <int kBits, int kRows>
class Lines {
 public:
  inline __attribute__((always_inline)) Lines(const Rows& rows, int64_t from) : rows_(rows), from_(from) {
    if (!kKept) return;
#pragma GCC unroll 12
    for (int i = 0; i < kHistory[kBits] + kRows; i++) line_[i] = read(i - kHistory[kBits]);
  }

  // The row that is `back` above row r.
  inline __attribute__((always_inline)) V at(int r, int back) const {
    return kKept ? line_[r - back + kHistory[kBits]] : read(r - back);
  }

 private:
  // With 32 registers every line is loaded once for all rows that it matters to.
#if defined(__AVX512VBMI__)
  static constexpr bool kKept = kRows > 1 && kBits < 4;
#else
  static constexpr bool kKept = false;
#endif
  inline __attribute__((always_inline)) V read(int row) const {
    const uint8_t* from = rows_.lowest[row + kMost] + from_;
    return kOneBit<kBits> ? load_twice(from) : load_codes(from);
  }

  const Rows& rows_;
  int64_t from_;
  V line_[kKept ? kHistory[kBits] + kRows : 1];
};

// A parity of every code of a block, where the lowest bit of its field is; other bits are anything.
template <int kBits, int kParity, int kRows>
MOEQ_INLINE V parity(const Lines<kBits, kRows>& lines, int r) {
  constexpr int taps = kTaps[kBits][kParity];
  V sum = _mm256_setzero_si256();
#pragma GCC unroll 7
  for (int k = 0; k <= kMost; k++)
    if (taps >> k & 1) sum = _mm256_xor_si256(sum, lines.at(r, k));
  return sum;
}

MOEQ_INLINE V masked(V a, int mask) { return _mm256_and_si256(a, bytes_of(mask)); }

// As `as_lower`, with the bit as the upper one.
MOEQ_INLINE V as_upper(V bits) { return _mm256_sllv_epi32(bits, _mm256_setr_epi32(1, 1, 1, 1, 0, 0, 0, 0)); }

// Two parities of every code, fields of two bits (of four, if kBits is 4).
template <int kBits>
MOEQ_INLINE V pairs_of(V lower, V upper) {
  if (kOneBit<kBits>) return bits_from(as_lower(lower), 0x55, as_upper(upper));
  return bits_from(lower, kBits == 4 ? 0x11 : 0x55, twice(upper));
}

// From fields of two bits, the lower and the upper two of an index: indices two to a byte, those of c[0] of a block in the
// lower halves of the bytes of `even`, of c[2] in the upper; of c[1] and c[3] in those of `odd`.
MOEQ_INLINE void join(V low, V high, V& even, V& odd) {
  even = bits_from(low, 0x33, _mm256_slli_epi16(high, 2));
  odd = bits_from(_mm256_srli_epi16(low, 2), 0x33, high);
}

// The upper two bits of the indices of a block, where the other two are two parities.
template <int kBits, int kRows>
MOEQ_INLINE V upper_pairs(const Lines<kBits, kRows>& lines, int r) {
  if (kBits == 1) return pairs_of<1>(parity<kBits, 2>(lines, r), parity<kBits, 3>(lines, r));
  return bits_from(parity<kBits, 2>(lines, r), 0x55, lines.at(r, 0));
}

// Asks for what rows of the blocks at `at` are followed by.
template <int kBits>
MOEQ_INLINE void fetch_codes(const Rows& rows, int r, int64_t at) {
  fetch<kLowBytes<kBits> / 16>(rows.at(r, 0) + at * kLowBytes<kBits>, at);
  if (kBits == 3) fetch<2>(rows.upper[r] + at * 32, at);
}

// Entries are stored plus an offset, so that they are unsigned, but for those of 8 bits without VNNI.
template <int kBits>
#if defined(__AVX512VBMI__)
constexpr int kOffset = kLargest[kBits] + 1;
#else
constexpr int kOffset = kBits == 4 ? 0 : kLargest[kBits] + 1;
#endif
template <int kBits>
using Block = Dots<kBits == 4 ? 8 : kBits == 3 ? 7 : 6>;

#if defined(__AVX512VBMI__)

// Levels of a block, ready for products. One instruction looks up 32 entries by the five lowest bits of each byte; 16 entries
// are there twice.
template <int kBits>
struct Table {
  V entries;

  Table() {
    alignas(32) int8_t at[32];
    for (int i = 0; i < 32; i++) {
      // Of 3 bits the parities are bits 0, 1 and 4 here, the code's upper bits 2 and 3.
      const int index = kBits < 3 ? i & 15 : kBits == 3 ? (i & 3) | (i >> 4 & 1) << 2 | (i >> 2 & 3) << 3 : i;
      at[i] = (int8_t)(kTrellis[kBits][index] + kOffset<kBits>);
    }
    entries = _mm256_load_si256((const V*)at);
  }

  inline __attribute__((always_inline)) V at(V index) const { return _mm256_permutexvar_epi8(index, entries); }

  template <int kRows>
  inline __attribute__((always_inline)) void look_up(const Rows& rows, const Lines<kBits, kRows>& lines, int r, int64_t b, Block<kBits>& block) const {
    const V low = pairs_of<kBits>(parity<kBits, 0>(lines, r), parity<kBits, 1>(lines, r));
    if (kBits == 4) {
      half(low, lines.at(r, 0), 0, block);
      const Lines<kBits, kRows> more(rows, b * 64 + 32);
      return half(pairs_of<kBits>(parity<kBits, 0>(more, r), parity<kBits, 1>(more, r)), more.at(r, 0), 1, block);
    }
    V even, odd;
    if (kBits < 3) {
      join(low, upper_pairs(lines, r), even, odd);
      block.c[0] = at(even);
      block.c[1] = at(odd);
      block.c[2] = at(_mm256_srli_epi16(even, 4));
      block.c[3] = at(_mm256_srli_epi16(odd, 4));
      return;
    }
    const V third = as_lower(parity<kBits, 2>(lines, r));
    join(low, load_codes(rows.upper[r] + b * 32), even, odd);
    block.c[0] = at(bits_from(_mm256_slli_epi16(third, 4), 0x10, even));
    block.c[1] = at(bits_from(_mm256_slli_epi16(third, 2), 0x10, odd));
    block.c[2] = at(bits_from(third, 0x10, _mm256_srli_epi16(even, 4)));
    block.c[3] = at(bits_from(_mm256_srli_epi16(third, 2), 0x10, _mm256_srli_epi16(odd, 4)));
  }

  // Codes of four bits, two to a byte, of which the lowest bit gives way to two parities.
  inline __attribute__((always_inline)) void half(V parities, V codes, int which, Block<kBits>& block) const {
    block.c[which] = at(bits_from(parities, 0x03, twice(codes)));
    block.c[which + 2] = at(bits_from(_mm256_srli_epi16(parities, 4), 0x03, _mm256_srli_epi16(codes, 3)));
  }
};

#else

// Where there are 32 entries, the upper half of the table.
constexpr int upper_half(int bits) { return bits < 3 ? 0 : 16; }
MOEQ_INLINE V entry_table(const int8_t* from, int offset) {
  return _mm256_add_epi8(load_twice((const uint8_t*)from), bytes_of(offset));
}

// Levels of a block, ready for products. Where there are 32 entries, the top of each half of a byte of `fifth` is a fifth bit.
template <int kBits>
struct Table {
  V lower, upper;

  Table() : lower(entry_table(kTrellis[kBits], kOffset<kBits>)), upper(entry_table(kTrellis[kBits] + upper_half(kBits), kOffset<kBits>)) {}

  inline __attribute__((always_inline)) V at(V index, V fifth) const {
    const V found = _mm256_shuffle_epi8(lower, masked(index, 15));
    return kBits < 3 ? found : _mm256_blendv_epi8(found, _mm256_shuffle_epi8(upper, masked(index, 15)), fifth);
  }

  template <int kRows>
  inline __attribute__((always_inline)) void look_up(const Rows& rows, const Lines<kBits, kRows>& lines, int r, int64_t b, Block<kBits>& block) const {
    const V low = pairs_of<kBits>(parity<kBits, 0>(lines, r), parity<kBits, 1>(lines, r));
    V even, odd, fifth_even = low, fifth_odd = low;
    if (kBits == 4) {
      const Lines<kBits, kRows> more(rows, b * 64 + 32);
      fifth_even = lines.at(r, 0);
      fifth_odd = more.at(r, 0);
      even = bits_from(low, 0x33, twice(fifth_even));
      odd = bits_from(pairs_of<kBits>(parity<kBits, 0>(more, r), parity<kBits, 1>(more, r)), 0x33, twice(fifth_odd));
    } else if (kBits == 3) {
      // The upper two bits of a code are the upper two of five: one of them, and the third parity, make the upper two of four.
      fifth_odd = load_codes(rows.upper[r] + b * 32);
      fifth_even = _mm256_slli_epi16(fifth_odd, 2);
      join(low, bits_from(as_lower(parity<kBits, 2>(lines, r)), 0x55, twice(fifth_odd)), even, odd);
    } else {
      join(low, upper_pairs(lines, r), even, odd);
    }
    block.c[0] = at(even, _mm256_slli_epi16(fifth_even, 4));
    block.c[1] = at(odd, _mm256_slli_epi16(fifth_odd, 4));
    block.c[2] = at(_mm256_srli_epi16(even, 4), fifth_even);
    block.c[3] = at(_mm256_srli_epi16(odd, 4), fifth_odd);
  }
};

#endif

#endif

}  // namespace
}  // namespace moeq::MOEQ_ISA

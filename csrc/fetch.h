// Asking the memory for what a product reads next: what machines guess by themselves comes too late for rows of some hundred
// bytes.
#pragma once

#include "records.h"

namespace moeq::MOEQ_ISA {

// Bytes that codes are fetched ahead, into the second-level cache: the first takes few requests at a time, and what is
// asked for so early drives out what is needed now (AMD Zen 4: 1.1 to 1.8 times slower, most with two threads).
constexpr int64_t kAhead = 8192;
constexpr int64_t kStart = 4096;  // bytes that are fetched before a run begins

MOEQ_INLINE void ask(const void* at) { __builtin_prefetch(at, 0, 2); }

// Asks for what a plane of some width needs kAhead bytes later, each line of 64 bytes once.
template <int kWidth>
MOEQ_INLINE void fetch(const uint8_t* at, int64_t block) {
  if (kWidth >= 4 || (kWidth == 2 && block % 2 == 0) || (kWidth == 1 && block % 4 == 0))
    ask(at + kAhead);
  if (kWidth == 8) ask(at + kAhead + 64);
}

MOEQ_INLINE void fetch_all(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) ask((const char*)from + at);
}

// Asks for scales and zeros of the rows that come next: too few to be fetched in time otherwise. Inlined by force, since
// compilers drop calls of functions that do nothing but this.
MOEQ_INLINE void fetch_scales(const Matrix& m, int64_t row, int64_t num_rows) {
  const int64_t groups = (m.columns + m.group_size - 1) / m.group_size, first = row * groups, count = num_rows * groups;
  fetch_all(m.scale + first, count * 2);
  if (m.levels == Levels::asym) fetch_all((const uint8_t*)m.zero + first, count);
  if (m.levels == Levels::asym16) fetch_all((const uint16_t*)m.zero + first, count * 2);
}

// Asks for the beginning of a run of rows, and for the first scales, which nobody asked for yet.
MOEQ_INLINE void fetch_start(const Matrix& m, int64_t row, int64_t num_rows, int64_t with_scales) {
  fetch_scales(m, row, min_of(num_rows, with_scales));
  for (int plane = 0; plane < 2 && m.widths[plane]; plane++) {
    const int64_t bytes = row_bytes(m.columns, m.widths[plane]);
    fetch_all(m.planes[plane] + row * bytes, min_of(num_rows * bytes, kStart));
  }
}

}  // namespace moeq::MOEQ_ISA

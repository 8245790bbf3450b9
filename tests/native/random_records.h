// Random matrix records, in memory of exactly their size.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

inline std::mt19937 random_bits(1);

inline int pick(int from, int to) { return std::uniform_int_distribution<int>(from, to)(random_bits); }

inline int64_t aligned(int64_t size) { return (size + 63) / 64 * 64; }

struct Spec {
  int bits;
  int64_t group_size;
  int levels;
};

constexpr int kVector = 4;   // the level set of codebooks
constexpr int kTrellis = 5;  // and that of trellises

// Of a matrix with `columns` columns; `scalar`: neither in codebooks nor of a trellis.
inline Spec any_spec(int64_t columns, bool scalar = false) {
  const Spec book{pick(2, 3), -1, kVector};
  if (!scalar && pick(0, 3) == 0 && columns % (book.bits == 2 ? 4 : 2) == 0) return book;
  const int bits[] = {1, 2, 3, 4, 5, 6, 8};
  const int groups[] = {32, 64, 128, -1};
  if (!scalar && pick(0, 3) == 0) return {pick(1, 4), groups[pick(0, 3)], kTrellis};
  return {bits[pick(0, 6)], groups[pick(0, 3)], pick(0, 3)};
}

inline std::vector<uint8_t> book_record_of(const Spec& spec, int64_t rows, int64_t columns) {
  const int64_t dim = spec.bits == 2 ? 4 : 2, codes = columns / dim, width = spec.bits == 2 ? 256 : 128;
  const int64_t book = spec.bits == 2 ? 1024 : 128;
  std::vector<uint8_t> out;
  for (const int plane : {spec.bits == 2 ? 8 : 4, spec.bits == 2 ? 0 : 2})
    for (int64_t i = 0; i < aligned(rows * (codes / 128 * 16 * plane + (codes % 128 + 7) / 8 * plane)); i++)
      out.push_back((uint8_t)pick(0, 255));
  for (int64_t i = 0; i < aligned(2 * rows); i++) out.push_back(i % 2 ? 0x20 : (uint8_t)pick(0, 255));  // about 2^-7
  for (int64_t i = 0; i < aligned((rows + 255) / 256 * ((columns + width - 1) / width) * book); i++)
    out.push_back((uint8_t)pick(0, 255));
  out.shrink_to_fit();
  return out;
}

// A record of random codes, scales from 0.25 to 0.5 and small zeros.
inline std::vector<uint8_t> record_of(const Spec& spec, int64_t rows, int64_t columns) {
  if (spec.levels == kVector) return book_record_of(spec, rows, columns);
  const int first = spec.bits == 3 ? 2 : spec.bits > 4 && spec.bits < 8 ? 4 : spec.bits;
  std::vector<uint8_t> out;
  for (const int width : {first, spec.bits - first})
    if (width) {
      const int64_t row = columns / 128 * 16 * width + (columns % 128 + 7) / 8 * width;
      for (int64_t i = 0; i < aligned(rows * row); i++) out.push_back((uint8_t)pick(0, 255));
    }
  const int64_t groups = rows * (spec.group_size < 0 ? 1 : (columns + spec.group_size - 1) / spec.group_size);
  for (int64_t i = 0; i < aligned(2 * groups); i++) out.push_back(i % 2 ? 0x34 : (uint8_t)pick(0, 255));
  const int zero_bytes = spec.levels == 0 ? 1 : spec.levels == 1 ? 2 : 0;
  for (int64_t i = 0; i < aligned(zero_bytes * groups); i++)
    out.push_back(zero_bytes == 1 ? (uint8_t)pick(0, 255) : i % 2 ? 0x3c : (uint8_t)pick(0, 255));
  out.shrink_to_fit();
  return out;
}

// See codebook.h. Entries are looked up for runs of 128 weights, which are multiplied as codes of 8 bits are (dots.h).
// Pairs of weights have 64 entries: byte shuffles look up 32 at once. Vectors of four have 256, each a load of its own.
#include "codebook.h"

#include "dots.h"
#include "lanes.h"
#include "planes.h"
#include "records.h"
#include "trellis.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr int kMost = 4 * kBlock;  // weights that a block of codes stands for, at most

// The entries of block `block` of a row's codes, 128 being 0; the number of weights.
inline int entries_of(const Matrix& m, int64_t row, int64_t block, uint8_t* entries) {
  Matrix codes_only = m;
  codes_only.columns = m.columns / m.dim;
  alignas(64) uint8_t codes[kBlock];
  const int here = unpack_row(codes_only, row, block, codes);
  const int each = (int)book_columns(m) / m.dim;  // codes that share a book
  const int64_t across = (m.columns + book_columns(m) - 1) / book_columns(m);
  const uint8_t* book = m.books + (row / kBookRows * across + block * (kBlock / each)) * book_bytes(m);
  for (int j = 0; j < here; j++) {
    const uint8_t* entry = book + j / each * book_bytes(m) + codes[j] * m.dim;
    std::memcpy(entries + j * m.dim, entry, 2);
    if (m.dim == 4) std::memcpy(entries + j * m.dim + 2, entry + 2, 2);
  }
  return here * m.dim;
}

inline int64_t code_blocks(const Matrix& m) { return num_blocks(m.columns / m.dim); }

// Weights as docs/format.md says, times floats.
void exact_rows(const MatvecJob& job) {
  const Matrix& m = *job.matrix;
  for (int64_t row = job.first; row < job.last; row++) {
    const float scale = half_to_float(m.scale[row]);
    F sums[kMaxTokens];
    for (int t = 0; t < job.num_x; t++) sums[t] = all(0.0f);
    for (int64_t block = 0; block < code_blocks(m); block++) {
      alignas(64) uint8_t entries[kMost];
      alignas(64) float w[kMost];
      const int here = entries_of(m, row, block, entries), whole = (here + kLanes - 1) / kLanes * kLanes;
      for (int j = 0; j < here; j++) w[j] = ((float)entries[j] - 128.0f) * scale;
      for (int j = here; j < whole; j++) w[j] = 0.0f;
      for (int t = 0; t < job.num_x; t++)
        for (int j = 0; j < whole; j += kLanes)
          sums[t] = fma(load(w + j), load(job.x[t]->x + block * kBlock * m.dim + j), sums[t]);
    }
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = sum_lanes(sums[t]);
  }
}

// Blocks of codes from `block` on in plain integers, without the row's scale.
inline void plain_blocks(const Matrix& m, int64_t row, int64_t block, const MatvecJob& job, float* sums) {
  for (; block < code_blocks(m); block++) {
    alignas(64) uint8_t entries[kMost];
    const int here = entries_of(m, row, block, entries);
    for (int start = 0; start < here; start += kBlock) {
      const int64_t column = block * kBlock * m.dim + start;
      const int size = (int)min_of(here - start, kBlock);
      for (int t = 0; t < job.num_x; t++) {
        // Two sums: GCC 12 vectorizes that of signed times signed bytes wrongly where it has VNNI (-O3, from 32 on).
        int32_t dot = 0, sum = 0;
        for (int j = 0; j < size; j++) dot += (int32_t)entries[start + j] * job.x[t]->q[column + j];
        for (int j = 0; j < size; j++) sum += job.x[t]->q[column + j];
        sums[t] += job.x[t]->scale[0][column / kBlock] * (float)(dot - 128 * sum);
      }
    }
  }
}

#if MOEQ_DOTS

constexpr int64_t kRows = 64;          // that share the books of a segment
constexpr int64_t kSegment = 4096;     // columns whose books stay in the first-level cache
constexpr int64_t kRuns = kSegment / kBlock;

// Sums of one row times up to four vectors. Named, not an array: compilers keep those in memory.
struct Sums {
  __m256 a, b, c, d;
};

struct Inputs {
  const int8_t *q0, *q1, *q2, *q3;
  const float *scale0, *scale1, *scale2, *scale3;

  Inputs(const MatvecJob& job, int64_t run) {
    const auto at = [&](int t) { return job.x[t < job.num_x ? t : 0]; };
    q0 = at(0)->q + run * kBlock;
    q1 = at(1)->q + run * kBlock;
    q2 = at(2)->q + run * kBlock;
    q3 = at(3)->q + run * kBlock;
    scale0 = at(0)->scale[0] + run;
    scale1 = at(1)->scale[0] + run;
    scale2 = at(2)->scale[0] + run;
    scale3 = at(3)->scale[0] + run;
  }
};

template <int kTokens>
MOEQ_INLINE void add_run(const SignedDots& dots, const Inputs& x, int64_t run, Sums& sum) {
  sum.a = dots.template add<1>(x.q0 + run * kBlock, x.scale0 + run, sum.a);
  if (kTokens > 1) sum.b = dots.template add<1>(x.q1 + run * kBlock, x.scale1 + run, sum.b);
  if (kTokens > 2) sum.c = dots.template add<1>(x.q2 + run * kBlock, x.scale2 + run, sum.c);
  if (kTokens > 3) sum.d = dots.template add<1>(x.q3 + run * kBlock, x.scale3 + run, sum.d);
}

// Vectors of four weights.
struct Fours {
  static constexpr int kDim = 4;
  const uint8_t* books;

  // The books of a segment, whose first run is `run`.
  void take(const Matrix& m, int64_t row, int64_t run, int64_t) {
    const int64_t across = (m.columns + 255) / 256;
    books = m.books + (row / kBookRows * across + run / 2) * 1024;
  }

  // Eight entries. The gather instruction took 1.7 times as long (AMD Zen 3).
  MOEQ_INLINE V eight(const uint8_t* codes, const uint8_t* book) {
    uint64_t c;
    std::memcpy(&c, codes, 8);
    const auto entry = [&](int i) {
      int32_t out;
      std::memcpy(&out, book + ((c >> (8 * i)) & 255) * 4, 4);
      return out;
    };
    return _mm256_setr_epi32(entry(0), entry(1), entry(2), entry(3), entry(4), entry(5), entry(6), entry(7));
  }

  // `count` runs of a row from run `run` on. Codes behind the end of a row are those of the next one, or scales: their
  // weights meet zeros.
  template <int kTokens>
  inline __attribute__((always_inline)) void row(const Matrix& m, int64_t row, int64_t run, int64_t count, const Inputs& x, Sums& sum) const {
    const uint8_t* codes = m.planes[0] + row * row_bytes(m.columns / 4, 8) + run * 32;
    for (int64_t i = 0; i < count; i++) {
      const uint8_t* book = books + i / 2 * 1024;
      SignedDots dots;
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) dots.c[s] = _mm256_xor_si256(eight(codes + 32 * i + 8 * s, book), bytes_of(128));
      add_run<kTokens>(dots, x, i, sum);
    }
  }

  // Runs of a row that `row` does.
  static int64_t runs(const Matrix& m) { return num_blocks(m.columns); }
};

// Pairs of weights. A code is 4 p + q with p in the plane of 4 bits: p chooses inside of a register, q among four.
struct Pairs {
  static constexpr int kDim = 2;
  alignas(64) uint8_t tables[kRuns][4][2][16];  // run, q, weight of the pair, p; signed

  void take(const Matrix& m, int64_t row, int64_t run, int64_t count) {
    const int64_t across = (m.columns + 127) / 128;
    const uint8_t* book = m.books + (row / kBookRows * across + run) * 128;
    for (int64_t i = 0; i < count; i++, book += 128) {
      __m128i a[8], b[8];
      for (int j = 0; j < 8; j++) a[j] = _mm_loadu_si128((const __m128i*)book + j);
      // The bits of a place are p, q, weight. Merging the halves makes the first bit the last one; four times, and p is.
      for (int round = 0; round < 4; round++) {
        for (int j = 0; j < 4; j++) {
          b[2 * j] = _mm_unpacklo_epi8(a[j], a[j + 4]);
          b[2 * j + 1] = _mm_unpackhi_epi8(a[j], a[j + 4]);
        }
        for (int j = 0; j < 8; j++) a[j] = b[j];
      }
      for (int j = 0; j < 8; j++)
        _mm_store_si128((__m128i*)&tables[i][j / 2][j % 2], _mm_xor_si128(a[j], _mm_set1_epi8((char)128)));
    }
  }

  MOEQ_INLINE V choose(const uint8_t table[4][2][16], int weight, V p, V q0, V q1) {
    const auto entry = [&](int q) { return _mm256_shuffle_epi8(load_twice(table[q][weight]), p); };
    return _mm256_blendv_epi8(_mm256_blendv_epi8(entry(0), entry(1), q0), _mm256_blendv_epi8(entry(2), entry(3), q0), q1);
  }

  // Two registers of weights for 32 codes, whose bytes are in the order of `spread`.
  MOEQ_INLINE void look_up(const uint8_t table[4][2][16], V p, V q0, V q1, V* c) {
    const V even = choose(table, 0, p, q0, q1), odd = choose(table, 1, p, q0, q1);
    c[0] = _mm256_unpacklo_epi8(even, odd);
    c[1] = _mm256_unpackhi_epi8(even, odd);
  }

  // Quarters 0, 2, 1, 3, so that unpacking within halves gives the right order.
  MOEQ_INLINE V spread(const uint8_t* from) { return _mm256_permute4x64_epi64(load_codes(from), 0xd8); }

  template <int kTokens>
  inline __attribute__((always_inline)) void row(const Matrix& m, int64_t row, int64_t run, int64_t count, const Inputs& x, Sums& sum) const {
    const int64_t columns = m.columns / 2;
    const uint8_t* first = m.planes[0] + row * row_bytes(columns, 4) + run * 32;
    const uint8_t* second = m.planes[1] + row * row_bytes(columns, 2) + run * 16;
    for (int64_t i = 0; i < count; i += 2, first += 64, second += 32) {
      const V p0 = spread(first), p1 = spread(first + 32), q = spread(second);
      SignedDots dots;
      look_up(tables[i], field<0>(p0, 15), _mm256_slli_epi16(q, 7), _mm256_slli_epi16(q, 6), dots.c);
      look_up(tables[i], field<0>(p1, 15), _mm256_slli_epi16(q, 5), _mm256_slli_epi16(q, 4), dots.c + 2);
      add_run<kTokens>(dots, x, i, sum);
      look_up(tables[i + 1], field<4>(p0, 15), _mm256_slli_epi16(q, 3), _mm256_slli_epi16(q, 2), dots.c);
      look_up(tables[i + 1], field<4>(p1, 15), _mm256_slli_epi16(q, 1), q, dots.c + 2);
      add_run<kTokens>(dots, x, i + 1, sum);
    }
  }

  static int64_t runs(const Matrix& m) { return m.columns / (2 * kBlock) * 2; }
};

// Rows of one block of rows, at most kRows.
template <class Entries, int kTokens>
void some_rows(const MatvecJob& job, int64_t first, int64_t last) {
  const Matrix& m = *job.matrix;
  const int64_t runs = Entries::runs(m);
  Sums sums[kRows];
  for (int64_t r = 0; r < last - first; r++) sums[r].a = sums[r].b = sums[r].c = sums[r].d = _mm256_setzero_ps();
  for (int64_t run = 0; run < runs; run += kRuns) {
    const int64_t count = min_of(runs - run, kRuns);
    Entries entries;
    entries.take(m, first, run, count);
    const Inputs x(job, run);
    for (int64_t row = first; row < last; row++) {
      Sums sum = sums[row - first];
      entries.template row<kTokens>(m, row, run, count, x, sum);
      sums[row - first] = sum;
    }
  }
  for (int64_t row = first; row < last; row++) {
    const Sums& sum = sums[row - first];
    const __m256 all[kMaxTokens] = {sum.a, sum.b, sum.c, sum.d};
    float tails[kMaxTokens] = {};
    if (runs * kBlock < m.columns) plain_blocks(m, row, runs / Entries::kDim, job, tails);
    for (int t = 0; t < kTokens; t++) job.out[t][row] = half_to_float(m.scale[row]) * (sum_lanes(all[t]) + tails[t]);
  }
}

template <class Entries>
void rows_in(const MatvecJob& job) {
  for (int64_t row = job.first; row < job.last;) {
    const int64_t last = min_of(min_of(row + kRows, job.last), (row / kBookRows + 1) * kBookRows);
    switch (job.num_x) {
      case 1:
        some_rows<Entries, 1>(job, row, last);
        break;
      case 2:
        some_rows<Entries, 2>(job, row, last);
        break;
      case 3:
        some_rows<Entries, 3>(job, row, last);
        break;
      default:
        some_rows<Entries, 4>(job, row, last);
    }
    row = last;
  }
}

void integer_rows(const MatvecJob& job) {
  if (job.matrix->dim == 4) return rows_in<Fours>(job);
  return rows_in<Pairs>(job);
}

#else

void integer_rows(const MatvecJob& job) {
  const Matrix& m = *job.matrix;
  for (int64_t row = job.first; row < job.last; row++) {
    float sums[kMaxTokens] = {};
    plain_blocks(m, row, 0, job, sums);
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = half_to_float(m.scale[row]) * sums[t];
  }
}

#endif

}  // namespace

void matvec_codebooks(const MatvecJob& job) {
  if (job.exact)
    exact_rows(job);
  else
    integer_rows(job);
}

void look_up(const LookUpJob& job) {
  const Matrix& m = *job.matrix;
  if (m.levels == Levels::trellis) return look_up_trellis(job);
  for (int64_t row = job.first; row < job.last; row++) {
    const float scale = half_to_float(m.scale[row]);
    for (int64_t block = 0; block < code_blocks(m); block++) {
      alignas(64) uint8_t entries[kMost];
      alignas(64) float w[kMost];
      const int here = entries_of(m, row, block, entries);
      for (int j = 0; j < here; j++) w[j] = ((float)entries[j] - 128.0f) * scale;
      store_as(w, here, job.dtype, job.w, (row - job.first) * m.columns + block * kBlock * m.dim);
    }
  }
}

}  // namespace moeq::MOEQ_ISA

// See trellis.h. A row is read with the history of every column beside it, which the row itself then makes older.
#include "trellis.h"

#include "dots.h"
#include "lanes.h"
#include "planes.h"
#include "records.h"
#include "trellis_tables.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr int64_t kSegment = 4096;  // columns whose histories stay in the first-level cache
constexpr int64_t kSegmentBlocks = kSegment / kBlock;

MOEQ_INLINE int64_t groups_of(const Matrix& m) { return (m.columns + m.group_size - 1) / m.group_size; }

// Some columns, from row to row.
struct Histories {
  alignas(64) uint8_t of[kSegment];
  const Matrix& m;
  int64_t block, blocks;  // first of them, number

  Histories(const Matrix& matrix, int64_t first_block)
      : m(matrix), block(first_block), blocks(min_of(num_blocks(matrix.columns) - first_block, kSegmentBlocks)) {}

  // Ready for row `row`, whatever was before.
  void start(int64_t row) {
    std::memset(of, 0, sizeof of);
    const int64_t restart = row / kRestart * kRestart, first = row - kHistory[m.bits] > restart ? row - kHistory[m.bits] : restart;
    alignas(64) uint8_t codes[kBlock];
    for (int64_t r = first; r < row; r++)
      for (int64_t b = 0; b < blocks; b++) {
        const int here = unpack_row(m, r, block + b, codes);
        for (int j = 0; j < here; j++) older(of[b * kBlock + j], codes[j]);
      }
  }

  // Nothing is known at the start of a run.
  inline __attribute__((always_inline)) void restart_at(int64_t row) {
    if (row % kRestart == 0) std::memset(of, 0, (size_t)(blocks * kBlock));
  }

  inline __attribute__((always_inline)) void older(uint8_t& history, uint8_t code) const {
    history = (uint8_t)((history << 1 | (code & 1)) & ((1 << kHistory[m.bits]) - 1));
  }

  // Entries of block b of a row, which becomes history.
  int entries(int64_t row, int64_t b, int8_t* out) {
    alignas(64) uint8_t codes[kBlock];
    const int here = unpack_row(m, row, block + b, codes);
    uint8_t* history = of + b * kBlock;
    for (int j = 0; j < here; j++) {
      out[j] = kTrellis[m.bits][history[j] << m.bits | codes[j]];
      older(history[j], codes[j]);
    }
    return here;
  }

  // The same as weights.
  int weights(int64_t row, int64_t b, float* w) {
    alignas(64) int8_t entry[kBlock];
    const int here = entries(row, b, entry);
    const int64_t column = (block + b) * kBlock, groups = groups_of(m);
    for (int start = 0; start < here;) {
      const int64_t group = (column + start) / m.group_size;
      const int stop = (int)min_of(here, (group + 1) * m.group_size - column);
      const float scale = half_to_float(m.scale[row * groups + group]);
      for (int j = start; j < stop; j++) w[j] = (float)entry[j] * (1.0f / 32) * scale;
      start = stop;
    }
    return here;
  }
};

// Calls work(histories, row) for some rows of one segment of columns after the other.
template <class Work>
void each_row(const Matrix& m, int64_t first_row, int64_t last_row, Work work) {
  for (int64_t first = 0; first < num_blocks(m.columns); first += kSegmentBlocks) {
    Histories histories(m, first);
    histories.start(first_row);
    for (int64_t row = first_row; row < last_row; row++) {
      histories.restart_at(row);
      work(histories, row);
    }
  }
}

// Weights as docs/format.md says, times floats.
void exact_rows(const MatvecJob& job) {
  each_row(*job.matrix, job.first, job.last, [&](Histories& histories, int64_t row) {
    const int64_t first = histories.block;
    F sums[kMaxTokens];
    for (int t = 0; t < job.num_x; t++) sums[t] = all(0.0f);
    for (int64_t b = 0; b < histories.blocks; b++) {
      alignas(64) float w[kBlock] = {};
      histories.weights(row, b, w);
      for (int t = 0; t < job.num_x; t++)
        for (int j = 0; j < kBlock; j += kLanes)
          sums[t] = fma(load(w + j), load(job.x[t]->x + (first + b) * kBlock + j), sums[t]);
    }
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = (first ? job.out[t][row] : 0.0f) + sum_lanes(sums[t]);
  });
}

// Block b of a row in plain integers, in 32nds.
void plain_block(Histories& histories, int64_t row, int64_t b, const MatvecJob& job, float* sums) {
  const Matrix& m = *job.matrix;
  alignas(64) int8_t entry[kBlock];
  const int here = histories.entries(row, b, entry);
  const int64_t at = histories.block + b;
  const bool grouped = is_grouped(m.group_size);
  const int grain = !grouped || m.group_size == 128 ? 0 : m.group_size == 64 ? 1 : 2, size = kBlock >> grain;
  for (int start = 0; start < here; start += size) {
    const int64_t part = (at << grain) + start / size;
    const float scale = half_to_float(m.scale[row * groups_of(m) + (grouped ? part : 0)]);
    const int stop = start + size < here ? start + size : here;
    for (int t = 0; t < job.num_x; t++) {
      // Two sums: GCC 12 vectorizes that of signed times signed bytes wrongly where it has VNNI (-O3, from 32 on).
      const int8_t* q = job.x[t]->q + at * kBlock;
      int32_t dot = 0, sum = 0;
      for (int j = start; j < stop; j++) dot += (int32_t)(uint8_t)(entry[j] + 128) * q[j];
      for (int j = start; j < stop; j++) sum += q[j];
      sums[t] += scale * job.x[t]->scale[grain][part] * (float)(dot - 128 * sum);
    }
  }
}

#if MOEQ_DOTS
#if !defined(__AVX512VNNI__)

// 64 entries: four shuffles of 16, of which two bits choose.
struct Table {
  V parts[4];

  explicit Table(int bits) {
    for (int part = 0; part < 4; part++) parts[part] = load_twice((const uint8_t*)kTrellis[bits] + 16 * part);
  }

  inline __attribute__((always_inline)) V at(V index) const {
    const V bit4 = _mm256_slli_epi16(index, 3), bit5 = _mm256_slli_epi16(index, 2);
    const V low = _mm256_blendv_epi8(_mm256_shuffle_epi8(parts[0], index), _mm256_shuffle_epi8(parts[1], index), bit4);
    const V high = _mm256_blendv_epi8(_mm256_shuffle_epi8(parts[2], index), _mm256_shuffle_epi8(parts[3], index), bit4);
    return _mm256_blendv_epi8(low, high, bit5);
  }
};

struct Sums {
  __m256 a, b, c, d;
};

template <int kBits, int kParts, int kTokens>
void segment(const MatvecJob& job, int64_t first) {
  constexpr int grain = kParts == 4 ? 2 : kParts == 2 ? 1 : 0;
  constexpr int width1 = kBits == 3 ? 2 : kBits, width2 = kBits == 3 ? 1 : 0;
  const Matrix& m = *job.matrix;
  const Table table(kBits);
  Histories histories(m, first);
  histories.start(job.first);
  const int64_t whole = min_of(m.columns / kBlock - first, histories.blocks), groups = groups_of(m);
  const int64_t bytes1 = row_bytes(m.columns, width1), bytes2 = width2 ? row_bytes(m.columns, width2) : 0;
  const bool grouped = is_grouped(m.group_size);
  const V known = bytes_of((1 << kHistory[kBits]) - 1), one = bytes_of(1);
  const auto input = [&](int t) { return job.x[t < kTokens ? t : 0]; };
  const int8_t *q0 = input(0)->q + first * kBlock, *q1 = input(1)->q + first * kBlock;
  const int8_t *q2 = input(2)->q + first * kBlock, *q3 = input(3)->q + first * kBlock;
  alignas(64) float scale[kTokens][kSegmentBlocks * kParts + 8];
  for (int64_t row = job.first; row < job.last; row++) {
    histories.restart_at(row);
    const int64_t start = row * groups + (grouped ? first * kParts : 0), left = m.rows * groups - start;
    const __m256 all_groups = _mm256_set1_ps(half_to_float(m.scale[row * groups]));
    for (int64_t g = 0; g < whole * kParts; g += 8) {
      const __m256 w = grouped ? eight_halves(m.scale + start + g, left - g) : all_groups;
      for (int t = 0; t < kTokens; t++)
        _mm256_storeu_ps(scale[t] + g, _mm256_mul_ps(w, _mm256_loadu_ps(input(t)->scale[grain] + first * kParts + g)));
    }
    const uint8_t* plane1 = m.planes[0] + row * bytes1 + first * (16 * width1);
    const uint8_t* plane2 = m.planes[width2 ? 1 : 0] + row * bytes2 + first * (16 * width2);
    Sums sum{_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int64_t b = 0; b < whole; b++) {
      Dots<8> dots;
      V c[4];
      unpack_codes<kBits>(plane1 + b * (16 * width1), plane2 + b * (16 * width2), c);
      uint8_t* history = histories.of + b * kBlock;
#pragma GCC unroll 4
      for (int s = 0; s < 4; s++) {
        const V before = load_codes(history + 32 * s);
        dots.c[s] = table.at(_mm256_or_si256(_mm256_slli_epi16(before, kBits), c[s]));
        const V after = _mm256_or_si256(_mm256_add_epi8(before, before), _mm256_and_si256(c[s], one));
        _mm256_store_si256((V*)(history + 32 * s), _mm256_and_si256(after, known));
      }
      sum.a = dots.template add<kParts>(q0 + b * kBlock, scale[0] + b * kParts, sum.a);
      if (kTokens > 1) sum.b = dots.template add<kParts>(q1 + b * kBlock, scale[1 % kTokens] + b * kParts, sum.b);
      if (kTokens > 2) {
        sum.c = dots.template add<kParts>(q2 + b * kBlock, scale[2 % kTokens] + b * kParts, sum.c);
        sum.d = dots.template add<kParts>(q3 + b * kBlock, scale[3 % kTokens] + b * kParts, sum.d);
      }
    }
    float sums[kMaxTokens] = {sum_lanes(sum.a), kTokens > 1 ? sum_lanes(sum.b) : 0.0f,
                              kTokens > 2 ? sum_lanes(sum.c) : 0.0f, kTokens > 2 ? sum_lanes(sum.d) : 0.0f};
    for (int64_t b = whole; b < histories.blocks; b++) plain_block(histories, row, b, job, sums);
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = (first ? job.out[t][row] : 0.0f) + sums[t] * (1.0f / 32);
  }
}

#else

using W = __m512i;

// 64 codes of a block in order, and the next 64, from its planes.
template <int kBits>
MOEQ_INLINE void unpack_wide(const uint8_t* first, const uint8_t* second, W* c) {
  const auto twice = [](__m256i v) { return _mm512_broadcast_i64x4(v); };
  const auto halves = [](int low, int high) {
    return _mm512_inserti64x4(_mm512_set1_epi16((short)low), _mm256_set1_epi16((short)high), 1);
  };
  if (kBits == 1 || kBits == 3) {
    // Fields of 16 codes: a quarter of a register each.
    const uint8_t* plane = kBits == 1 ? first : second;
    const W bytes = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)plane));
    const W low = _mm512_set_epi64(0x0003000300030003, 0x0003000300030003, 0x0002000200020002, 0x0002000200020002,
                                   0x0001000100010001, 0x0001000100010001, 0, 0);
    const W high = _mm512_add_epi16(low, _mm512_set1_epi16(4));
    c[0] = _mm512_and_si512(_mm512_srlv_epi16(bytes, low), _mm512_set1_epi8(1));
    c[1] = _mm512_and_si512(_mm512_srlv_epi16(bytes, high), _mm512_set1_epi8(1));
  }
  if (kBits == 2 || kBits == 3) {
    const W bytes = twice(_mm256_loadu_si256((const __m256i*)first));
    const W a = _mm512_and_si512(_mm512_srlv_epi16(bytes, halves(0, 2)), _mm512_set1_epi8(3));
    const W b = _mm512_and_si512(_mm512_srlv_epi16(bytes, halves(4, 6)), _mm512_set1_epi8(3));
    c[0] = kBits == 2 ? a : _mm512_or_si512(_mm512_add_epi8(a, a), c[0]);
    c[1] = kBits == 2 ? b : _mm512_or_si512(_mm512_add_epi8(b, b), c[1]);
  }
  if (kBits == 4) {
    const W bytes = _mm512_loadu_si512(first);
    c[0] = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
    c[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
  }
}

// Entries plus 128, so that they are unsigned.
struct WideTable {
#if defined(__AVX512VBMI__)
  W all;
  explicit WideTable(int bits) : all(_mm512_xor_si512(_mm512_loadu_si512(kTrellis[bits]), _mm512_set1_epi8(-128))) {}
  inline __attribute__((always_inline)) W at(W index) const { return _mm512_permutexvar_epi8(index, all); }
#else
  W parts[4];
  explicit WideTable(int bits) {
    for (int part = 0; part < 4; part++)
      parts[part] = _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)kTrellis[bits] + part)), _mm512_set1_epi8(-128));
  }
  inline __attribute__((always_inline)) W at(W index) const {
    const __mmask64 bit4 = _mm512_test_epi8_mask(index, _mm512_set1_epi8(16)), bit5 = _mm512_test_epi8_mask(index, _mm512_set1_epi8(32));
    const W low = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(parts[0], index), bit4, parts[1], index);
    const W high = _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(parts[2], index), bit4, parts[3], index);
    return _mm512_mask_blend_epi8(bit5, low, high);
  }
#endif
};

template <int kParts>
MOEQ_INLINE __m512 add_wide(const W* entries, const int8_t* x, const float* scale, __m512 sum) {
  const W zero = _mm512_setzero_si512();
  const auto dot = [&](int half, W from) { return _mm512_dpbusd_epi32(from, entries[half], _mm512_loadu_si512(x + 64 * half)); };
  if (kParts == 1) return _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot(1, dot(0, zero))), _mm512_set1_ps(scale[0]), sum);
#pragma GCC unroll 2
  for (int half = 0; half < 2; half++) {
    const __m512 factor = kParts == 2 ? _mm512_set1_ps(scale[half])
                                      : _mm512_insertf32x8(_mm512_set1_ps(scale[2 * half]), _mm256_set1_ps(scale[2 * half + 1]), 1);
    sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot(half, zero)), factor, sum);
  }
  return sum;
}

// What is known of a segment for all of its rows.
template <int kTokens>
struct Segment {
  const MatvecJob& job;
  int64_t first, whole;  // blocks: the first one, and how many are whole
  const int8_t* q[4];
};

// `kRows` rows from `row` on, between which histories do not start: the second one takes over what the first one leaves.
template <int kBits, int kParts, int kTokens, int kRows>
MOEQ_INLINE void wide_rows(const Segment<kTokens>& s, const WideTable& table, Histories& histories, int64_t row) {
  static_assert(kTokens * kRows <= 4, "that many sums are named");
  constexpr int grain = kParts == 4 ? 2 : kParts == 2 ? 1 : 0;
  constexpr int width1 = kBits == 3 ? 2 : kBits, width2 = kBits == 3 ? 1 : 0;
  const MatvecJob& job = s.job;
  const Matrix& m = *job.matrix;
  const int64_t groups = groups_of(m), runs = s.whole * kParts;
  const int64_t bytes1 = row_bytes(m.columns, width1), bytes2 = width2 ? row_bytes(m.columns, width2) : 0;
  const bool grouped = is_grouped(m.group_size);
  // Histories are left longer than they count; what is too old is cut off where they are looked at.
  const W known = _mm512_set1_epi8(((1 << kHistory[kBits]) - 1) << kBits), one = _mm512_set1_epi8(1);
  alignas(64) float scale[kRows * kTokens][kSegmentBlocks * kParts + 8];
  __m256 bias[kRows * kTokens];
  for (int r = 0; r < kRows; r++) {
    const int64_t start = (row + r) * groups + (grouped ? s.first * kParts : 0), left = m.rows * groups - start;
    const __m256 all_groups = _mm256_set1_ps(half_to_float(m.scale[(row + r) * groups]));
    for (int t = 0; t < kTokens; t++) bias[r * kTokens + t] = _mm256_setzero_ps();
    for (int64_t g = 0; g < runs; g += 8) {
      __m256 w = grouped ? eight_halves(m.scale + start + g, left - g) : all_groups;
      if (runs - g < 8) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        w = _mm256_and_ps(w, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)(runs - g)), lane)));
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) {
        const Activations& x = *job.x[t];
        const __m256 both = _mm256_mul_ps(w, _mm256_loadu_ps(x.scale[grain] + s.first * kParts + g));
        _mm256_storeu_ps(scale[r * kTokens + t] + g, both);
        bias[r * kTokens + t] = _mm256_fmadd_ps(both, _mm256_loadu_ps(x.sum[grain] + s.first * kParts + g), bias[r * kTokens + t]);
      }
    }
  }
  const uint8_t* plane1 = m.planes[0] + row * bytes1 + s.first * (16 * width1);
  const uint8_t* plane2 = m.planes[width2 ? 1 : 0] + row * bytes2 + s.first * (16 * width2);
  // Named, not an array: compilers keep those in memory.
  __m512 a = _mm512_setzero_ps(), b = a, c = a, d = a;
  for (int64_t at = 0; at < s.whole; at++) {
    uint8_t* history = histories.of + at * kBlock;
    W before[2] = {_mm512_load_si512(history), _mm512_load_si512(history + 64)}, entries[kRows][2];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; r++) {
      W codes[2];
      unpack_wide<kBits>(plane1 + r * bytes1 + at * (16 * width1), plane2 + r * bytes2 + at * (16 * width2), codes);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const W shifted = _mm512_slli_epi16(before[half], kBits);
        entries[r][half] = table.at(_mm512_ternarylogic_epi64(shifted, known, codes[half], 0xea));  // a & b | c
        before[half] = _mm512_ternarylogic_epi64(_mm512_add_epi8(before[half], before[half]), codes[half], one, 0xf8);  // a | b & c
      }
    }
    _mm512_store_si512(history, before[0]);
    _mm512_store_si512(history + 64, before[1]);
    const auto add = [&](int slot, __m512 sum) {
      return add_wide<kParts>(entries[slot / kTokens], s.q[slot % kTokens] + at * kBlock, scale[slot] + at * kParts, sum);
    };
    a = add(0, a);
    if (kRows * kTokens > 1) b = add(1 % (kRows * kTokens), b);
    if (kRows * kTokens > 2) {
      c = add(2 % (kRows * kTokens), c);
      d = add(3 % (kRows * kTokens), d);
    }
  }
  const __m512 lanes[4] = {a, b, c, d};
  for (int r = 0; r < kRows; r++) {
    float sums[kMaxTokens] = {};
    for (int t = 0; t < kTokens; t++)
      sums[t] = _mm512_reduce_add_ps(lanes[r * kTokens + t]) - 128.0f * sum_lanes(bias[r * kTokens + t]);
    for (int64_t at = s.whole; at < histories.blocks; at++) plain_block(histories, row + r, at, job, sums);
    for (int t = 0; t < job.num_x; t++) {
      float* out = &job.out[t][row + r];
      *out = (s.first ? *out : 0.0f) + sums[t] * (1.0f / 32);
    }
  }
}

template <int kBits, int kParts, int kTokens>
void segment(const MatvecJob& job, int64_t first) {
  const Matrix& m = *job.matrix;
  const WideTable table(kBits);
  Histories histories(m, first);
  histories.start(job.first);
  Segment<kTokens> s{job, first, min_of(m.columns / kBlock - first, histories.blocks), {}};
  for (int t = 0; t < 4; t++) s.q[t] = job.x[t < kTokens ? t : 0]->q + first * kBlock;
  for (int64_t row = job.first; row < job.last;) {
    histories.restart_at(row);
    constexpr int rows = kTokens == 1 ? 4 : kTokens == 2 ? 2 : 1;
    // Histories start at multiples of 64, so that no group of rows that begins at one of its size goes over a start.
    if (rows > 1 && row % rows == 0 && row + rows <= job.last) {
      wide_rows<kBits, kParts, kTokens, rows>(s, table, histories, row);
      row += rows;
    } else {
      wide_rows<kBits, kParts, kTokens, 1>(s, table, histories, row++);
    }
  }
}

#endif

template <int kBits, int kTokens>
void by_group(const MatvecJob& job, int64_t first) {
  if (job.matrix->group_size == 32) return segment<kBits, 4, kTokens>(job, first);
  if (job.matrix->group_size == 64) return segment<kBits, 2, kTokens>(job, first);
  return segment<kBits, 1, kTokens>(job, first);
}

template <int kTokens>
void by_bits(const MatvecJob& job) {
  for (int64_t first = 0; first < num_blocks(job.matrix->columns); first += kSegmentBlocks) {
    if (job.matrix->bits == 1)
      by_group<1, kTokens>(job, first);
    else if (job.matrix->bits == 2)
      by_group<2, kTokens>(job, first);
    else if (job.matrix->bits == 3)
      by_group<3, kTokens>(job, first);
    else
      by_group<4, kTokens>(job, first);
  }
}

void integer_rows(const MatvecJob& job) {
  // Three vectors are four, the first of them twice.
  if (job.num_x == 1) return by_bits<1>(job);
  if (job.num_x == 2) return by_bits<2>(job);
  MatvecJob four = job;
  for (int t = job.num_x; t < 4; t++) four.x[t] = job.x[0];
  by_bits<4>(four);
}

#else

void integer_rows(const MatvecJob& job) {
  each_row(*job.matrix, job.first, job.last, [&](Histories& histories, int64_t row) {
    float sums[kMaxTokens] = {};
    for (int64_t b = 0; b < histories.blocks; b++) plain_block(histories, row, b, job, sums);
    for (int t = 0; t < job.num_x; t++)
      job.out[t][row] = (histories.block ? job.out[t][row] : 0.0f) + sums[t] * (1.0f / 32);
  });
}

#endif

}  // namespace

void matvec_trellis(const MatvecJob& job) {
#if defined(__AVX512VNNI__) && !defined(__AVX512VBMI__)
  static const bool better = __builtin_cpu_supports("avx512vbmi");
  if (better) return avx512vbmi::matvec_trellis(job);
#endif
  if (job.exact)
    exact_rows(job);
  else
    integer_rows(job);
}

void look_up_trellis(const LookUpJob& job) {
  each_row(*job.matrix, job.first, job.last, [&](Histories& histories, int64_t row) {
    for (int64_t b = 0; b < histories.blocks; b++) {
      alignas(64) float w[kBlock];
      const int here = histories.weights(row, b, w);
      const int64_t at = (row - job.first) * job.matrix->columns + (histories.block + b) * kBlock;
      store_as(w, here, job.dtype, job.w, at);
    }
  });
}

}  // namespace moeq::MOEQ_ISA

// See trellis.h. Levels are looked up by trellis_levels.h.
#include "trellis.h"

#include "dots.h"
#include "lanes.h"
#include "planes.h"
#include "records.h"
#include "trellis_levels.h"

namespace moeq::MOEQ_ISA {
namespace {

// The entries of `here` codes of block b of row r of some rows, into room for a whole block.
template <int kBits>
int entries(const Rows& rows, int r, int64_t b, int here, int8_t* out) {
  constexpr int width = kBits == 3 ? 1 : kBits, parities = kParities[kBits];
  const int bytes = (here + 7) / 8 * width;
  const int64_t from = b * (kBlock / 8 * width);
  alignas(64) uint8_t index[kBlock] = {}, odd[kBlock / 2];
  if (kBits == 3)
    unpack_plane(rows.upper[r] + b * (kBlock / 4), 2, here, true, index);
  else
    unpack_plane(rows.at(r, 0) + from, width, here, true, index);
  const int dropped = kBits == 3 ? 0 : 1;
  for (int j = 0; j < bytes * (8 / width); j++) index[j] = (uint8_t)(index[j] >> dropped << parities);
  for (int p = 0; p < parities; p++) {
    std::memset(odd, 0, sizeof odd);
#pragma GCC unroll 7
    for (int k = 0; k <= kMost; k++)
      if (kTaps[kBits][p] >> k & 1)
        for (int j = 0; j < bytes; j++) odd[j] ^= rows.at(r, k)[from + j];
#pragma GCC unroll 8
    for (int s = 0; s < 8 / width; s++)
      for (int j = 0; j < bytes; j++) index[s * bytes + j] |= (uint8_t)((odd[j] >> (s * width) & 1) << p);
  }
  for (int j = 0; j < here; j++) out[j] = kTrellis[kBits][index[j]];
  return here;
}

int entries_of(const Matrix& m, const Rows& rows, int r, int64_t first, int64_t b, int8_t* out) {
  const int here = (int)min_of(m.columns - (first + b) * kBlock, kBlock);
  switch (m.bits) {
    case 1:
      return entries<1>(rows, r, b, here, out);
    case 2:
      return entries<2>(rows, r, b, here, out);
    case 3:
      return entries<3>(rows, r, b, here, out);
    default:
      return entries<4>(rows, r, b, here, out);
  }
}

// The same as weights.
int weights_of(const Matrix& m, const Rows& rows, int64_t row, int64_t first, int64_t b, float* w) {
  alignas(64) int8_t entry[kBlock];
  const int here = entries_of(m, rows, 0, first, b, entry);
  const int64_t column = (first + b) * kBlock, groups = groups_of(m);
  for (int start = 0; start < here;) {
    const int64_t group = (column + start) / m.group_size;
    const int stop = (int)min_of(here, (group + 1) * m.group_size - column);
    const float scale = half_to_float(m.scale[row * groups + group]);
    for (int j = start; j < stop; j++) w[j] = (float)entry[j] * scale;
    start = stop;
  }
  return here;
}

// Calls work(rows, row, first block, blocks) for all segments of one row after the other.
template <class Work>
void each_segment(const Matrix& m, int64_t first_row, int64_t last_row, Work work) {
  for (int64_t row = first_row; row < last_row; row++)
    for (int64_t first = 0; first < num_blocks(m.columns); first += kSegmentBlocks)
      work(Rows(m, row, 1, first), row, first, min_of(num_blocks(m.columns) - first, kSegmentBlocks));
}

// Weights as docs/format.md says, times floats.
void exact_rows(const MatvecJob& job) {
  F sums[kMaxTokens];
  each_segment(*job.matrix, job.first, job.last, [&](const Rows& rows, int64_t row, int64_t first, int64_t blocks) {
    for (int t = 0; first == 0 && t < job.num_x; t++) sums[t] = all(0.0f);
    for (int64_t b = 0; b < blocks; b++) {
      alignas(64) float w[kBlock] = {};
      weights_of(*job.matrix, rows, row, first, b, w);
      for (int t = 0; t < job.num_x; t++)
        for (int j = 0; j < kBlock; j += kLanes)
          sums[t] = fma(load(w + j), load(job.x[t]->x + (first + b) * kBlock + j), sums[t]);
    }
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = sum_lanes(sums[t]);
  });
}

// Block b of a row in plain integers.
void plain_block(const MatvecJob& job, const Rows& rows, int r, int64_t row, int64_t first, int64_t b, float* sums) {
  const Matrix& m = *job.matrix;
  alignas(64) int8_t entry[kBlock];
  const int here = entries_of(m, rows, r, first, b, entry);
  const int64_t at = first + b;
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

// Scales of a segment of a row, times those of the activations.
template <int kParts, int kTokens>
struct Scales {
  alignas(64) float of[kTokens][kSegmentBlocks * kParts + 8];

  // For `whole` blocks from `first` on; adds what an entry of 1 everywhere gives to `ones`.
  static inline __attribute__((always_inline)) void fill(Scales& to, const MatvecJob& job, int64_t row, int64_t first, int64_t whole, __m256* ones) {
    constexpr int grain = kParts == 4 ? 2 : kParts == 2 ? 1 : 0;
    const Matrix& m = *job.matrix;
    const bool grouped = is_grouped(m.group_size);
    const int64_t groups = groups_of(m), runs = whole * kParts;
    const int64_t start = row * groups + (grouped ? first * kParts : 0), left = m.rows * groups - start;
    const __m256 all_groups = _mm256_set1_ps(half_to_float(m.scale[row * groups]));
    for (int64_t g = 0; g < runs; g += 8) {
      __m256 w = grouped ? eight_halves(m.scale + start + g, left - g) : all_groups;
      if (runs - g < 8) {
        const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        w = _mm256_and_ps(w, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)(runs - g)), lane)));
      }
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) {
        const Activations& x = *job.x[t];
        const __m256 factor = _mm256_mul_ps(w, _mm256_loadu_ps(x.scale[grain] + first * kParts + g));
        _mm256_storeu_ps(to.of[t] + g, factor);
        ones[t] = _mm256_fmadd_ps(factor, _mm256_loadu_ps(x.sum[grain] + first * kParts + g), ones[t]);
      }
    }
  }
};

// `kRows` rows from `row` on.
template <int kBits, int kParts, int kTokens, int kRows>
MOEQ_INLINE void some_rows(const MatvecJob& job, const Table<kBits>& table, int64_t row) {
  static_assert(kRows * kTokens <= 4, "that many sums are named");
  const Matrix& m = *job.matrix;
  Scales<kParts, kTokens> scales[kRows];
  // Named, not an array: compilers keep those in memory.
  __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
  __m256 ones[kRows * kTokens];
  for (__m256& each : ones) each = _mm256_setzero_ps();
  for (int64_t first = 0;; first += kSegmentBlocks) {
    const Rows rows(m, row, kRows, first);
    const int64_t blocks = min_of(num_blocks(m.columns) - first, kSegmentBlocks), whole = min_of(m.columns / kBlock - first, blocks);
    for (int r = 0; r < kRows; r++) Scales<kParts, kTokens>::fill(scales[r], job, row + r, first, whole, ones + r * kTokens);
    if (first == 0) fetch_scales(m, row + kRows, min_of(kRows, m.rows - row - kRows));
    const auto input = [&](int t) { return job.x[t < kTokens ? t : 0]->q + first * kBlock; };
    const int8_t *q0 = input(0), *q1 = input(1), *q2 = input(2), *q3 = input(3);
    for (int64_t at = 0; at < whole; at++) {
      Block<kBits> block;
      const Lines<kBits, kRows> lines(rows, at * kLowBytes<kBits>);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) {
        table.look_up(rows, lines, r, at, block);
        const auto more = [&](int t, const int8_t* q, __m256 sum) {
          return block.template add<kParts>(q + at * kBlock, scales[r].of[t % kTokens] + at * kParts, sum);
        };
        if (kTokens == 1) {
          __m256& sum = r == 0 ? a : r == 1 ? b : r == 2 ? c : d;
          sum = more(0, q0, sum);
        } else if (kTokens == 2) {
          __m256 &one = r ? c : a, &two = r ? d : b;
          one = more(0, q0, one);
          two = more(1, q1, two);
        } else {
          a = more(0, q0, a);
          b = more(1, q1, b);
          c = more(2, q2, c);
          d = more(3, q3, d);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) fetch_codes<kBits>(rows, r, at);
    }
    if (first + blocks < num_blocks(m.columns)) continue;
    const __m256 lanes[4] = {a, b, c, d};
    for (int r = 0; r < kRows; r++) {
      float sums[kMaxTokens] = {};
      for (int t = 0; t < kTokens; t++)
        sums[t] = sum_lanes(lanes[r * kTokens + t]) - (float)kOffset<kBits> * sum_lanes(ones[r * kTokens + t]);
      for (int64_t at = whole; at < blocks; at++) plain_block(job, rows, r, row + r, first, at, sums);
      for (int t = 0; t < job.num_x; t++) job.out[t][row + r] = sums[t];
    }
    return;
  }
}

template <int kBits, int kParts, int kTokens>
void all_rows(const MatvecJob& job) {
  const Table<kBits> table;
  constexpr int kRows = 4 / kTokens;
  fetch_start(*job.matrix, job.first, job.last - job.first, kRows);
  for (int64_t row = job.first; row < job.last;) {
    if (kRows > 1 && row + kRows <= job.last) {
      some_rows<kBits, kParts, kTokens, kRows>(job, table, row);
      row += kRows;
    } else {
      some_rows<kBits, kParts, kTokens, 1>(job, table, row++);
    }
  }
}

template <int kBits, int kTokens>
void by_group(const MatvecJob& job) {
  if (job.matrix->group_size == 32) return all_rows<kBits, 4, kTokens>(job);
  if (job.matrix->group_size == 64) return all_rows<kBits, 2, kTokens>(job);
  return all_rows<kBits, 1, kTokens>(job);
}

template <int kTokens>
void by_bits(const MatvecJob& job) {
  switch (job.matrix->bits) {
    case 1:
      return by_group<1, kTokens>(job);
    case 2:
      return by_group<2, kTokens>(job);
    case 3:
      return by_group<3, kTokens>(job);
    default:
      return by_group<4, kTokens>(job);
  }
}

// Entries of a segment of a row as bytes, block by block as `Block` holds them, for more vectors than are looked up at once.
template <int kBits, int kParts>
void many_rows(const ManyJob& job) {
  const Matrix& m = *job.matrix;
  const Table<kBits> table;
  alignas(64) Block<kBits> blocks[kSegmentBlocks];
  for (int64_t row = job.first; row < job.last; row++)
    for (int64_t first = 0; first < num_blocks(m.columns); first += kSegmentBlocks) {
      const Rows rows(m, row, 1, first);
      const int64_t here = min_of(num_blocks(m.columns) - first, kSegmentBlocks), whole = min_of(m.columns / kBlock - first, here);
      for (int64_t at = 0; at < whole; at++) table.look_up(rows, Lines<kBits, 1>(rows, at * kLowBytes<kBits>), 0, at, blocks[at]);
      for (int64_t start = 0; start < job.count; start += kMaxTokens) {
        const int tokens = (int)min_of(job.count - start, kMaxTokens);
        // What is missing of four vectors is the first of them again.
        const auto input = [&](int t) { return job.x[start + (t < tokens ? t : 0)]; };
        MatvecJob four{&m, row, row + 1, {input(0), input(1), input(2), input(3)}, tokens, {}, false};
        Scales<kParts, kMaxTokens> scales;
        __m256 ones[kMaxTokens];
        for (__m256& each : ones) each = _mm256_setzero_ps();
        Scales<kParts, kMaxTokens>::fill(scales, four, row, first, whole, ones);
        const auto q = [&](int t) { return four.x[t]->q + first * kBlock; };
        const int8_t *q0 = q(0), *q1 = q(1), *q2 = q(2), *q3 = q(3);
        __m256 a = _mm256_setzero_ps(), b = a, c = a, d = a;
        for (int64_t at = 0; at < whole; at++) {
          const Block<kBits>& block = blocks[at];
          a = block.template add<kParts>(q0 + at * kBlock, scales.of[0] + at * kParts, a);
          b = block.template add<kParts>(q1 + at * kBlock, scales.of[1] + at * kParts, b);
          c = block.template add<kParts>(q2 + at * kBlock, scales.of[2] + at * kParts, c);
          d = block.template add<kParts>(q3 + at * kBlock, scales.of[3] + at * kParts, d);
        }
        const __m256 lanes[kMaxTokens] = {a, b, c, d};
        float sums[kMaxTokens] = {};
        for (int t = 0; t < tokens; t++) sums[t] = sum_lanes(lanes[t]) - (float)kOffset<kBits> * sum_lanes(ones[t]);
        for (int64_t at = whole; at < here; at++) plain_block(four, rows, 0, row, first, at, sums);
        for (int t = 0; t < tokens; t++) {
          float& to = job.out[start + t][row];
          to = first ? to + sums[t] : sums[t];
        }
      }
    }
}

template <int kBits>
void many_by_group(const ManyJob& job) {
  if (job.matrix->group_size == 32) return many_rows<kBits, 4>(job);
  if (job.matrix->group_size == 64) return many_rows<kBits, 2>(job);
  return many_rows<kBits, 1>(job);
}

void many_integer_rows(const ManyJob& job) {
  switch (job.matrix->bits) {
    case 1:
      return many_by_group<1>(job);
    case 2:
      return many_by_group<2>(job);
    case 3:
      return many_by_group<3>(job);
    default:
      return many_by_group<4>(job);
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
  float sums[kMaxTokens];
  each_segment(*job.matrix, job.first, job.last, [&](const Rows& rows, int64_t row, int64_t first, int64_t blocks) {
    for (int t = 0; first == 0 && t < job.num_x; t++) sums[t] = 0.0f;
    for (int64_t b = 0; b < blocks; b++) plain_block(job, rows, 0, row, first, b, sums);
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = sums[t];
  });
}

void many_integer_rows(const ManyJob& job) {
  for (int64_t start = 0; start < job.count; start += kMaxTokens) {
    MatvecJob some{job.matrix, job.first, job.last, {}, (int)min_of(job.count - start, kMaxTokens), {}, false};
    for (int t = 0; t < some.num_x; t++) {
      some.x[t] = job.x[start + t];
      some.out[t] = job.out[start + t];
    }
    integer_rows(some);
  }
}

#endif

}  // namespace

void matvec_trellis(const MatvecJob& job) {
  if (job.exact)
    exact_rows(job);
  else
    integer_rows(job);
}

void many_trellis(const ManyJob& job) { many_integer_rows(job); }

void look_up_trellis(const LookUpJob& job) {
  const Matrix& m = *job.matrix;
  each_segment(m, job.first, job.last, [&](const Rows& rows, int64_t row, int64_t first, int64_t blocks) {
    for (int64_t b = 0; b < blocks; b++) {
      alignas(64) float w[kBlock];
      const int here = weights_of(m, rows, row, first, b, w);
      store_as(w, here, job.dtype, job.w, (row - job.first) * m.columns + (first + b) * kBlock);
    }
  });
}

}  // namespace moeq::MOEQ_ISA

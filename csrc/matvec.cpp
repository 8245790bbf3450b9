// See matvec.h. The integer kernels go along a row once: scales first, then the codes, whose products are added up in
// lanes of floats and summed at the end of the row.
#include "matvec.h"

#include "codebook.h"
#include "dots.h"
#include "fetch.h"
#include "lanes.h"
#include "planes.h"
#include "records.h"
#include "trellis.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr int64_t kTileRows = 16;  // rows that stay in the cache between two groups of vectors
// Places of a matrix that are read at once. 4 were slower, and 1 for all widths of one plane and for 6 bits.
constexpr int streams_of(int bits) { return bits == 3 ? 1 : 2; }

inline int grain_of(int64_t group_size) { return group_size == 32 ? 2 : group_size == 64 ? 1 : 0; }

// One block in plain integers: the end of a row, and every block where there are no kernels.
inline void plain_block(const Matrix& m, const Zeros& zeros, int64_t row, int64_t block, const MatvecJob& job,
                        float* sums) {
  alignas(64) uint8_t codes[kBlock] = {};
  const int here = unpack_row(m, row, block, codes);
  const bool whole = !is_grouped(m.group_size);
  const int size = whole ? kBlock : (int)m.group_size;
  const int grain = grain_of(m.group_size);
  const int64_t groups = whole ? 1 : (m.columns + size - 1) / size;
  for (int start = 0; start < here; start += size) {
    const int64_t part = (block * kBlock + start) / size;
    const int64_t at = row * groups + (whole ? 0 : part);
    const float scale = half_to_float(m.scale[at]), zero = zeros.at(m, at);
    for (int t = 0; t < job.num_x; t++) {
      const int8_t* q = job.x[t]->q + block * kBlock + start;
      int32_t dot = 0;
      for (int j = 0; j < size; j++) dot += (int32_t)codes[start + j] * q[j];
      sums[t] += scale * job.x[t]->scale[grain][part] * ((float)dot - zero * job.x[t]->sum[grain][part]);
    }
  }
}

#if MOEQ_DOTS

MOEQ_INLINE __m256 first_lanes(__m256 v, int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), lane)));
}

// For `num_rows` rows from `row` on: scales of `count` runs from `start` on, times those of the vectors, into scale[r];
// the part of the zeros is taken off the sums. kZeros says what zeros there are; everything that rows share is read
// once, as compilers cannot know that `scale` does not overlap it.
template <int kBits, int kParts, int kTokens, Levels kZeros>
void prepare(const Matrix& m, const Zeros& zeros, int64_t row, int64_t num_rows, int64_t start,
                         int64_t count, const MatvecJob& job, float* scale, int64_t scale_step, int64_t token_step,
                         __m256* sums, int64_t sums_step) {
  constexpr int grain = kParts == 4 ? 2 : kParts == 2 ? 1 : 0;
  const int64_t groups = (m.columns + m.group_size - 1) / m.group_size, all = groups * m.rows;
  const uint16_t* const w_scale = m.scale;
  const void* const w_zero = m.zero;
  const float *x_scale[kTokens], *x_sum[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++) {
    x_scale[t] = job.x[t]->scale[grain] + start;
    x_sum[t] = job.x[t]->sum[grain] + start;
  }
  const __m256 offset = _mm256_set1_ps(Dots<kBits>::kOffset), step = _mm256_set1_ps(zeros.step);
  const __m256 unit = _mm256_set1_ps(1 / Dots<kBits>::kUnit);
  const __m256 shared = _mm256_set1_ps(zeros.shared - Dots<kBits>::kOffset);
  for (int64_t r = 0; r < num_rows; r++) {
    const int64_t at = (row + r) * groups + start;
    for (int64_t g = 0; g < count; g += 8) {
      // At the end of a row the next one is read along; only at the end of the matrix there is none.
      const int64_t there = all - at - g;
      __m256 w = eight_halves(w_scale + at + g, there), z = shared;
      if (kZeros == Levels::asym)
        z = _mm256_fmsub_ps(eight_bytes((const uint8_t*)w_zero + at + g, there), step, offset);
      else if (kZeros == Levels::asym16)
        z = _mm256_sub_ps(eight_halves((const uint16_t*)w_zero + at + g, there), offset);
      if (count - g < 8) w = first_lanes(w, count - g);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; t++) {
        const __m256 both = _mm256_mul_ps(w, _mm256_loadu_ps(x_scale[t] + g));
        _mm256_store_ps(scale + r * scale_step + t * token_step + g, _mm256_mul_ps(both, unit));
        __m256* sum = sums + r * sums_step + t;
        *sum = _mm256_fnmadd_ps(_mm256_mul_ps(both, z), _mm256_loadu_ps(x_sum[t] + g), *sum);
      }
    }
  }
}

// The same for whole rows: one scale and zero for all runs.
template <int kBits, int kTokens>
void prepare_whole(const Matrix& m, const Zeros& zeros, int64_t row, int64_t num_rows, int64_t start, int64_t count,
                   const MatvecJob& job, float* scale, int64_t scale_step, int64_t token_step, __m256* sums,
                   int64_t sums_step) {
  for (int64_t r = 0; r < num_rows; r++) {
    const __m256 all = _mm256_set1_ps(half_to_float(m.scale[row + r]));
    const __m256 z = _mm256_set1_ps(zeros.at(m, row + r) - Dots<kBits>::kOffset);
    for (int64_t g = 0; g < count; g += 8) {
      const __m256 w = first_lanes(all, min_of(count - g, 8));
      for (int t = 0; t < kTokens; t++) {
        const __m256 both = _mm256_mul_ps(w, _mm256_loadu_ps(job.x[t]->scale[0] + start + g));
        _mm256_store_ps(scale + r * scale_step + t * token_step + g,
                        _mm256_mul_ps(both, _mm256_set1_ps(1 / Dots<kBits>::kUnit)));
        __m256* sum = sums + r * sums_step + t;
        *sum = _mm256_fnmadd_ps(_mm256_mul_ps(both, z), _mm256_loadu_ps(job.x[t]->sum[0] + start + g), *sum);
      }
    }
  }
}

// What the inner loop holds in registers: sums of one row times kTokens vectors, or of two rows times one. Named, not
// an array: compilers keep those in memory.
struct Sums {
  __m256 a, b, c, d;
};

// `num_rows` rows from starts[0] on, or as many from each of kPlaces starts: memory is read faster in several places at
// once. Scales and zeros of all rows come first: done row by row they would hold up the codes.
template <int kBits, int kParts, int kTokens, int kPlaces>
void rows(const MatvecJob& job, const int64_t* starts, int64_t num_rows) {
  static_assert(kTokens == 1 || kPlaces == 1, "one or the other");
  const Matrix& m = *job.matrix;
  const Zeros zeros(m);
  constexpr int kSlots = kTokens * kPlaces;
  constexpr int width1 = kBits == 3 ? 2 : kBits == 5 || kBits == 6 ? 4 : kBits, width2 = kBits - width1;
  constexpr int kRuns = 128 / kTokens;  // scales of a row that are made at a time
  constexpr int64_t kSegment = kRuns / kParts;
  const int64_t full = m.columns / kBlock;
  const int64_t bytes1 = row_bytes(m.columns, width1), bytes2 = width2 ? row_bytes(m.columns, width2) : 0;
  alignas(64) float scale[kTileRows / kPlaces][kSlots][kRuns];
  __m256 sums[kTileRows / kPlaces][kSlots];
  for (int64_t r = 0; r < num_rows; r++)
    for (int slot = 0; slot < kSlots; slot++) sums[r][slot] = _mm256_setzero_ps();
  for (int64_t segment = 0; segment < full; segment += kSegment) {
    const int64_t count = min_of(full - segment, kSegment);
    for (int place = 0; place < kPlaces; place++) {
      const auto call = [&](auto* make) {
        make(m, zeros, starts[place], num_rows, segment * kParts, count * kParts, job, scale[0][place], kSlots * kRuns,
             kRuns, &sums[0][place], kSlots);
      };
      if (!is_grouped(m.group_size))
        call(&prepare_whole<kBits, kTokens>);
      else if (m.levels == Levels::asym)
        call(&prepare<kBits, kParts, kTokens, Levels::asym>);
      else if (m.levels == Levels::asym16)
        call(&prepare<kBits, kParts, kTokens, Levels::asym16>);
      else
        call(&prepare<kBits, kParts, kTokens, Levels::half>);
    }
    // Only now, or they would hold up those that are needed first.
    if (segment == 0)
      for (int place = 0; place < kPlaces; place++) fetch_scales(m, starts[place] + num_rows, num_rows);
    const auto codes = [&](const uint8_t* plane, int64_t bytes, int width, int stream) {
      return plane + starts[stream < kPlaces ? stream : 0] * bytes + segment * (16 * width);
    };
    const auto activations = [&](int t) { return job.x[t < kTokens ? t : 0]->q + segment * kBlock; };
    const int8_t *q0 = activations(0), *q1 = activations(1), *q2 = activations(2), *q3 = activations(3);
    for (int64_t r = 0; r < num_rows; r++) {
      const uint8_t* plane2 = width2 ? m.planes[1] : m.planes[0];
      const uint8_t* first0 = codes(m.planes[0] + r * bytes1, bytes1, width1, 0);
      const uint8_t* first1 = codes(m.planes[0] + r * bytes1, bytes1, width1, 1);
      const uint8_t* second0 = codes(plane2 + r * bytes2, bytes2, width2, 0);
      const uint8_t* second1 = codes(plane2 + r * bytes2, bytes2, width2, 1);
      const float* scales = &scale[r][0][0];
      Sums sum{sums[r][0], sums[r][1 % kSlots], sums[r][2 % kSlots], sums[r][3 % kSlots]};
      for (int64_t block = 0; block < count; block++) {
        const int64_t at = block * kBlock, at1 = block * (16 * width1), at2 = block * (16 * width2);
        const float* here = scales + block * kParts;
        Dots<kBits> dots;
        dots.load(first0 + at1, second0 + at2);
        sum.a = dots.template add<kParts>(q0 + at, here, sum.a);
        if (kSlots > 1) {
          if (kPlaces > 1) dots.load(first1 + at1, second1 + at2);
          sum.b = dots.template add<kParts>(q1 + at, here + kRuns, sum.b);
        }
        if (kSlots > 2) {
          sum.c = dots.template add<kParts>(q2 + at, here + 2 * kRuns, sum.c);
          sum.d = dots.template add<kParts>(q3 + at, here + 3 * kRuns, sum.d);
        }
        fetch<width1>(first0 + at1, block);
        fetch<width2>(second0 + at2, block);
        if (kPlaces > 1) {
          fetch<width1>(first1 + at1, block);
          fetch<width2>(second1 + at2, block);
        }
      }
      sums[r][0] = sum.a;
      if (kSlots > 1) sums[r][1 % kSlots] = sum.b;
      if (kSlots > 2) {
        sums[r][2 % kSlots] = sum.c;
        sums[r][3 % kSlots] = sum.d;
      }
    }
  }
  const bool has_tail = full * kBlock != m.columns;
  for (int place = 0; place < kPlaces; place++)
    for (int64_t r = 0; r < num_rows; r++) {
      const int64_t row = starts[place] + r;
      for (int t = 0; t < kTokens; t++) job.out[t][row] = sum_lanes(sums[r][place + t]);
      if (!has_tail) continue;
      float tails[kMaxTokens] = {};
      plain_block(m, zeros, row, full, job, tails);
      for (int t = 0; t < kTokens; t++) job.out[t][row] += tails[t];
    }
}

template <int kBits, int kParts, int kTokens>
void rows_in_streams(const MatvecJob& job) {
  int64_t row = job.first;
  if (kTokens == 1) {
    constexpr int kStreams = streams_of(kBits);
    constexpr int64_t each = kTileRows / kStreams;
    const int64_t part = (job.last - row) / kStreams;
    for (int stream = 0; stream < kStreams; stream++) fetch_start(*job.matrix, row + stream * part, part, kTileRows);
    for (int64_t r = 0; r < part; r += each) {
      int64_t starts[kStreams];
      for (int stream = 0; stream < kStreams; stream++) starts[stream] = row + stream * part + r;
      rows<kBits, kParts, 1, kStreams>(job, starts, min_of(each, part - r));
    }
    row += part * kStreams;
  }
  for (; row < job.last; row += kTileRows)
    rows<kBits, kParts, kTokens, 1>(job, &row, min_of(kTileRows, job.last - row));
}

template <int kBits, int kTokens>
void rows_by_group(const MatvecJob& job) {
  const int grain = grain_of(job.matrix->group_size);
  if (grain == 2) return rows_in_streams<kBits, 4, kTokens>(job);
  if (grain == 1) return rows_in_streams<kBits, 2, kTokens>(job);
  return rows_in_streams<kBits, 1, kTokens>(job);
}

template <int kTokens>
void rows_by_bits(const MatvecJob& job) {
  switch (job.matrix->bits) {
    case 1:
      return rows_by_group<1, kTokens>(job);
    case 2:
      return rows_by_group<2, kTokens>(job);
    case 3:
      return rows_by_group<3, kTokens>(job);
    case 4:
      return rows_by_group<4, kTokens>(job);
    case 5:
      return rows_by_group<5, kTokens>(job);
    case 6:
      return rows_by_group<6, kTokens>(job);
    default:
      return rows_by_group<8, kTokens>(job);
  }
}

void integer_rows(const MatvecJob& all) {
  if (all.num_x == 1) return rows_by_bits<1>(all);
  for (int64_t tile = all.first; tile < all.last; tile += kTileRows) {
    for (int t = 0; t < all.num_x;) {
      const int here = all.num_x - t >= 4 ? 4 : all.num_x - t >= 2 ? 2 : 1;
      MatvecJob job{all.matrix, tile, min_of(tile + kTileRows, all.last), {}, here, {}, false};
      for (int i = 0; i < here; i++) {
        job.x[i] = all.x[t + i];
        job.out[i] = all.out[t + i];
      }
      if (here == 4)
        rows_by_bits<4>(job);
      else if (here == 2)
        rows_by_bits<2>(job);
      else
        rows_by_bits<1>(job);
      t += here;
    }
  }
}

#else

void integer_rows(const MatvecJob& job) {
  const Matrix& m = *job.matrix;
  const Zeros zeros(m);
  for (int64_t row = job.first; row < job.last; row++) {
    float sums[kMaxTokens] = {};
    for (int64_t block = 0; block < num_blocks(m.columns); block++) plain_block(m, zeros, row, block, job, sums);
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = sums[t];
  }
}

#endif

// Weights as docs/format.md says, times floats.
void exact_rows(const MatvecJob& job) {
  const Matrix& m = *job.matrix;
  const Zeros zeros(m);
  const int64_t groups = (m.columns + m.group_size - 1) / m.group_size;
  for (int64_t row = job.first; row < job.last; row++) {
    F sums[kMaxTokens];
    for (int t = 0; t < job.num_x; t++) sums[t] = all(0.0f);
    for (int64_t block = 0; block < num_blocks(m.columns); block++) {
      alignas(64) uint8_t codes[kBlock] = {};
      alignas(64) float w[kBlock] = {};
      const int64_t column = block * kBlock;
      const int here = unpack_row(m, row, block, codes);
      for (int start = 0; start < here;) {
        const int64_t group = (column + start) / m.group_size;
        const int stop = (int)min_of(here, (group + 1) * m.group_size - column);
        const int64_t at = row * groups + group;
        const float scale = half_to_float(m.scale[at]), zero = zeros.at(m, at);
        for (int j = start; j < stop; j++) w[j] = ((float)codes[j] - zero) * scale;
        start = stop;
      }
      for (int t = 0; t < job.num_x; t++)
        for (int j = 0; j < kBlock; j += kLanes)
          sums[t] = fma(load(w + j), load(job.x[t]->x + column + j), sums[t]);
    }
    for (int t = 0; t < job.num_x; t++) job.out[t][row] = sum_lanes(sums[t]);
  }
}

}  // namespace

void matvec(const MatvecJob& job) {
  if (job.matrix->books)
    matvec_codebooks(job);
  else if (job.matrix->levels == Levels::trellis)
    matvec_trellis(job);
  else if (job.exact)
    exact_rows(job);
  else
    integer_rows(job);
}

}  // namespace moeq::MOEQ_ISA

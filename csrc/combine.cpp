// See combine.h. The integer kernel takes a run of rows at a time: their coefficients times scales become integers that
// share a float for each group of columns; codes of two rows are interleaved byte by byte, multiplied with the pair of
// their coefficients and added up in integers, which are added to floats at the end of the run.
#include "combine.h"

#include "dots.h"
#include "lanes.h"
#include "planes.h"
#include "records.h"

namespace moeq::MOEQ_ISA {
namespace {

// Column block `block` of all rows, times floats.
void exact_block(const CombineJob& job, const Zeros& zeros, int64_t block) {
  const Matrix& m = *job.matrix;
  const int64_t groups = (m.columns + m.group_size - 1) / m.group_size, column = block * kBlock;
  const int count = (int)min_of(m.columns - column, kBlock);
  alignas(64) float sums[kMaxTokens][kBlock] = {};
  for (int64_t row = 0; row < m.rows; row++) {
    alignas(64) uint8_t codes[kBlock] = {};
    alignas(64) float w[kBlock] = {};
    unpack_row(m, row, block, codes);
    for (int start = 0; start < count;) {
      const int64_t group = (column + start) / m.group_size, at = row * groups + group;
      const int stop = (int)min_of(count, (group + 1) * m.group_size - column);
      const float scale = half_to_float(m.scale[at]), zero = zeros.at(m, at);
      for (int j = start; j < stop; j++) w[j] = ((float)codes[j] - zero) * scale;
      start = stop;
    }
    for (int t = 0; t < job.num_a; t++) {
      const F a = all(job.a[t][row]);
      for (int j = 0; j < kBlock; j += kLanes) store(sums[t] + j, fma(load(w + j), a, load(sums[t] + j)));
    }
  }
  for (int t = 0; t < job.num_a; t++)
    for (int j = 0; j < count; j++) job.y[t][column + j] += sums[t][j];
}

#if MOEQ_DOTS

constexpr int kStrip = 8;               // blocks of columns whose sums stay in the cache
constexpr int kMaxGroups = kStrip * 4;  // of a strip
constexpr int kMaxRun = 32;             // rows

// Wide codes are multiplied with coefficients of 16 bits: sums of two products of 8 bits would not fit.
template <int kBits>
constexpr bool is_wide() {
  return kBits > 4;
}
// Rows of a run: their sums fit 16 bits (32 if wide).
template <int kBits>
constexpr int run_rows() {
  return kBits < 4 ? 32 : 16;
}

// The coefficients of a run.
struct Coefficients {
  alignas(32) float product[kMaxRun][kMaxGroups];
  alignas(32) int32_t pair[kMaxRun / 2][kMaxGroups];  // of two rows, as the multiplication wants them
  alignas(32) float step[kMaxGroups];
};

// Makes them from a[0] .. a[rows - 1] for the groups of a strip; the part of the zeros is taken off `offset`.
template <bool kWide, Levels kZeros>
void prepare(const Matrix& m, const Zeros& zeros, int64_t row, int rows, int64_t group, int64_t count, const float* a,
             Coefficients& out, float* offset) {
  const int64_t groups = (m.columns + m.group_size - 1) / m.group_size, total = groups * m.rows;
  const __m256 top = _mm256_set1_ps(kWide ? 32767.0f : 127.0f), none = _mm256_setzero_ps();
  const __m256 sign = _mm256_set1_ps(-0.0f), step_of_zeros = _mm256_set1_ps(zeros.step);
  const int even = (rows + 1) / 2 * 2;
  for (int64_t g = 0; g < count; g += 8) {
    const int64_t start = row * groups + group + g;
    __m256 most = none, bad = none;
    for (int n = 0; n < rows; n++) {
      const int64_t at = start + n * groups;
      const __m256 v = _mm256_mul_ps(eight_halves(m.scale + at, total - at), _mm256_broadcast_ss(a + n));
      _mm256_store_ps(out.product[n] + g, v);
      most = _mm256_max_ps(most, _mm256_andnot_ps(sign, v));
      bad = _mm256_fmadd_ps(v, none, bad);  // not a number as soon as one is none
    }
    if (even > rows) _mm256_store_ps(out.product[rows] + g, none);
    const __m256 some = _mm256_cmp_ps(most, _mm256_set1_ps(1e-30f), _CMP_GT_OQ);
    const __m256 inverse = _mm256_and_ps(_mm256_div_ps(top, most), some);
    const __m256 step = _mm256_add_ps(_mm256_and_ps(_mm256_div_ps(most, top), some), bad);
    __m256 sum = none;
    for (int n = 0; n < even; n += 2) {
      const V low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(out.product[n] + g), inverse));
      const V high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(out.product[n + 1] + g), inverse));
      V pair;
      if (kWide) {
        pair = _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa);
      } else {
        const V byte = _mm256_set1_epi32(255);
        pair = _mm256_or_si256(_mm256_and_si256(low, byte), _mm256_slli_epi32(_mm256_and_si256(high, byte), 8));
        pair = _mm256_or_si256(pair, _mm256_slli_epi32(pair, 16));
      }
      _mm256_store_si256((V*)(out.pair[n / 2] + g), pair);
      if (kZeros == Levels::half) {
        sum = _mm256_add_ps(sum, _mm256_cvtepi32_ps(_mm256_add_epi32(low, high)));
        continue;
      }
      for (int i = 0; i < 2 && n + i < rows; i++) {
        const int64_t at = start + (n + i) * groups;
        const __m256 zero = kZeros == Levels::asym
                                ? _mm256_mul_ps(eight_bytes((const uint8_t*)m.zero + at, total - at), step_of_zeros)
                                : eight_halves((const uint16_t*)m.zero + at, total - at);
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(i ? high : low), zero, sum);
      }
    }
    if (kZeros == Levels::half) sum = _mm256_mul_ps(sum, _mm256_set1_ps(zeros.shared));
    _mm256_store_ps(out.step + g, step);
    _mm256_store_ps(offset + g, _mm256_fnmadd_ps(step, sum, _mm256_load_ps(offset + g)));
  }
}

// The codes of two rows, interleaved: eight registers of 16 pairs each. Register 2 s + h has columns 32 s + 8 h + 0 .. 7
// of the block and those 16 further; for 1 bit register i has columns 16 i + 0 .. 15.
template <int kBits>
MOEQ_INLINE void interleave(const uint8_t* a1, const uint8_t* b1, const uint8_t* a2, const uint8_t* b2, V* c) {
  if (kBits == 1) {
    const __m128i a = _mm_loadu_si128((const __m128i*)a1), b = _mm_loadu_si128((const __m128i*)b1);
    const V both = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
    c[0] = field<0>(both, 1);
    c[1] = field<1>(both, 1);
    c[2] = field<2>(both, 1);
    c[3] = field<3>(both, 1);
    c[4] = field<4>(both, 1);
    c[5] = field<5>(both, 1);
    c[6] = field<6>(both, 1);
    c[7] = field<7>(both, 1);
  } else if (kBits == 2 || kBits == 3) {
    const V a = load_codes(a1), b = load_codes(b1);
    V one[2], two[2] = {_mm256_unpacklo_epi8(a, b), _mm256_unpackhi_epi8(a, b)};
    if (kBits == 3) {
      const V a_one = load_twice(a2), b_one = load_twice(b2), shift = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
      one[0] = _mm256_srlv_epi32(_mm256_unpacklo_epi8(a_one, b_one), shift);
      one[1] = _mm256_srlv_epi32(_mm256_unpackhi_epi8(a_one, b_one), shift);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      if (kBits == 2) {
        c[h] = field<0>(two[h], 3);
        c[2 + h] = field<2>(two[h], 3);
        c[4 + h] = field<4>(two[h], 3);
        c[6 + h] = field<6>(two[h], 3);
      } else {
        const V even2 = field<0>(two[h], 0x33), odd2 = field<2>(two[h], 0x33);
        const V even = _mm256_add_epi8(_mm256_add_epi8(even2, even2), field<0>(one[h], 0x11));
        const V odd = _mm256_add_epi8(_mm256_add_epi8(odd2, odd2), field<2>(one[h], 0x11));
        c[h] = field<0>(even, 15);
        c[2 + h] = field<0>(odd, 15);
        c[4 + h] = field<4>(even, 15);
        c[6 + h] = field<4>(odd, 15);
      }
    }
  } else {
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
      const V a = load_codes(a1 + 32 * half), b = load_codes(b1 + 32 * half);
      const V low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      c[2 * half] = field<0>(low, 15);
      c[2 * half + 1] = field<0>(high, 15);
      c[2 * half + 4] = field<4>(low, 15);
      c[2 * half + 5] = field<4>(high, 15);
    }
  }
}

// Where the rows of a run lie, and what to add to get to the next row.
struct Rows {
  const uint8_t *first, *second;
  int64_t step1, step2;
  int count;
};

template <int kBits>
constexpr int first_width() {
  return kBits == 3 ? 2 : kBits == 5 || kBits == 6 ? 4 : kBits;
}

// sums[0 .. 127] += the run's rows in a block; of every register the sums of even pairs come first.
template <int kBits, int kParts>
void add_narrow(const Rows& rows, const Coefficients& with, int64_t group, float* sums) {
  V s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  const uint8_t *a1 = rows.first, *a2 = rows.second;
  for (int n = 0; n < rows.count; n += 2) {
    const bool last = n + 1 == rows.count;  // its partner's coefficient is 0
    const uint8_t *b1 = a1 + (last ? 0 : rows.step1), *b2 = a2 + (last ? 0 : rows.step2);
    V c[8];
    interleave<kBits>(a1, b1, a2, b2, c);
    const int32_t* pair = with.pair[n / 2] + group;
    const V p0 = _mm256_set1_epi32(pair[0]), p1 = kParts > 3 ? _mm256_set1_epi32(pair[1]) : p0;
    const V p2 = kParts > 1 ? _mm256_set1_epi32(pair[kParts / 2]) : p0;
    const V p3 = kParts > 3 ? _mm256_set1_epi32(pair[3]) : p2;
    s0 = _mm256_add_epi16(s0, _mm256_maddubs_epi16(c[0], p0));
    s1 = _mm256_add_epi16(s1, _mm256_maddubs_epi16(c[1], p0));
    s2 = _mm256_add_epi16(s2, _mm256_maddubs_epi16(c[2], p1));
    s3 = _mm256_add_epi16(s3, _mm256_maddubs_epi16(c[3], p1));
    s4 = _mm256_add_epi16(s4, _mm256_maddubs_epi16(c[4], p2));
    s5 = _mm256_add_epi16(s5, _mm256_maddubs_epi16(c[5], p2));
    s6 = _mm256_add_epi16(s6, _mm256_maddubs_epi16(c[6], p3));
    s7 = _mm256_add_epi16(s7, _mm256_maddubs_epi16(c[7], p3));
    __builtin_prefetch(a1 + run_rows<kBits>() * rows.step1);
    __builtin_prefetch(b1 + run_rows<kBits>() * rows.step1);
    a1 += 2 * rows.step1;
    a2 += 2 * rows.step2;
  }
  const V registers[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m256 step = _mm256_broadcast_ss(with.step + group + i * kParts / 8);
    const V even = _mm256_srai_epi32(_mm256_slli_epi32(registers[i], 16), 16), odd = _mm256_srai_epi32(registers[i], 16);
    float* to = sums + 16 * i;
    _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(even), step, _mm256_load_ps(to)));
    _mm256_store_ps(to + 8, _mm256_fmadd_ps(_mm256_cvtepi32_ps(odd), step, _mm256_load_ps(to + 8)));
  }
}

// The same for codes of more than 4 bits. Register 4 s + q has columns 32 s + 4 q + 0 .. 3 and those 16 further.
template <int kBits, int kParts, int kHalf>
void add_half(const Rows& rows, const Coefficients& with, int64_t group, float* sums) {
  constexpr int part0 = 2 * kHalf * kParts / 4, part1 = (2 * kHalf + 1) * kParts / 4;
  V s0 = _mm256_setzero_si256(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0;
  const V none = _mm256_setzero_si256();
  const uint8_t *a1 = rows.first, *a2 = rows.second;
  for (int n = 0; n < rows.count; n += 2) {
    const bool last = n + 1 == rows.count;
    const uint8_t *b1 = a1 + (last ? 0 : rows.step1), *b2 = a2 + (last ? 0 : rows.step2);
    V a[4], b[4];
    unpack_codes<kBits>(a1, a2, a);
    unpack_codes<kBits>(b1, b2, b);
    const int32_t* pair = with.pair[n / 2] + group;
    const V p0 = _mm256_set1_epi32(pair[part0]), p1 = _mm256_set1_epi32(pair[part1]);
    const V low0 = _mm256_unpacklo_epi8(a[2 * kHalf], b[2 * kHalf]);
    const V high0 = _mm256_unpackhi_epi8(a[2 * kHalf], b[2 * kHalf]);
    const V low1 = _mm256_unpacklo_epi8(a[2 * kHalf + 1], b[2 * kHalf + 1]);
    const V high1 = _mm256_unpackhi_epi8(a[2 * kHalf + 1], b[2 * kHalf + 1]);
    s0 = _mm256_add_epi32(s0, _mm256_madd_epi16(_mm256_unpacklo_epi8(low0, none), p0));
    s1 = _mm256_add_epi32(s1, _mm256_madd_epi16(_mm256_unpackhi_epi8(low0, none), p0));
    s2 = _mm256_add_epi32(s2, _mm256_madd_epi16(_mm256_unpacklo_epi8(high0, none), p0));
    s3 = _mm256_add_epi32(s3, _mm256_madd_epi16(_mm256_unpackhi_epi8(high0, none), p0));
    s4 = _mm256_add_epi32(s4, _mm256_madd_epi16(_mm256_unpacklo_epi8(low1, none), p1));
    s5 = _mm256_add_epi32(s5, _mm256_madd_epi16(_mm256_unpackhi_epi8(low1, none), p1));
    s6 = _mm256_add_epi32(s6, _mm256_madd_epi16(_mm256_unpacklo_epi8(high1, none), p1));
    s7 = _mm256_add_epi32(s7, _mm256_madd_epi16(_mm256_unpackhi_epi8(high1, none), p1));
    const int64_t ahead = run_rows<kBits>() * rows.step1 + (kBits == 8 ? 64 * kHalf : 0);
    if (kBits == 8 || kHalf == 0) {
      __builtin_prefetch(a1 + ahead);
      __builtin_prefetch(b1 + ahead);
    }
    a1 += 2 * rows.step1;
    a2 += 2 * rows.step2;
  }
  const V registers[8] = {s0, s1, s2, s3, s4, s5, s6, s7};
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const __m256 step = _mm256_broadcast_ss(with.step + group + (i < 4 ? part0 : part1));
    float* to = sums + 64 * kHalf + 8 * i;
    _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(registers[i]), step, _mm256_load_ps(to)));
  }
}

// y[0 .. 127] += sums, whose columns are put in order, + the offset of their group.
template <int kBits, int kParts>
void finish(const float* sums, const float* offset, float* y) {
  for (int i = 0; i < 8; i++) {
    // Either sums of even and odd columns, or columns 0 .. 3 and 4 .. 7 of both lanes.
    __m256 a = _mm256_load_ps(sums + 16 * i), b = _mm256_load_ps(sums + 16 * i + 8);
    if (!is_wide<kBits>()) {
      const __m256 low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
      a = low;
      b = high;
    }
    const __m256 all = _mm256_broadcast_ss(offset + i * kParts / 8);
    const __m256 first = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), all);
    const __m256 second = _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x31), all);
    float* to = kBits == 1 ? y + 16 * i : y + 32 * (i / 2) + 8 * (i % 2);
    float* further = to + (kBits == 1 ? 8 : 16);
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_loadu_ps(to), first));
    _mm256_storeu_ps(further, _mm256_add_ps(_mm256_loadu_ps(further), second));
  }
}

template <int kBits, int kParts>
void strip(const CombineJob& job, const Zeros& zeros, int64_t block, int64_t blocks) {
  const Matrix& m = *job.matrix;
  constexpr int width1 = first_width<kBits>(), width2 = kBits - width1;
  const int64_t bytes1 = row_bytes(m.columns, width1), bytes2 = width2 ? row_bytes(m.columns, width2) : 0;
  const bool whole = !is_grouped(m.group_size);
  const int64_t group = whole ? 0 : block * kParts, groups = whole ? 1 : blocks * kParts;
  alignas(64) float sums[kMaxTokens][kStrip * kBlock];
  alignas(32) float offset[kMaxTokens][kMaxGroups] = {};
  std::memset(sums, 0, (size_t)job.num_a * sizeof sums[0]);
  Coefficients coefficients;
  constexpr bool wide = is_wide<kBits>();
  const auto make = m.levels == Levels::asym     ? &prepare<wide, Levels::asym>
                    : m.levels == Levels::asym16 ? &prepare<wide, Levels::asym16>
                                                 : &prepare<wide, Levels::half>;
  for (int64_t row = 0; row < m.rows; row += run_rows<kBits>()) {
    const int count = (int)min_of(m.rows - row, run_rows<kBits>());
    for (int t = 0; t < job.num_a; t++) {
      make(m, zeros, row, count, group, groups, job.a[t] + row, coefficients, offset[t]);
      for (int64_t j = 0; j < blocks; j++) {
        const int64_t at = block + j, here = whole ? 0 : j * kParts;
        const Rows rows{m.planes[0] + row * bytes1 + at * (16 * width1), m.planes[1] + row * bytes2 + at * (16 * width2),
                        bytes1, bytes2, count};
        float* to = sums[t] + j * kBlock;
        if constexpr (wide) {
          add_half<kBits, kParts, 0>(rows, coefficients, here, to);
          add_half<kBits, kParts, 1>(rows, coefficients, here, to);
        } else {
          add_narrow<kBits, kParts>(rows, coefficients, here, to);
        }
      }
    }
  }
  for (int t = 0; t < job.num_a; t++)
    for (int64_t j = 0; j < blocks; j++)
      finish<kBits, kParts>(sums[t] + j * kBlock, offset[t] + (whole ? 0 : j * kParts), job.y[t] + (block + j) * kBlock);
}

template <int kBits>
void strips(const CombineJob& job, const Zeros& zeros, int64_t from, int64_t to) {
  const int64_t size = job.matrix->group_size;
  for (int64_t block = from; block < to; block += kStrip) {
    const int64_t blocks = min_of(to - block, kStrip);
    if (size == 32)
      strip<kBits, 4>(job, zeros, block, blocks);
    else if (size == 64)
      strip<kBits, 2>(job, zeros, block, blocks);
    else
      strip<kBits, 1>(job, zeros, block, blocks);
  }
}

// Whole blocks.
void integer_blocks(const CombineJob& job, const Zeros& zeros, int64_t from, int64_t to) {
  switch (job.matrix->bits) {
    case 1:
      return strips<1>(job, zeros, from, to);
    case 2:
      return strips<2>(job, zeros, from, to);
    case 3:
      return strips<3>(job, zeros, from, to);
    case 4:
      return strips<4>(job, zeros, from, to);
    case 5:
      return strips<5>(job, zeros, from, to);
    case 6:
      return strips<6>(job, zeros, from, to);
    default:
      return strips<8>(job, zeros, from, to);
  }
}

#endif

}  // namespace

void combine(const CombineJob& job) {
  const Matrix& m = *job.matrix;
  const Zeros zeros(m);
  int64_t block = job.first / kBlock;
#if MOEQ_DOTS
  if (!job.exact && m.rows > 0) {
    const int64_t whole = job.last / kBlock;
    if (block < whole) integer_blocks(job, zeros, block, whole);
    block = block < whole ? whole : block;
  }
#endif
  for (; block * kBlock < job.last; block++) exact_block(job, zeros, block);
}

}  // namespace moeq::MOEQ_ISA

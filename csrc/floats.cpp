// See combine.h: products with float16 matrices, and rotations.
#include "combine.h"
#include "lanes.h"
#include "planes.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr int64_t kWide = 64;  // columns whose sums stay in registers

// Sixteen numbers as floats.
MOEQ_INLINE F load_halves(const uint16_t* from) {
  F out;
#if defined(__F16C__)
  const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + 8)));
  std::memcpy(&out, &low, sizeof low);
  std::memcpy((char*)&out + sizeof low, &high, sizeof high);
#else
  alignas(64) float some[kLanes];
  for (int j = 0; j < kLanes; j++) some[j] = half_to_float(from[j]);
  std::memcpy(&out, some, sizeof out);
#endif
  return out;
}

MOEQ_INLINE F load_floats(const float* from) {
  F out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

}  // namespace

void half_dots(const HalfMatrix& matrix, int64_t first, int64_t last, const float* x, float* out) {
  for (int64_t row = first; row < last; row++) {
    const uint16_t* w = matrix.w + row * matrix.columns;
    F sum = all(0.0f), more = sum;
    int64_t j = 0;
    for (; j + 2 * kLanes <= matrix.columns; j += 2 * kLanes) {
      sum = fma(load_halves(w + j), load_floats(x + j), sum);
      more = fma(load_halves(w + j + kLanes), load_floats(x + j + kLanes), more);
    }
    alignas(64) float lanes[kLanes];
    store(lanes, sum + more);
    for (int half = kLanes / 2; half; half /= 2)
      for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    for (; j < matrix.columns; j++) lanes[0] += half_to_float(w[j]) * x[j];
    out[row] = lanes[0];
  }
}

void half_combine(const HalfMatrix& matrix, int64_t first, int64_t last, const float* a, float* y) {
  int64_t j = first;
  for (; j + kWide <= last; j += kWide) {
    F s0 = all(0.0f), s1 = s0, s2 = s0, s3 = s0;
    const uint16_t* w = matrix.w + j;
    for (int64_t row = 0; row < matrix.rows; row++, w += matrix.columns) {
      const F here = all(a[row]);
      s0 = fma(load_halves(w), here, s0);
      s1 = fma(load_halves(w + kLanes), here, s1);
      s2 = fma(load_halves(w + 2 * kLanes), here, s2);
      s3 = fma(load_halves(w + 3 * kLanes), here, s3);
    }
    store(y + j, load_floats(y + j) + s0);
    store(y + j + kLanes, load_floats(y + j + kLanes) + s1);
    store(y + j + 2 * kLanes, load_floats(y + j + 2 * kLanes) + s2);
    store(y + j + 3 * kLanes, load_floats(y + j + 3 * kLanes) + s3);
  }
  for (; j < last; j++) {
    float sum = 0.0f;
    for (int64_t row = 0; row < matrix.rows; row++) sum += a[row] * half_to_float(matrix.w[row * matrix.columns + j]);
    y[j] += sum;
  }
}

void rotate(const float* x, const uint16_t* order, int64_t columns, int64_t block, int64_t plain, float* out) {
  for (int64_t j = 0; j < columns; j++) out[j] = x[order[j]];
  const float shrink = 1.0f / __builtin_sqrtf((float)block);
  for (float* at = out + plain; at < out + columns; at += block) {
    for (int64_t half = 1; half < block; half *= 2)
      for (int64_t start = 0; start < block; start += 2 * half) {
        float *low = at + start, *high = low + half;
        for (int64_t j = 0; j < half; j++) {
          const float a = low[j], b = high[j];
          low[j] = a + b;
          high[j] = a - b;
        }
      }
    for (int64_t j = 0; j < block; j++) at[j] *= shrink;
  }
}

}  // namespace moeq::MOEQ_ISA

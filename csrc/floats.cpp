// See combine.h: combinations of the rows of float16 matrices, and rotations.
#include "combine.h"
#include "halves.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr int64_t kWide = 64;  // columns whose sums stay in registers

}  // namespace

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
    store(y + j, load(y + j) + s0);
    store(y + j + kLanes, load(y + j + kLanes) + s1);
    store(y + j + 2 * kLanes, load(y + j + 2 * kLanes) + s2);
    store(y + j + 3 * kLanes, load(y + j + 3 * kLanes) + s3);
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

// Combinations of the rows of a matrix record, straight from the packed bytes: y += sum over rows of a[row] * row.
// The truth is torch: a @ W, within the error of coefficients of 8 bits, or exact to float32 rounding.
#pragma once

#include <cstdint>

#include "matvec.h"

namespace moeq {

// Columns `first` .. `last` - 1 (`first` a multiple of 128) of the combination of all rows, for each vector.
struct CombineJob {
  const Matrix* matrix;
  int64_t first, last;
  const float* a[kMaxTokens];  // a coefficient for each row
  int num_a;
  float* y[kMaxTokens];  // of all columns; added to
  bool exact;            // floats times floats
};

// The same numbers without codes: float16, rows x columns.
struct HalfMatrix {
  const uint16_t* w;
  int64_t rows, columns;
};

using Combine = void(const CombineJob&);
// y[column] += sum over rows of a[row] * w, for columns first .. last - 1
using HalfCombine = void(const HalfMatrix& matrix, int64_t first, int64_t last, const float* a, float* y);
// out = x with its numbers in another order, of which those from `plain` on are mixed in blocks by a normalized
// Walsh-Hadamard matrix (docs/format.md, "Tiled layers").
using Rotate = void(const float* x, const uint16_t* order, int64_t columns, int64_t block, int64_t plain, float* out);

#define MOEQ_DECLARE(isa)   \
  namespace isa {           \
  Combine combine;          \
  HalfCombine half_combine; \
  Rotate rotate;            \
  }
MOEQ_DECLARE(base)
MOEQ_DECLARE(avx2)
MOEQ_DECLARE(avx512)
#undef MOEQ_DECLARE

}  // namespace moeq

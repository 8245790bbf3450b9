// Matrix records in codebooks (docs/format.md, "Codebooks"): products with few vectors, and rows as weights. The truth is
// src/moeq/format/packing.py.
#pragma once

#include <cstdint>

#include "matvec.h"

namespace moeq {

constexpr int64_t kBookRows = 256;  // of a block that has a codebook of its own

inline int64_t book_columns(const Matrix& m) { return m.dim == 4 ? 256 : 128; }
inline int64_t book_bytes(const Matrix& m) { return m.dim == 4 ? 1024 : 128; }

// Rows `first` .. `last` - 1 as weights: w[0] is the start of row `first`.
struct LookUpJob {
  const Matrix* matrix;
  int64_t first, last;
  void* w;
  Dtype dtype;
};

using LookUp = void(const LookUpJob&);

#define MOEQ_DECLARE(isa)  \
  namespace isa {          \
  Matvec matvec_codebooks; \
  LookUp look_up;          \
  }
MOEQ_DECLARE(base)
MOEQ_DECLARE(avx2)
MOEQ_DECLARE(avx512)
#undef MOEQ_DECLARE

}  // namespace moeq

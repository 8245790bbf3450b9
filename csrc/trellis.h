// Matrix records of the level set "trellis" (docs/format.md, "Trellis"): products with few vectors, rows as weights, and
// the search for codes. The truth is src/moeq/trellis/codes.py.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "matvec.h"

namespace moeq {

// Columns of a matrix that are rounded one after the other; `count` x `rows` numbers wherever there is a pointer.
struct TrellisJob {
  int bits;
  int64_t count, rows;
  float* w;             // in: weights; out: what was to be rounded once earlier columns' errors were made up for
  const float* scale;   // of every weight
  const float* upper;   // count x count; errors e of column j take e / upper[j][j] * upper[j][k] off column k
  uint8_t* codes;       // out
  float* error;         // out: errors / upper[j][j]
};

using TrellisColumns = void(const TrellisJob&);

#define MOEQ_DECLARE(isa)          \
  namespace isa {                  \
  Matvec matvec_trellis;           \
  MatvecMany many_trellis;         \
  LookUp look_up_trellis;          \
  TrellisColumns trellis_columns;  \
  }
MOEQ_DECLARE(base)
MOEQ_DECLARE(avx2)
MOEQ_DECLARE(avx512)
#undef MOEQ_DECLARE

}  // namespace moeq

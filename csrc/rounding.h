// Rounding without data: chooses scale, zero and codes of every group. The truth is the torch reference in
// src/moeq/quantizers (levels.py, rtn.py, hqq.py); formulas are explained there.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace moeq {

enum class Fit { minmax, search, half_quadratic };

// What to do with the weights; see moeq.native.Rounding.
struct RoundingSettings {
  Fit fit;
  int bits;
  Levels levels;
  const double* ratios;  // candidates of a search; negative ones turn a signed scale round
  int num_ratios;
  int refits;
  int iterations;
  double p;
  double beta;
  double growth;
  float settled;
  bool gain;
};

struct RoundingJob {
  RoundingSettings settings;
  const void* w;  // rows x columns, contiguous
  Dtype dtype;
  int64_t rows;
  int64_t columns;
  int64_t group_size;  // weights per group; the last group of a row may have fewer
  uint8_t* codes;      // rows x columns
  uint16_t* scale;     // rows x groups, float16 bits
  void* zero;          // rows x groups, uint8 for asym, float16 bits for asym16, unused otherwise
  void* scratch;       // rounding_scratch(group_size) bytes, aligned to 64
};

// Sixteen groups as floats, padded to whole blocks of input.
inline size_t rounding_scratch(int64_t group_size) { return ((size_t)group_size + 31) / 32 * 32 * 64; }

// False when a weight is NaN or infinite; the outputs are then unfinished.
using RoundMatrix = bool(const RoundingJob&);

namespace base {
RoundMatrix round_matrix;
}
namespace avx2 {
RoundMatrix round_matrix;
}
namespace avx512 {
RoundMatrix round_matrix;
}

}  // namespace moeq

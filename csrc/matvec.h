// Products of matrix records with few vectors, straight from the packed bytes (docs/format.md). The truth is
// src/moeq/kernels/reference.py, within the error of activations of 8 bits, or exact to float32 rounding.
#pragma once

#include <cstddef>
#include <cstdint>

#include "types.h"

namespace moeq {

// A matrix record.
struct Matrix {
  const uint8_t* planes[2];  // most significant first
  int widths[2];             // of the planes; 0: none
  int bits;
  int64_t group_size;  // at most `columns`
  Levels levels;
  const uint16_t* scale;  // rows x groups, float16 bits
  const void* zero;       // rows x groups: uint8 or float16 bits, or none
  const uint8_t* books;   // codebooks, block of rows by block of rows; none for scalar levels
  int dim;                // weights of a code: 1, or 4 and 2 for codebooks of 2 and 3 bits
  int64_t rows;
  int64_t columns;        // weights, not codes
};

// Group sizes that the integer kernels tell apart: 128 (and whole rows), 64, 32.
constexpr int kGrains = 3;
constexpr int kMaxTokens = 4;  // vectors of one call

// A vector of `columns` numbers, as the kernels take it: in blocks of 128 with a float scale each, x = scale * q.
struct Activations {
  const float* x;       // padded with zeros to whole blocks
  const int8_t* q;      // -127 .. 127, likewise
  const float* scale[kGrains];  // of each run of 128, 64 or 32 numbers
  const float* sum[kGrains];    // of q in each run
};

inline int64_t num_blocks(int64_t columns) { return (columns + kBlock - 1) / kBlock; }

// Room for one vector: what `place` lays out, aligned to 64 bytes.
inline size_t activation_bytes(int64_t columns) {
  // Per block: floats, codes, and 7 scales and sums; scales and sums are filled up with zeros to eights.
  return (size_t)num_blocks(columns) * (kBlock * 5 + 14 * 4) + 6 * 64 + 64;
}

inline Activations place(void* memory, int64_t columns) {
  const int64_t blocks = num_blocks(columns);
  char* at = (char*)memory;
  const auto take = [&at](int64_t bytes) {
    char* here = at;
    at += (bytes + 63) / 64 * 64;
    return here;
  };
  Activations out{};
  out.x = (float*)take(blocks * kBlock * 4);
  out.q = (int8_t*)take(blocks * kBlock);
  for (int grain = 0; grain < kGrains; grain++) {
    out.scale[grain] = (float*)take((blocks << grain) * 4);
    out.sum[grain] = (float*)take((blocks << grain) * 4);
  }
  return out;
}

// Rows `first` .. `last` - 1 of the product with up to kMaxTokens vectors: out[t][row].
struct MatvecJob {
  const Matrix* matrix;
  int64_t first, last;
  const Activations* x[kMaxTokens];
  int num_x;
  float* out[kMaxTokens];
  bool exact;  // floats times floats
};

// The same with any number of vectors, activations in 8 bits.
struct ManyJob {
  const Matrix* matrix;
  int64_t first, last;
  const Activations* const* x;
  float* const* out;
  int64_t count;
};

// Fills everything that `place` laid out but x, of which columns .. are set to zero, from x.
using Quantize = void(const Activations&, int64_t columns);
using Matvec = void(const MatvecJob&);
using MatvecMany = void(const ManyJob&);
// inner = silu(inner) * up
using SiluGate = void(float* inner, const float* up, int64_t count);
using ToFloat = void(const void* from, Dtype dtype, float* to, int64_t count);
using FromFloat = void(const float* from, Dtype dtype, void* to, int64_t count);
// to += weight * from
using AddScaled = void(const float* from, float weight, float* to, int64_t count);
// Reads everything and does next to nothing with it: the yardstick of the others.
using ReadAll = uint64_t(const void* from, size_t bytes);

#define MOEQ_DECLARE(isa)   \
  namespace isa {           \
  Quantize quantize;        \
  Matvec matvec;            \
  SiluGate silu_gate;       \
  ToFloat to_float_array;   \
  FromFloat from_float_array; \
  AddScaled add_scaled;     \
  ReadAll read_all;         \
  }
MOEQ_DECLARE(base)
MOEQ_DECLARE(avx2)
MOEQ_DECLARE(avx512)
#undef MOEQ_DECLARE

}  // namespace moeq

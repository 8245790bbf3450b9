// Packed layers for few tokens: who computes which rows. The arithmetic is in matvec.h.
#pragma once

#include <cstdint>
#include <vector>

#include "codebook.h"
#include "decoding.h"
#include "isa.h"
#include "matvec.h"

namespace moeq {

// The record at `offset` of a blob, its parts where docs/format.md says. Throws std::invalid_argument if it does not fit.
Matrix matrix_at(const uint8_t* data, int64_t size, int64_t offset, int bits, int64_t group_size, int levels,
                 int64_t rows, int64_t columns);

struct Run {
  Isa isa;
  int threads;
  bool exact;  // activations as floats instead of 8 bits
};

// y = x W^T for every W of some that have as many columns.
struct LinearJob {
  std::vector<Matrix> matrices;
  const void* x;         // tokens x columns
  std::vector<void*> y;  // tokens x rows, for each matrix
  Dtype dtype;           // of all
  int64_t tokens;
};

void linear(const LinearJob& job, const Run& run);

// The routed experts of one layer, gated by SiLU.
struct ExpertsJob {
  const uint8_t* data;
  int64_t size;
  const int64_t* table;  // experts x 3 x (offset, bits, group size, levels): gate, up, down
  int64_t num_experts, hidden, inner, tokens, top_k;
  const void* x;  // tokens x hidden
  void* y;        // likewise
  Dtype dtype;    // of both
  const int64_t* index;  // tokens x top_k; what is not below num_experts is left out
  const void* weight;    // tokens x top_k
  Dtype weight_dtype;
};

// Throws std::invalid_argument for a table that points outside the blob.
void experts(const ExpertsJob& job, const Run& run);

// Rows of a matrix decoded by several threads; `job` as for a DecodeMatrix.
void decode(const DecodeJob& job, const Run& run);

// The same for a matrix in codebooks.
void look_up(const LookUpJob& job, const Run& run);

// Bytes per second at which `threads` threads read a buffer together, once.
double read_bandwidth(const void* data, size_t bytes, const Run& run);

}  // namespace moeq

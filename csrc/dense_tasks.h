// What is not packed, for few tokens, on several threads. The arithmetic is in dense.h.
#pragma once

#include <cstdint>

#include "experts.h"
#include "types.h"

namespace moeq {

// y = x W^T
struct DenseJob {
  const void *w, *x;
  void* y;
  Dtype dtype, x_dtype;  // of W; of x and y
  int64_t rows, columns, tokens;
};

void dense_linear(const DenseJob& job, const Run& run);

// One query for each head of some sequences.
struct AttentionJob {
  const void *q, *k, *v;
  void* out;
  const uint8_t* mask;  // by sequence and key, or none
  int64_t mask_step;    // from one sequence to the next
  Dtype dtype, q_dtype;  // of keys and values; of queries and answers
  int64_t batch, heads, shared, size, value_size, count;
  int64_t k_steps[3], v_steps[3];  // sequence, head, key
  float scale;
};

void attention(const AttentionJob& job, const Run& run);

}  // namespace moeq

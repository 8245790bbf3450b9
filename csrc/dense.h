// What is not packed, for few tokens: products with a matrix of floats, the attention of one query, norms. The truth are
// torch's own linear, scaled_dot_product_attention and the norms of transformers' models.
#pragma once

#include <cstdint>

#include "matvec.h"
#include "types.h"

namespace moeq {

// Rows first .. last - 1 of W times up to kMaxTokens vectors of floats: out[t][row].
struct DotsJob {
  const void* w;  // rows x columns
  Dtype dtype;
  int64_t columns, first, last;
  const float* x[kMaxTokens];
  int num_x;
  float* out[kMaxTokens];
};

constexpr int64_t kSpan = 128;      // keys that are looked at at a time
constexpr int64_t kHeadStep = 16;  // sizes of heads are multiples of it
constexpr int64_t kMostChosen = 64;

// One query for each of `heads` heads meets `count` keys and values that they share.
struct AttendJob {
  const float* q;  // heads x size, scaled
  const void *k, *v;
  int64_t k_step, v_step;  // numbers from one key to the next
  Dtype dtype;             // of both
  int heads;
  int64_t size, value_size, count;
  const uint8_t* mask;  // by key, or none: 0 leaves it out
  // Out, by head: the largest score, the sum of exp(score - largest), and of that times value.
  float *largest, *total, *sum;
};

// Sums of spans, in order, to one answer of `size` numbers.
struct MergeJob {
  int64_t spans, size;
  const float *largest, *total, *sum;          // of the first span
  int64_t statistic_step, sum_step;            // numbers from one span to the next
  float* out;
};

// y = w * (x / sqrt(mean(x^2) + eps)), the bracket rounded to the dtype first.
struct NormJob {
  const void *x, *w;
  void* y;
  Dtype dtype;  // of all three
  int64_t size;
  float eps;
};

// The largest of softmax(logits), largest first and the first of equals first, and where they are.
struct ChooseJob {
  const void* logits;
  Dtype dtype;  // of logits and weights
  int64_t experts, top_k;
  bool normalized;  // divided by their sum
  float* scratch;   // 2 x experts, filled up to whole 16s
  void* weight;
  int64_t* index;
};

using Dots = void(const DotsJob&);
using Attend = void(const AttendJob&);
using Merge = void(const MergeJob&);
using Norm = void(const NormJob&);
using Choose = void(const ChooseJob&);

#define MOEQ_DECLARE(isa) \
  namespace isa {         \
  Dots dense_dots;        \
  Attend attend;          \
  Merge merge;            \
  Norm rms_norm;          \
  Choose choose;          \
  }
MOEQ_DECLARE(base)
MOEQ_DECLARE(avx2)
MOEQ_DECLARE(avx512)
#undef MOEQ_DECLARE

}  // namespace moeq

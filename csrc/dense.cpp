// See dense.h: plain loops over lanes, with float32 sums whatever the dtype.
#include "dense.h"

#include "fetch.h"
#include "halves.h"
#include "records.h"

namespace moeq::MOEQ_ISA {
namespace {

// One row of W times `kTokens` vectors.
template <Dtype kDtype, int kTokens>
MOEQ_INLINE void dots_of_row(const DotsJob& job, int64_t row) {
  const int64_t start = row * job.columns;
  F sums[kTokens], more[kTokens];
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++) sums[t] = more[t] = all(0.0f);
  int64_t j = 0;
  for (; j + 2 * kLanes <= job.columns; j += 2 * kLanes) {
    const F low = load_as<kDtype>(job.w, start + j), high = load_as<kDtype>(job.w, start + j + kLanes);
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; t++) {
      sums[t] = fma(low, load(job.x[t] + j), sums[t]);
      more[t] = fma(high, load(job.x[t] + j + kLanes), more[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTokens; t++) {
    float sum = sum_lanes(sums[t] + more[t]);
    for (int64_t tail = j; tail < job.columns; tail++) sum += one_as<kDtype>(job.w, start + tail) * job.x[t][tail];
    job.out[t][row] = sum;
  }
}

template <Dtype kDtype>
void dots_of(const DotsJob& job) {
  for (int64_t row = job.first; row < job.last; row++) {
    if (job.num_x == 1) dots_of_row<kDtype, 1>(job, row);
    else if (job.num_x == 2) dots_of_row<kDtype, 2>(job, row);
    else if (job.num_x == 3) dots_of_row<kDtype, 3>(job, row);
    else dots_of_row<kDtype, 4>(job, row);
  }
}

// Where a number is.
template <Dtype kDtype>
MOEQ_INLINE const char* place_of(const void* from, int64_t number) {
  return (const char*)from + number * (kDtype == Dtype::float32 ? 4 : 2);
}

// Asks for what follows some numbers of a key or value: spans follow each other, so what comes after the last one is
// wanted too.
template <Dtype kDtype>
MOEQ_INLINE void fetch_ahead(const void* from, int64_t first, int64_t count) {
  fetch_all(place_of<kDtype>(from, first) + kAhead, place_of<kDtype>(from, count) - (const char*)from);
}

// Scores of one head: its query times every key.
template <Dtype kDtype>
MOEQ_INLINE void score(const float* q, const void* k, int64_t step, int64_t size, int64_t count, float* to) {
  for (int64_t t = 0; t < count; t++) {
    fetch_ahead<kDtype>(k, t * step, size);
    F sum = all(0.0f), more = sum;
    int64_t j = 0;
    for (; j + 2 * kLanes <= size; j += 2 * kLanes) {
      sum = fma(load_as<kDtype>(k, t * step + j), load(q + j), sum);
      more = fma(load_as<kDtype>(k, t * step + j + kLanes), load(q + j + kLanes), more);
    }
    if (j < size) sum = fma(load_as<kDtype>(k, t * step + j), load(q + j), sum);
    to[t] = sum_lanes(sum + more);
  }
}

// kRegisters of columns of the sum of values, each times its weight, from column j on.
template <Dtype kDtype, int kRegisters>
MOEQ_INLINE void gather_columns(const float* weight, const void* v, int64_t step, int64_t j, int64_t count, float* to) {
  F sums[kRegisters];
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; i++) sums[i] = all(0.0f);
  for (int64_t t = 0; t < count; t++) {
    fetch_ahead<kDtype>(v, t * step + j, kRegisters * kLanes);
    const F here = all(weight[t]);
#pragma GCC unroll 8
    for (int i = 0; i < kRegisters; i++) sums[i] = fma(load_as<kDtype>(v, t * step + j + i * kLanes), here, sums[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRegisters; i++) store(to + j + i * kLanes, sums[i]);
}

// The sum of values, each times its weight.
template <Dtype kDtype>
MOEQ_INLINE void gather(const float* weight, const void* v, int64_t step, int64_t size, int64_t count, float* to) {
  int64_t j = 0;
#if defined(__AVX512F__)
  for (; j + 8 * kLanes <= size; j += 8 * kLanes) gather_columns<kDtype, 8>(weight, v, step, j, count, to);
#endif
  for (; j + 4 * kLanes <= size; j += 4 * kLanes) gather_columns<kDtype, 4>(weight, v, step, j, count, to);
  for (; j < size; j += kLanes) gather_columns<kDtype, 1>(weight, v, step, j, count, to);
}

constexpr float kNever = -__builtin_huge_valf();

// Scores to exp(score - largest), in place; what is left out gets 0.
void weigh(float* scores, int64_t count, const uint8_t* mask, float* largest, float* total) {
  float top = kNever;
  for (int64_t t = 0; t < count; t++) {
    if (mask != nullptr && !mask[t]) scores[t] = kNever;
    top = scores[t] > top ? scores[t] : top;
  }
  *largest = top;
  *total = 0.0f;
  for (int64_t t = count; t % kLanes; t++) scores[t] = kNever;
  F sum = all(0.0f);
  for (int64_t t = 0; t < count; t += kLanes) {
    const F power = max((load(scores + t) - all(top)) * all(1.44269504f), all(-127.0f));  // 2^-127 counts as 0
    const F weight = top == kNever ? all(0.0f) : two_to(power);
    store(scores + t, weight);
    sum = sum + weight;
  }
  *total = sum_lanes(sum);
}

template <Dtype kDtype>
void attend_of(const AttendJob& job) {
  alignas(64) float scores[kSpan + kLanes];
  // Nobody else asks for the first values.
  fetch_all(job.v, min_of(kAhead, place_of<kDtype>(job.v, job.count * job.v_step) - (const char*)job.v));
  for (int head = 0; head < job.heads; head++) {
    score<kDtype>(job.q + head * job.size, job.k, job.k_step, job.size, job.count, scores);
    weigh(scores, job.count, job.mask, job.largest + head, job.total + head);
    gather<kDtype>(scores, job.v, job.v_step, job.value_size, job.count, job.sum + head * job.value_size);
  }
}

template <Dtype kDtype>
void norm_of(const NormJob& job) {
  F sums = all(0.0f);
  int64_t j = 0;
  for (; j + kLanes <= job.size; j += kLanes) {
    const F x = load_as<kDtype>(job.x, j);
    sums = fma(x, x, sums);
  }
  float sum = sum_lanes(sums);
  for (; j < job.size; j++) sum += one_as<kDtype>(job.x, j) * one_as<kDtype>(job.x, j);
  const float factor = 1.0f / __builtin_sqrtf(sum / (float)job.size + job.eps);
  constexpr int kStep = 128;
  for (int64_t start = 0; start < job.size; start += kStep) {
    const int64_t here = min_of(job.size - start, kStep);
    alignas(64) float some[kStep];
    for (j = 0; j + kLanes <= here; j += kLanes)
      store(some + j, round_as<kDtype>(load_as<kDtype>(job.x, start + j) * all(factor)) * load_as<kDtype>(job.w, start + j));
    for (; j < here; j++) {
      float lanes[kLanes];
      store(lanes, round_as<kDtype>(all(one_as<kDtype>(job.x, start + j) * factor)));
      some[j] = lanes[0] * one_as<kDtype>(job.w, start + j);
    }
    store_as(some, here, kDtype, job.y, start);
  }
}

template <Dtype kDtype>
void choose_of(const ChooseJob& job) {
  float* const logits = job.scratch;
  float* const power = logits + (job.experts + kLanes - 1) / kLanes * kLanes;
  for (int64_t e = 0; e < job.experts; e++) logits[e] = one_as<kDtype>(job.logits, e);
  float top = kNever, total = 0.0f, chosen = 0.0f;
  for (int64_t e = 0; e < job.experts; e++) top = logits[e] > top ? logits[e] : top;
  for (int64_t e = 0; e < job.experts; e += kLanes) {
    const int64_t here = min_of(job.experts - e, kLanes);
    for (int64_t lane = here; lane < kLanes; lane++) logits[e + lane] = top;
    store(power + e, two_to(max((load(logits + e) - all(top)) * all(1.44269504f), all(-127.0f))));
    for (int64_t lane = 0; lane < here; lane++) total += power[e + lane];
  }
  float weights[kMostChosen];
  for (int64_t k = 0; k < job.top_k; k++) {
    int64_t best = 0;
    for (int64_t e = 1; e < job.experts; e++) best = logits[e] > logits[best] ? e : best;
    job.index[k] = best;
    weights[k] = power[best] / total;
    chosen += weights[k];
    logits[best] = kNever;
  }
  if (job.normalized)
    for (int64_t k = 0; k < job.top_k; k++) weights[k] /= chosen;
  store_as(weights, job.top_k, kDtype, job.weight, 0);
}

}  // namespace

void dense_dots(const DotsJob& job) {
  if (job.dtype == Dtype::float32) return dots_of<Dtype::float32>(job);
  if (job.dtype == Dtype::bfloat16) return dots_of<Dtype::bfloat16>(job);
  dots_of<Dtype::float16>(job);
}

void attend(const AttendJob& job) {
  if (job.dtype == Dtype::float32) return attend_of<Dtype::float32>(job);
  if (job.dtype == Dtype::bfloat16) return attend_of<Dtype::bfloat16>(job);
  attend_of<Dtype::float16>(job);
}

void merge(const MergeJob& job) {
  float top = kNever, total = 0.0f;
  for (int64_t span = 0; span < job.spans; span++) {
    const float here = job.largest[span * job.statistic_step];
    top = here > top ? here : top;
  }
  for (int64_t j = 0; j < job.size; j++) job.out[j] = 0.0f;
  for (int64_t span = 0; span < job.spans; span++) {
    const float here = job.largest[span * job.statistic_step];
    if (here == kNever) continue;
    const F shrunk = two_to(max(all((here - top) * 1.44269504f), all(-127.0f)));
    float lanes[kLanes];
    store(lanes, shrunk);
    total += lanes[0] * job.total[span * job.statistic_step];
    const float* from = job.sum + span * job.sum_step;
    for (int64_t j = 0; j < job.size; j++) job.out[j] += lanes[0] * from[j];
  }
  for (int64_t j = 0; j < job.size; j++) job.out[j] = total > 0.0f ? job.out[j] / total : 0.0f;
}

void rms_norm(const NormJob& job) {
  if (job.dtype == Dtype::float32) return norm_of<Dtype::float32>(job);
  if (job.dtype == Dtype::bfloat16) return norm_of<Dtype::bfloat16>(job);
  norm_of<Dtype::float16>(job);
}

void choose(const ChooseJob& job) {
  if (job.dtype == Dtype::float32) return choose_of<Dtype::float32>(job);
  if (job.dtype == Dtype::bfloat16) return choose_of<Dtype::bfloat16>(job);
  choose_of<Dtype::float16>(job);
}

}  // namespace moeq::MOEQ_ISA

// What is not packed, without Python, as in check_kernels.cpp: linears and the attention of one query, in memory of
// exactly their sizes, against sums in double.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "dense_tasks.h"
#include "random_records.h"

namespace {

std::vector<float> numbers(int64_t count) {
  std::vector<float> out((size_t)count);
  for (float& value : out) value = std::normal_distribution<float>()(random_bits);
  return out;
}

void demand(bool holds, const char* what) {
  if (holds) return;
  std::printf("dense: %s\n", what);
  std::exit(1);
}

void check_dense_linear(moeq::Isa isa) {
  const int64_t rows = pick(1, 70), columns = pick(1, 300), tokens = pick(1, 9);
  const std::vector<float> w = numbers(rows * columns), x = numbers(tokens * columns);
  std::vector<float> one((size_t)(tokens * rows)), more(one.size());
  moeq::DenseJob job{w.data(), x.data(), one.data(), moeq::Dtype::float32, moeq::Dtype::float32, rows, columns, tokens};
  moeq::dense_linear(job, {isa, 1, true});
  job.y = more.data();
  moeq::dense_linear(job, {isa, 3, true});
  demand(one == more, "threads change a linear");
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t row = 0; row < rows; row++) {
      double sum = 0;
      for (int64_t j = 0; j < columns; j++) sum += (double)w[(size_t)(row * columns + j)] * x[(size_t)(t * columns + j)];
      demand(std::fabs(sum - one[(size_t)(t * rows + row)]) < 1e-3, "a linear is wrong");
    }
}

void check_attention(moeq::Isa isa) {
  const int64_t batch = pick(1, 2), shared = pick(1, 3), heads = shared * pick(1, 3), count = pick(1, 400);
  const int64_t size = 16 * pick(1, 5), value_size = 16 * pick(1, 5);
  const std::vector<float> q = numbers(batch * heads * size), k = numbers(batch * shared * count * size),
                           v = numbers(batch * shared * count * value_size);
  std::vector<uint8_t> mask((size_t)(batch * count));
  for (uint8_t& each : mask) each = pick(0, 3) != 0;
  std::vector<float> one((size_t)(batch * heads * value_size)), more(one.size());
  moeq::AttentionJob job{};
  job.q = q.data();
  job.k = k.data();
  job.v = v.data();
  job.out = one.data();
  job.mask = mask.data();
  job.mask_step = count;
  job.dtype = job.q_dtype = moeq::Dtype::float32;
  job.batch = batch;
  job.heads = heads;
  job.shared = shared;
  job.size = size;
  job.value_size = value_size;
  job.count = count;
  const int64_t k_steps[3] = {shared * count * size, count * size, size};
  const int64_t v_steps[3] = {shared * count * value_size, count * value_size, value_size};
  for (int i = 0; i < 3; i++) job.k_steps[i] = k_steps[i], job.v_steps[i] = v_steps[i];
  job.scale = 0.2f;
  moeq::attention(job, {isa, 1, true});
  job.out = more.data();
  moeq::attention(job, {isa, 4, true});
  demand(one == more, "threads change the attention");
  for (int64_t at = 0; at < batch * heads; at++) {
    const int64_t sequence = at / heads, head = at % heads / (heads / shared), from = (sequence * shared + head) * count;
    std::vector<double> wanted((size_t)value_size);
    double total = 0;
    for (int64_t t = 0; t < count; t++) {
      if (!mask[(size_t)(sequence * count + t)]) continue;
      double dot = 0;
      for (int64_t j = 0; j < size; j++) dot += (double)q[(size_t)(at * size + j)] * k[(size_t)((from + t) * size + j)];
      const double weight = std::exp(0.2 * dot);
      total += weight;
      for (int64_t j = 0; j < value_size; j++) wanted[(size_t)j] += weight * v[(size_t)((from + t) * value_size + j)];
    }
    for (int64_t j = 0; j < value_size; j++) {
      const double want = total > 0 ? wanted[(size_t)j] / total : 0;
      demand(std::fabs(want - one[(size_t)(at * value_size + j)]) < 1e-3, "the attention is wrong");
    }
  }
}

}  // namespace

void check_dense(moeq::Isa isa) {
  check_dense_linear(isa);
  check_attention(isa);
}

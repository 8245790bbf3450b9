// The kernels that multiply, without Python: for address, undefined-behaviour and thread sanitizers (make sanitize).
// Every record lies in memory of exactly its size. Sums are compared with those of decoded weights, in double; results
// of several threads and of one must be the same bits. Exits with 1 and a message at the first difference.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

#include "experts.h"
#include "random_records.h"
#include "threads.h"
#include "trellis.h"

// check_layouts.cpp
void check_spectral(moeq::Isa isa);
void check_tiled(moeq::Isa isa);
// check_dense.cpp
void check_dense(moeq::Isa isa);

namespace {

std::vector<float> decoded(const moeq::Matrix& m, const moeq::Run& run) {
  std::vector<float> w((size_t)(m.rows * m.columns));
  if (m.books || m.levels == moeq::Levels::trellis) {
    moeq::look_up({&m, 0, m.rows, w.data(), moeq::Dtype::float32}, run);
    return w;
  }
  moeq::DecodeJob job{};
  for (int plane = 0; plane < 2; plane++)
    if (m.widths[plane]) job.planes[job.num_planes++] = {m.planes[plane], m.widths[plane]};
  job.scale = m.scale;
  job.zero = m.zero;
  job.levels = m.levels;
  job.bits = m.bits;
  job.rows = m.rows;
  job.columns = m.columns;
  job.group_size = m.group_size;
  job.w = w.data();
  job.dtype = moeq::Dtype::float32;
  moeq::decode(job, run);
  return w;
}

void fail(const char* what, const Spec& spec, int64_t rows, int64_t columns, double error) {
  std::printf("%s: %d bits, groups of %d, levels %d, %d x %d: error %g\n", what, spec.bits, (int)spec.group_size,
              spec.levels, (int)rows, (int)columns, error);
  std::exit(1);
}

void check_linear(moeq::Isa isa) {
  const int64_t columns = pick(0, 3) ? pick(1, 600) : 128 * pick(1, 9), tokens = pick(1, 9);
  const Spec spec = any_spec(columns);
  const int64_t rows = pick(1, spec.levels == kVector ? 300 : spec.levels == kTrellis ? 200 : 70);
  const std::vector<uint8_t> record = record_of(spec, rows, columns);
  moeq::LinearJob job{};
  const moeq::Matrix matrix =
      moeq::matrix_at(record.data(), (int64_t)record.size(), 0, spec.bits, spec.group_size, spec.levels, rows, columns);
  std::vector<float> x((size_t)(tokens * columns)), one((size_t)(tokens * rows)), more(one.size());
  for (float& value : x) value = std::normal_distribution<float>()(random_bits);
  job.x = x.data();
  job.dtype = moeq::Dtype::float32;
  job.tokens = tokens;
  // The first of several that meet the same vectors.
  const int64_t others = pick(0, 2);
  std::vector<std::vector<float>> rest((size_t)others, std::vector<float>(one.size()));
  job.matrices.assign((size_t)others + 1, matrix);
  for (std::vector<float>& each : rest) job.y.push_back(each.data());
  job.y.insert(job.y.begin(), one.data());
  const std::vector<float> w = decoded(matrix, {isa, 3, true});
  for (const bool exact : {true, false}) {
    job.y[0] = one.data();
    moeq::linear(job, {isa, 1, exact});
    job.y[0] = more.data();
    moeq::linear(job, {isa, 3, exact});
    for (const std::vector<float>& each : rest)
      if (one != each) fail("siblings", spec, rows, columns, 0);
    if (one != more) fail("threads", spec, rows, columns, 0);
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t row = 0; row < rows; row++) {
        double sum = 0, size = 0;
        for (int64_t j = 0; j < columns; j++) {
          const double term = (double)w[(size_t)(row * columns + j)] * x[(size_t)(t * columns + j)];
          sum += term;
          size += term * term;
        }
        const double room = std::sqrt(size) + 0.5 * (1 << spec.bits);
        const double error = std::fabs(sum - one[(size_t)(t * rows + row)]) / room;
        if (!(error < (exact ? 1e-5 : 0.1))) fail(exact ? "exact" : "rounded", spec, rows, columns, error);
      }
  }
}

void check_experts(moeq::Isa isa) {
  const int64_t hidden = pick(1, 300), inner = pick(1, 200), num = pick(1, 6), tokens = pick(1, 9), top_k = pick(1, 4);
  std::vector<uint8_t> data;
  std::vector<int64_t> table, index;
  for (int64_t expert = 0; expert < num; expert++)
    for (int at = 0; at < 3; at++) {
      const Spec spec = any_spec(at == 2 ? inner : hidden);
      const std::vector<uint8_t> record = record_of(spec, at == 2 ? hidden : inner, at == 2 ? inner : hidden);
      for (const int64_t value : {(int64_t)data.size(), (int64_t)spec.bits, spec.group_size, (int64_t)spec.levels})
        table.push_back(value);
      data.insert(data.end(), record.begin(), record.end());
    }
  data.shrink_to_fit();
  std::vector<float> x((size_t)(tokens * hidden)), weight((size_t)(tokens * top_k)), one(x.size()), more(x.size());
  for (float& value : x) value = std::normal_distribution<float>()(random_bits);
  for (float& value : weight) value = 0.5f;
  for (int64_t i = 0; i < tokens * top_k; i++) index.push_back(pick(0, (int)num));  // num: nobody
  moeq::ExpertsJob job{};
  job.data = data.data();
  job.size = (int64_t)data.size();
  job.table = table.data();
  job.num_experts = num;
  job.hidden = hidden;
  job.inner = inner;
  job.tokens = tokens;
  job.top_k = top_k;
  job.x = x.data();
  job.index = index.data();
  job.weight = weight.data();
  job.y = one.data();
  moeq::experts(job, {isa, 1, false});
  job.y = more.data();
  moeq::experts(job, {isa, 4, false});
  if (one != more) fail("experts", {0, 0, 0}, hidden, inner, 0);
  job.size--;
  try {
    for (int64_t& number : index) number = num - 1;  // the last record ends behind the data now
    job.index = index.data();
    moeq::experts(job, {isa, 2, false});
  } catch (const std::invalid_argument&) {
    return;
  }
  fail("a record beyond the end was read", {0, 0, 0}, hidden, inner, 0);
}

// Columns of weights become codes: the same on every instruction set, and with the errors that are said.
void check_search(moeq::Isa isa) {
  const int64_t count = pick(1, 9), rows = pick(1, 200);
  std::vector<float> w((size_t)(count * rows)), scale(w.size()), upper((size_t)(count * count));
  for (float& value : w) value = std::normal_distribution<float>()(random_bits);
  for (float& value : scale) value = pick(0, 9) ? 0.5f : 0.0f;
  for (int64_t j = 0; j < count; j++)
    for (int64_t k = j; k < count; k++) upper[(size_t)(j * count + k)] = j == k ? 1.0f : 0.1f;
  std::vector<float> other = w, error(w.size()), wanted_error(w.size());
  std::vector<uint8_t> codes(w.size()), wanted(w.size());
  const int bits = pick(1, 4);
  const auto job = [&](std::vector<float>& weights, std::vector<uint8_t>& to, std::vector<float>& off) {
    return moeq::TrellisJob{bits, count, rows, weights.data(), scale.data(), upper.data(), to.data(), off.data()};
  };
  MOEQ_PICK(isa, trellis_columns)(job(w, codes, error));
  moeq::base::trellis_columns(job(other, wanted, wanted_error));
  if (codes != wanted || error != wanted_error) fail("search", {bits, 0, kTrellis}, rows, count, 0);
}

}  // namespace

int main(int count, char** arguments) {
  const int rounds = count > 1 ? std::atoi(arguments[1]) : 200;
  if (moeq::borrows_threads()) return std::printf("built with the threads of OpenMP\n"), 1;
  for (const moeq::Isa isa : {moeq::Isa::base, moeq::Isa::avx2, moeq::Isa::avx512}) {
    if (!moeq::runs(isa)) continue;
    for (int round = 0; round < rounds; round++) {
      check_linear(isa);
      check_experts(isa);
      check_search(isa);
      check_spectral(isa);
      check_tiled(isa);
      check_dense(isa);
    }
  }
  std::printf("ok\n");
  return 0;
}

// Layers of the layouts "spectral" and "tiled" for the sanitizers; see check_kernels.cpp. Blobs and lists have exactly
// their size; results of several threads and of one must be the same bits, rounded ones those of plain code, and near exact ones.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "layouts.h"
#include "random_records.h"

void check_spectral(moeq::Isa isa);
void check_tiled(moeq::Isa isa);

namespace {

struct Call {
  int64_t hidden, inner, experts, tokens, top_k;
  std::vector<float> x, weight, y;
  std::vector<int64_t> index;

  Call()
      : hidden(pick(0, 2) ? pick(1, 300) : 256),
        inner(pick(0, 2) ? pick(1, 300) : 128 * pick(1, 9)),
        experts(pick(1, 5)),
        tokens(pick(1, 7)),
        top_k(pick(1, 3)),
        x((size_t)(tokens * hidden)),
        weight((size_t)(tokens * top_k), 0.5f),
        y(x.size()) {
    for (float& value : x) value = std::normal_distribution<float>()(random_bits);
    for (int64_t i = 0; i < tokens * top_k; i++) index.push_back(pick(0, (int)experts));  // the last one: nobody
  }

  void fill(moeq::ExpertsJob& job, const std::vector<uint8_t>& data) {
    job.data = data.data();
    job.size = (int64_t)data.size();
    job.num_experts = experts;
    job.hidden = hidden;
    job.inner = inner;
    job.tokens = tokens;
    job.top_k = top_k;
    job.x = x.data();
    job.y = y.data();
    job.index = index.data();
    job.weight = weight.data();
  }

  template <class Job>
  void check(const char* name, void run(const Job&, const moeq::Run&), const Job& job, moeq::Isa isa) {
    std::vector<float> results[2];
    for (const bool exact : {true, false}) {
      run(job, {isa, 1, exact});
      results[exact] = y;
      run(job, {isa, 3, exact});
      if (results[exact] != y) fail(name, "threads", 0);
    }
    run(job, {moeq::Isa::base, 1, false});
    // Sums in another order round an activation otherwise now and then.
    // A gate far from 0 lets a token through or not: rounding one may cost most of an answer, so this is no narrow bound.
    const double rounding = distance(results[0], results[1]), unlike = distance(results[0], y);
    if (!(rounding <= 0.9)) fail(name, "rounded", rounding);
    if (!(unlike <= 0.5)) fail(name, "plain code", unlike);
  }

  // Of two answers, as a share of the second.
  static double distance(const std::vector<float>& a, const std::vector<float>& b) {
    double error = 0, size = 0;
    for (size_t i = 0; i < a.size(); i++) {
      error += std::pow(a[i] - b[i], 2);
      size += std::pow(b[i], 2);
    }
    return error ? std::sqrt(error / size) : 0;
  }

  void fail(const char* name, const char* what, double error) {
    std::printf("%s: %s, %d x %d: error %g\n", name, what, (int)hidden, (int)inner, error);
    std::exit(1);
  }
};

void append(std::vector<uint8_t>& data, const std::vector<uint8_t>& more) {
  data.insert(data.end(), more.begin(), more.end());
}

std::vector<uint8_t> halves(int64_t count) {
  std::vector<uint8_t> out;
  for (int64_t i = 0; i < aligned(2 * count); i++) out.push_back(i % 2 ? 0x34 : (uint8_t)pick(0, 255));
  return out;
}

template <class Job>
void check_refusal(const char* name, Call& call, void run(const Job&, const moeq::Run&), const Job& job) {
  try {
    for (int64_t& number : call.index) number = 0;
    run(job, {moeq::Isa::base, 2, false});
  } catch (const std::invalid_argument&) {
    return;
  }
  call.fail(name, "what lies beyond the end was read", 0);
}

}  // namespace

void check_spectral(moeq::Isa isa) {
  Call call;
  std::vector<uint8_t> data;
  std::vector<int64_t> table, starts;
  std::vector<int16_t> order;
  const int64_t directions = pick(1, 90);
  const int widths[] = {8, 6, 5, 4, 3, 2, 1};
  for (int at = 0; at < 3; at++) {
    const bool half = pick(0, 1);
    for (const int64_t value : {(int64_t)data.size(), (int64_t)(half ? 16 : 8), (int64_t)(half ? 0 : 128),
                                (int64_t)(half ? 0 : 2), directions})
      table.push_back(value);
    append(data, half ? halves(directions * call.hidden) : record_of({8, 128, 2}, directions, call.hidden));
    std::vector<int64_t> left((size_t)call.experts, directions);
    for (const int width : widths) {
      int64_t rows = 0;
      starts.push_back(0);
      for (int64_t& here : left) {
        const int64_t mine = pick(0, 2) ? pick(0, (int)here) : 0;
        here -= mine;
        rows += mine;
        starts.push_back(rows);
      }
      Spec spec = any_spec(call.inner, true);
      spec.bits = width;
      for (const int64_t value : {(int64_t)data.size(), (int64_t)width, spec.group_size, (int64_t)spec.levels, rows})
        table.push_back(value);
      if (rows) append(data, record_of(spec, rows, call.inner));
    }
    for (int64_t i = 0; i < call.experts * directions; i++) order.push_back((int16_t)pick(0, (int)directions - 1));
  }
  data.shrink_to_fit();
  moeq::SpectralJob job{};
  call.fill(job.routed, data);
  job.table = table.data();
  job.starts = starts.data();
  job.order = order.data();
  job.directions = directions;
  call.check("spectral", moeq::spectral_experts, job, isa);
  for (int at = 0; at < 3; at++) order[(size_t)(at * call.experts * directions)] = (int16_t)directions;
  int64_t first = 0;
  for (int slab = 0; slab < 21; slab++) first += starts[(size_t)(slab * (call.experts + 1) + 1)];
  if (first) check_refusal("spectral", call, moeq::spectral_experts, job);
}

void check_tiled(moeq::Isa isa) {
  Call call;
  std::vector<uint8_t> data, sides;
  std::vector<int64_t> table, tiles;
  for (int64_t expert = 0; expert < call.experts; expert++)
    for (int at = 0; at < 3; at++) {
      const Spec spec = any_spec(at == 2 ? call.inner : call.hidden);
      for (const int64_t value : {(int64_t)data.size(), (int64_t)spec.bits, spec.group_size, (int64_t)spec.levels})
        table.push_back(value);
      append(data, record_of(spec, at == 2 ? call.hidden : call.inner, at == 2 ? call.inner : call.hidden));
    }
  for (int at = 0; at < 3; at++) {
    const int64_t inputs = at == 2 ? call.inner : call.hidden, outputs = at == 2 ? call.hidden : call.inner;
    const int64_t rank = pick(0, 2) ? pick(1, 70) : 0, rows = pick(1, (int)call.experts), columns = call.experts;
    const int64_t scales = rank && pick(0, 1) ? 3 : 0, orders = pick(0, 3), block = orders ? 1 << pick(0, 4) : 0;
    for (const int64_t value : {(int64_t)sides.size(), rank, rows, columns, scales, orders, block,
                                orders ? inputs % block : (int64_t)0})
      tiles.push_back(value);
    const auto numbers = [&](int64_t count, auto value) {
      const size_t start = sides.size();
      sides.resize(start + (size_t)aligned(2 * count));
      for (int64_t i = 0; i < count; i++) {
        const uint16_t number = (uint16_t)value(i);
        std::memcpy(&sides[start + (size_t)(2 * i)], &number, 2);
      }
    };
    if (rank || orders == 2)
      numbers(2 * call.experts, [&](int64_t i) { return i % 2 ? i / 2 : pick(0, (int)rows - 1); });
    if (rank) {
      append(sides, record_of({8, -1, 2}, rows * rank, inputs));
      append(sides, record_of({8, -1, 2}, columns * rank, outputs));
    }
    if (scales) append(sides, halves(call.experts * inputs));
    const int64_t owners = orders == 1 ? 1 : orders == 2 ? rows : orders == 3 ? call.experts : 0;
    if (owners) numbers(owners * inputs, [&](int64_t i) { return inputs - 1 - i % inputs; });
  }
  data.shrink_to_fit();
  sides.shrink_to_fit();
  moeq::TiledJob job{};
  call.fill(job.routed, data);
  job.routed.table = table.data();
  job.sides = sides.data();
  job.sides_size = (int64_t)sides.size();
  job.tiles = tiles.data();
  call.check("tiled", moeq::tiled_experts, job, isa);
  job.sides_size = job.sides_size < 64 ? -64 : job.sides_size - 64;
  if (sides.empty()) job.routed.size = 0;
  check_refusal("tiled", call, moeq::tiled_experts, job);
}

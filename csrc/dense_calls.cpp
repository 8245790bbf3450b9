// See dense_calls.h. Every row and every span of keys is computed as it would be alone, and spans are joined in order:
// results do not depend on the number of threads.
#include "dense_calls.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "arguments.h"
#include "dense.h"
#include "tasks.h"

namespace moeq {
namespace {

namespace nb = nanobind;
using namespace nb::literals;
using arguments::Any;

using Strided = nb::ndarray<nb::device::cpu>;

constexpr int64_t kWorth = 1 << 16;  // products that another thread is woken for

int threads_for(const Run& run, int64_t products) { return (int)std::min<int64_t>(run.threads, 1 + products / kWorth); }

struct DenseTask {
  const void *w, *x;
  void* y;
  Dtype dtype;
  int64_t rows, columns, tokens, each;
  Isa isa;
  ToFloat* to_float;
  FromFloat* from_float;
  Dots* dots;
  Scratch in, out;
  Phase loading;
  Counter multiplying;

  DenseTask(const Any& w, const Any& x, const Any& y, const Run& run)
      : w(w.data()),
        x(x.data()),
        y(y.data()),
        dtype(arguments::dtype_of(w)),
        rows((int64_t)w.shape(0)),
        columns((int64_t)w.shape(1)),
        tokens((int64_t)x.shape(0)),
        each(piece_rows(rows, run.threads * kGatePieces)),
        isa(product_isa(run.isa)),
        to_float(MOEQ_PICK(isa, to_float_array)),
        from_float(MOEQ_PICK(isa, from_float_array)),
        dots(MOEQ_PICK(isa, dense_dots)),
        in((size_t)(tokens * columns) * sizeof(float)),
        out((size_t)(tokens * rows) * sizeof(float)) {}

  void multiply(int64_t first, int64_t last) {
    for (int64_t t = 0; t < tokens; t += kMaxTokens) {
      DotsJob job{w, dtype, columns, first, last, {}, (int)std::min<int64_t>(tokens - t, kMaxTokens), {}};
      for (int i = 0; i < job.num_x; i++) {
        job.x[i] = in.floats() + (t + i) * columns;
        job.out[i] = out.floats() + (t + i) * rows;
      }
      dots(job);
    }
    for (int64_t t = 0; t < tokens; t++)
      from_float(out.floats() + t * rows + first, dtype, (char*)y + (size_t)(t * rows + first) * size_of(dtype), last - first);
  }

  void operator()() {
    loading.run(tokens, [this](int64_t t) {
      to_float((const char*)x + (size_t)(t * columns) * size_of(dtype), dtype, in.floats() + t * columns, columns);
    });
    // Tile by tile, so that weights are in the cache for all vectors but the first four.
    for (int64_t piece; (piece = multiplying.take()) < num_pieces(rows, each);)
      for (int64_t row = piece * each; row < std::min((piece + 1) * each, rows); row += kTileRows)
        multiply(row, std::min({row + kTileRows, (piece + 1) * each, rows}));
  }
};

void dense_linear(Any w, Any x, Any y, int threads, const std::string& isa) {
  arguments::require(w.ndim() == 2 && x.ndim() == 2 && y.ndim() == 2, "all are matrices");
  arguments::require(x.shape(1) == w.shape(1) && y.shape(0) == x.shape(0) && y.shape(1) == w.shape(0), "shapes do not fit");
  const Dtype dtype = arguments::dtype_of(w);
  arguments::require(arguments::dtype_of(x) == dtype && arguments::dtype_of(y) == dtype, "all have one dtype");
  arguments::require(w.size() > 0, "the matrix is empty");
  const Run run = arguments::run_of(threads, true, isa);
  const nb::gil_scoped_release unlocked;
  DenseTask task(w, x, y, run);
  on_threads(threads_for(run, task.rows * task.columns * task.tokens), task);
}

struct AttentionTask {
  const void *q, *k, *v;
  void* out;
  const uint8_t* mask = nullptr;  // by sequence and key
  int64_t mask_step = 0;
  Dtype dtype;
  int64_t batch, heads, shared, groups, size, value_size, count, spans;
  int64_t k_steps[3], v_steps[3];  // sequence, head, key
  float scale;
  Isa isa;
  Attend* attend;
  Merge* merge;
  ToFloat* to_float;
  FromFloat* from_float;
  Scratch query, largest, total, sum, answer;
  Phase loading, attending;
  Counter merging;

  AttentionTask(const Any& q, const Strided& k, const Strided& v, const Any& out, float scale, const Run& run)
      : q(q.data()),
        k(k.data()),
        v(v.data()),
        out(out.data()),
        dtype(arguments::dtype_of(q)),
        batch((int64_t)q.shape(0)),
        heads((int64_t)q.shape(1)),
        shared((int64_t)k.shape(1)),
        groups(heads / shared),
        size((int64_t)q.shape(2)),
        value_size((int64_t)v.shape(3)),
        count((int64_t)k.shape(2)),
        spans((count + kSpan - 1) / kSpan),
        k_steps{k.stride(0), k.stride(1), k.stride(2)},
        v_steps{v.stride(0), v.stride(1), v.stride(2)},
        scale(scale),
        isa(product_isa(run.isa)),
        attend(MOEQ_PICK(isa, attend)),
        merge(MOEQ_PICK(isa, merge)),
        to_float(MOEQ_PICK(isa, to_float_array)),
        from_float(MOEQ_PICK(isa, from_float_array)),
        query((size_t)(batch * heads * size) * sizeof(float)),
        largest((size_t)(batch * heads * spans) * sizeof(float)),
        total((size_t)(batch * heads * spans) * sizeof(float)),
        sum((size_t)(batch * heads * spans * value_size) * sizeof(float)),
        answer((size_t)(batch * heads * value_size) * sizeof(float)) {}

  void load_query(int64_t at) {
    float* to = query.floats() + at * size;
    to_float((const char*)q + (size_t)(at * size) * size_of(dtype), dtype, to, size);
    for (int64_t j = 0; j < size; j++) to[j] *= scale;
  }

  // A span of keys that some heads share.
  void look(int64_t piece) {
    const int64_t span = piece % spans, sharing = piece / spans, sequence = sharing / shared, head = sharing % shared;
    const int64_t first = span * kSpan, statistic = piece * groups;
    const auto at = [&](const void* from, const int64_t* steps) {
      return (const char*)from + (sequence * steps[0] + head * steps[1] + first * steps[2]) * (int64_t)size_of(dtype);
    };
    attend({query.floats() + sharing * groups * size, at(k, k_steps), at(v, v_steps), k_steps[2], v_steps[2], dtype, (int)groups,
            size, value_size, std::min(kSpan, count - first), mask ? mask + sequence * mask_step + first : nullptr,
            largest.floats() + statistic, total.floats() + statistic, sum.floats() + statistic * value_size});
  }

  void join(int64_t at) {
    const int64_t statistic = at / groups * spans * groups + at % groups;
    float* to = answer.floats() + at * value_size;
    merge({spans, value_size, largest.floats() + statistic, total.floats() + statistic, sum.floats() + statistic * value_size,
           groups, groups * value_size, to});
    from_float(to, dtype, (char*)out + (size_t)(at * value_size) * size_of(dtype), value_size);
  }

  void operator()() {
    loading.run(batch * heads, [this](int64_t at) { load_query(at); });
    attending.run(batch * shared * spans, [this](int64_t piece) { look(piece); });
    for (int64_t at; (at = merging.take()) < batch * heads;) join(at);
  }
};

void attention(Any q, Strided k, Strided v, std::optional<nb::ndarray<const uint8_t, nb::device::cpu>> mask, Any out,
               double scale, int threads, const std::string& isa) {
  using arguments::require;
  require(q.ndim() == 3 && k.ndim() == 4 && v.ndim() == 4 && out.ndim() == 3, "no such shapes");
  for (const Strided* each : {&k, &v})
    require(each->shape(0) == q.shape(0) && each->shape(2) == k.shape(2) && each->shape(1) == k.shape(1) && each->stride(3) == 1,
            "keys and values do not fit the queries");
  require(k.shape(2) > 0 && k.shape(1) > 0 && q.shape(1) % k.shape(1) == 0, "heads cannot be shared out");
  require(k.shape(3) == q.shape(2) && q.shape(2) % kHeadStep == 0 && v.shape(3) % kHeadStep == 0, "no such head size");
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) && out.shape(2) == v.shape(3), "out has another shape");
  const Dtype dtype = arguments::dtype_of(q);
  require(arguments::dtype_of(k) == dtype && arguments::dtype_of(v) == dtype && arguments::dtype_of(out) == dtype, "all have one dtype");
  const Run run = arguments::run_of(threads, true, isa);
  AttentionTask task(q, k, v, out, (float)scale, run);
  if (mask) {
    require(mask->ndim() == 2 && mask->shape(0) == q.shape(0) && mask->shape(1) == k.shape(2) && mask->stride(1) == 1,
            "there is a mask for each sequence and key");
    task.mask = mask->data();
    task.mask_step = mask->stride(0);
  }
  const nb::gil_scoped_release unlocked;
  on_threads(threads_for(run, 2 * task.batch * task.heads * task.count * task.size), task);
}

void rms_norm(Any x, Any w, Any y, double eps, const std::string& isa) {
  using arguments::require;
  require(w.ndim() == 1 && w.size() > 0, "there is no weight");
  require(x.ndim() > 0 && x.shape(x.ndim() - 1) == w.size() && y.size() == x.size(), "shapes do not fit");
  const Dtype dtype = arguments::dtype_of(x);
  require(arguments::dtype_of(w) == dtype && arguments::dtype_of(y) == dtype, "all have one dtype");
  const Isa chosen = product_isa(arguments::isa_of(isa));
  const size_t size = w.size(), step = size * size_of(dtype);
  const nb::gil_scoped_release unlocked;
  for (size_t t = 0; t < x.size() / size; t++)
    MOEQ_PICK(chosen, rms_norm)
    ({(const char*)x.data() + t * step, w.data(), (char*)y.data() + t * step, dtype, (int64_t)size, (float)eps});
}

using Integers = nb::ndarray<int64_t, nb::c_contig, nb::device::cpu>;

void choose(Any logits, Any weight, Integers index, bool normalized, const std::string& isa) {
  using arguments::require;
  require(logits.ndim() == 2 && weight.ndim() == 2 && index.ndim() == 2, "all are matrices");
  require(weight.shape(0) == logits.shape(0) && index.shape(0) == logits.shape(0) && index.shape(1) == weight.shape(1),
          "shapes do not fit");
  const int64_t experts = (int64_t)logits.shape(1), top_k = (int64_t)weight.shape(1);
  require(top_k > 0 && top_k <= kMostChosen && top_k <= experts, "no such number of experts");
  const Dtype dtype = arguments::dtype_of(logits);
  require(arguments::dtype_of(weight) == dtype, "all have one dtype");
  const Isa chosen = product_isa(arguments::isa_of(isa));
  const nb::gil_scoped_release unlocked;
  const Scratch scratch((size_t)(2 * (experts + kHeadStep)) * sizeof(float));
  for (int64_t t = 0; t < (int64_t)logits.shape(0); t++)
    MOEQ_PICK(chosen, choose)
    ({(const char*)logits.data() + (size_t)(t * experts) * size_of(dtype), dtype, experts, top_k, normalized, scratch.floats(),
      (char*)weight.data() + (size_t)(t * top_k) * size_of(dtype), index.data() + t * top_k});
}

}  // namespace

void add_dense(nb::module_& module) {
  module.def("dense_linear", &dense_linear, nb::arg("w").noconvert(), nb::arg("x").noconvert(), nb::arg("y").noconvert(),
             "threads"_a, "isa"_a = "", "y = x W^T, few rows of x.");
  module.def("attention", &attention, nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(),
             nb::arg("mask").none(), nb::arg("out").noconvert(), "scale"_a, "threads"_a, "isa"_a = "",
             "The attention of one query for each head.");
  module.def("rms_norm", &rms_norm, nb::arg("x").noconvert(), nb::arg("w").noconvert(), nb::arg("y").noconvert(), "eps"_a,
             "isa"_a = "", "w * (x / root mean square of x).");
  module.def("choose", &choose, nb::arg("logits").noconvert(), nb::arg("weight").noconvert(), nb::arg("index").noconvert(),
             "normalized"_a, "isa"_a = "", "The experts of the largest logits, and their softmax.");
}

}  // namespace moeq

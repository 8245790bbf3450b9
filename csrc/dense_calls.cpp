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
  const DenseJob& job;
  int64_t each;
  ToFloat* to_float;
  FromFloat* from_float;
  Dots* dots;
  Scratch in, out;
  Phase loading;
  Counter multiplying;

  DenseTask(const DenseJob& job, const Run& run, Isa isa)
      : job(job),
        each(piece_rows(job.rows, run.threads * kGatePieces)),
        to_float(MOEQ_PICK(isa, to_float_array)),
        from_float(MOEQ_PICK(isa, from_float_array)),
        dots(MOEQ_PICK(isa, dense_dots)),
        in((size_t)(job.tokens * job.columns) * sizeof(float)),
        out((size_t)(job.tokens * job.rows) * sizeof(float)) {}

  void multiply(int64_t first, int64_t last) {
    for (int64_t t = 0; t < job.tokens; t += kMaxTokens) {
      DotsJob some{job.w, job.dtype, job.columns, first, last, {}, (int)std::min<int64_t>(job.tokens - t, kMaxTokens), {}};
      for (int i = 0; i < some.num_x; i++) {
        some.x[i] = in.floats() + (t + i) * job.columns;
        some.out[i] = out.floats() + (t + i) * job.rows;
      }
      dots(some);
    }
    for (int64_t t = 0; t < job.tokens; t++) {
      const int64_t at = t * job.rows + first;
      from_float(out.floats() + at, job.x_dtype, (char*)job.y + (size_t)at * size_of(job.x_dtype), last - first);
    }
  }

  void operator()() {
    loading.run(job.tokens, [this](int64_t t) {
      const int64_t at = t * job.columns;
      to_float((const char*)job.x + (size_t)at * size_of(job.x_dtype), job.x_dtype, in.floats() + at, job.columns);
    });
    // Tile by tile, so that weights are in the cache for all vectors but the first four.
    for (int64_t piece; (piece = multiplying.take()) < num_pieces(job.rows, each);)
      for (int64_t row = piece * each; row < std::min((piece + 1) * each, job.rows); row += kTileRows)
        multiply(row, std::min({row + kTileRows, (piece + 1) * each, job.rows}));
  }
};

struct AttentionTask {
  const AttentionJob& job;
  int64_t groups, spans;
  Attend* attend;
  Merge* merge;
  ToFloat* to_float;
  FromFloat* from_float;
  Scratch query, largest, total, sum, answer;
  Phase loading, attending;
  Counter merging;

  AttentionTask(const AttentionJob& job, Isa isa)
      : job(job),
        groups(job.heads / job.shared),
        spans((job.count + kSpan - 1) / kSpan),
        attend(MOEQ_PICK(isa, attend)),
        merge(MOEQ_PICK(isa, merge)),
        to_float(MOEQ_PICK(isa, to_float_array)),
        from_float(MOEQ_PICK(isa, from_float_array)),
        query((size_t)(job.batch * job.heads * job.size) * sizeof(float)),
        largest((size_t)(job.batch * job.heads * spans) * sizeof(float)),
        total((size_t)(job.batch * job.heads * spans) * sizeof(float)),
        sum((size_t)(job.batch * job.heads * spans * job.value_size) * sizeof(float)),
        answer((size_t)(job.batch * job.heads * job.value_size) * sizeof(float)) {}

  void load_query(int64_t at) {
    float* to = query.floats() + at * job.size;
    to_float((const char*)job.q + (size_t)(at * job.size) * size_of(job.q_dtype), job.q_dtype, to, job.size);
    for (int64_t j = 0; j < job.size; j++) to[j] *= job.scale;
  }

  // A span of keys that some heads share.
  void look(int64_t piece) {
    const int64_t span = piece % spans, sharing = piece / spans, sequence = sharing / job.shared, head = sharing % job.shared;
    const int64_t first = span * kSpan, statistic = piece * groups;
    const auto at = [&](const void* from, const int64_t* steps) {
      return (const char*)from + (sequence * steps[0] + head * steps[1] + first * steps[2]) * (int64_t)size_of(job.dtype);
    };
    attend({query.floats() + sharing * groups * job.size, at(job.k, job.k_steps), at(job.v, job.v_steps), job.k_steps[2],
            job.v_steps[2], job.dtype, (int)groups, job.size, job.value_size, std::min(kSpan, job.count - first),
            job.mask ? job.mask + sequence * job.mask_step + first : nullptr, largest.floats() + statistic,
            total.floats() + statistic, sum.floats() + statistic * job.value_size});
  }

  void join(int64_t at) {
    const int64_t statistic = at / groups * spans * groups + at % groups;
    float* to = answer.floats() + at * job.value_size;
    merge({spans, job.value_size, largest.floats() + statistic, total.floats() + statistic,
           sum.floats() + statistic * job.value_size, groups, groups * job.value_size, to});
    from_float(to, job.q_dtype, (char*)job.out + (size_t)(at * job.value_size) * size_of(job.q_dtype), job.value_size);
  }

  void operator()() {
    loading.run(job.batch * job.heads, [this](int64_t at) { load_query(at); });
    attending.run(job.batch * job.shared * spans, [this](int64_t piece) { look(piece); });
    for (int64_t at; (at = merging.take()) < job.batch * job.heads;) join(at);
  }
};

void dense_linear_of(Any w, Any x, Any y, int threads, const std::string& isa) {
  using arguments::require;
  require(w.ndim() == 2 && x.ndim() == 2 && y.ndim() == 2, "all are matrices");
  require(x.shape(1) == w.shape(1) && y.shape(0) == x.shape(0) && y.shape(1) == w.shape(0), "shapes do not fit");
  const Dtype dtype = arguments::dtype_of(w);
  require(arguments::dtype_of(x) == dtype && arguments::dtype_of(y) == dtype, "all have one dtype");
  require(w.size() > 0, "the matrix is empty");
  const Run run = arguments::run_of(threads, true, isa);
  const nb::gil_scoped_release unlocked;
  dense_linear({w.data(), x.data(), y.data(), dtype, dtype, (int64_t)w.shape(0), (int64_t)w.shape(1), (int64_t)x.shape(0)}, run);
}

void attention_of(Any q, Strided k, Strided v, std::optional<nb::ndarray<const uint8_t, nb::device::cpu>> mask, Any out,
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
  AttentionJob job{};
  job.q = q.data();
  job.k = k.data();
  job.v = v.data();
  job.out = out.data();
  job.dtype = job.q_dtype = dtype;
  job.batch = (int64_t)q.shape(0);
  job.heads = (int64_t)q.shape(1);
  job.shared = (int64_t)k.shape(1);
  job.size = (int64_t)q.shape(2);
  job.value_size = (int64_t)v.shape(3);
  job.count = (int64_t)k.shape(2);
  for (int i = 0; i < 3; i++) {
    job.k_steps[i] = k.stride((size_t)i);
    job.v_steps[i] = v.stride((size_t)i);
  }
  job.scale = (float)scale;
  if (mask) {
    require(mask->ndim() == 2 && mask->shape(0) == q.shape(0) && mask->shape(1) == k.shape(2) && mask->stride(1) == 1,
            "there is a mask for each sequence and key");
    job.mask = mask->data();
    job.mask_step = mask->stride(0);
  }
  const Run run = arguments::run_of(threads, true, isa);
  const nb::gil_scoped_release unlocked;
  attention(job, run);
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

void dense_linear(const DenseJob& job, const Run& run) {
  DenseTask task(job, run, product_isa(run.isa));
  on_threads(threads_for(run, job.rows * job.columns * job.tokens), task);
}

void attention(const AttentionJob& job, const Run& run) {
  AttentionTask task(job, product_isa(run.isa));
  on_threads(threads_for(run, 2 * job.batch * job.heads * job.count * job.size), task);
}

void add_dense(nb::module_& module) {
  module.def("dense_linear", &dense_linear_of, nb::arg("w").noconvert(), nb::arg("x").noconvert(), nb::arg("y").noconvert(),
             "threads"_a, "isa"_a = "", "y = x W^T, few rows of x.");
  module.def("attention", &attention_of, nb::arg("q").noconvert(), nb::arg("k").noconvert(), nb::arg("v").noconvert(),
             nb::arg("mask").none(), nb::arg("out").noconvert(), "scale"_a, "threads"_a, "isa"_a = "",
             "The attention of one query for each head.");
  module.def("rms_norm", &rms_norm, nb::arg("x").noconvert(), nb::arg("w").noconvert(), nb::arg("y").noconvert(), "eps"_a,
             "isa"_a = "", "w * (x / root mean square of x).");
  module.def("choose", &choose, nb::arg("logits").noconvert(), nb::arg("weight").noconvert(), nb::arg("index").noconvert(),
             "normalized"_a, "isa"_a = "", "The experts of the largest logits, and their softmax.");
}

}  // namespace moeq

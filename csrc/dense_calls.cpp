// See dense_calls.h; the work is done in dense_tasks.cpp and dense.cpp.
#include "dense_calls.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "arguments.h"
#include "dense.h"
#include "dense_tasks.h"
#include "tasks.h"

namespace moeq {
namespace {

namespace nb = nanobind;
using namespace nb::literals;
using arguments::Any;

using Strided = nb::ndarray<nb::device::cpu>;

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

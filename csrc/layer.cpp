// See layer.h.
#include "layer.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <vector>

#include "arguments.h"
#include "dense_tasks.h"
#include "tasks.h"

namespace moeq {
namespace {

namespace nb = nanobind;
using namespace nb::literals;
using arguments::Any;
using arguments::ReadOnlyBytes;
using arguments::require;

using Strided = nb::ndarray<nb::device::cpu>;

// Numbers of a parameter, and how many; the caller sees to it that they stay where they are.
struct Numbers {
  const void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t count = 0;

  Numbers() = default;
  explicit Numbers(const Any& from) : data(from.data()), dtype(arguments::dtype_of(from)), count((int64_t)from.size()) {}

  std::vector<float> floats(Isa isa) const {
    std::vector<float> out((size_t)count);
    MOEQ_PICK(isa, to_float_array)(data, dtype, out.data(), count);
    return out;
  }
};

// x = x / root mean square * w, for each run of w's length.
void normalize(std::vector<float>& x, const Numbers& w, float eps, Isa isa) {
  const std::vector<float> weight = w.floats(isa);
  std::vector<float> out(x.size());
  for (size_t at = 0; at < x.size(); at += weight.size())
    MOEQ_PICK(isa, rms_norm)({x.data() + at, weight.data(), out.data() + at, Dtype::float32, w.count, eps});
  x.swap(out);
}

// Each head's halves turned against each other, as by rotate_half of the models.
void turn(std::vector<float>& x, const std::vector<float>& cosine, const std::vector<float>& sine) {
  const size_t size = cosine.size(), half = size / 2;
  for (size_t at = 0; at < x.size(); at += size)
    for (size_t j = 0; j < half; j++) {
      const float low = x[at + j], high = x[at + j + half];
      x[at + j] = low * cosine[j] - high * sine[j];
      x[at + j + half] = high * cosine[j + half] + low * sine[j + half];
    }
}

// The answer of a half: what came in and what was found, in the dtype of both.
void write_sum(const std::vector<float>& x, const std::vector<float>& more, const Any& out, Isa isa) {
  std::vector<float> sum(x.size());
  for (size_t j = 0; j < x.size(); j++) sum[j] = x[j] + more[j];
  MOEQ_PICK(isa, from_float_array)(sum.data(), arguments::dtype_of(out), out.data(), (int64_t)sum.size());
}

std::vector<float> read(const Any& x, int64_t hidden, Isa isa) {
  require((int64_t)x.size() == hidden, "a half takes one token");
  return Numbers(x).floats(isa);
}

// A linear layer: a record, or numbers.
struct Linear {
  Matrix packed{};
  Numbers plain;
  int64_t rows = 0, columns = 0;

  Linear(const ReadOnlyBytes& record, const std::array<int64_t, 5>& form) : rows(form[0]), columns(form[4]) {
    require(form[1] >= 1 && form[1] <= 8 && form[3] >= 0 && form[3] <= 5, "no such matrix");
    packed = matrix_at(record.data(), (int64_t)record.size(), 0, (int)form[1], form[2], (int)form[3], rows, columns);
  }
  explicit Linear(const Any& w) : plain(w), rows((int64_t)w.shape(0)), columns((int64_t)w.shape(1)) {}
};

// Answers of linears of one kind to one vector.
std::vector<std::vector<float>> products(const std::vector<const Linear*>& linears, const std::vector<float>& x, const Run& run) {
  std::vector<std::vector<float>> out;
  LinearJob job{};
  job.x = x.data();
  job.dtype = Dtype::float32;
  job.tokens = 1;
  for (const Linear* each : linears) out.emplace_back((size_t)each->rows);
  for (size_t i = 0; i < linears.size(); i++) {
    const Linear& each = *linears[i];
    if (each.plain.data) {
      dense_linear({each.plain.data, x.data(), out[i].data(), each.plain.dtype, Dtype::float32, each.rows, each.columns, 1}, run);
    } else {
      job.matrices.push_back(each.packed);
      job.y.push_back(out[i].data());
    }
  }
  if (!job.matrices.empty()) linear(job, run);
  return out;
}

// x + o(attention(norm(x))).
class AttentionHalf {
 public:
  AttentionHalf(Any norm, double eps, std::optional<Any> q_norm, std::optional<Any> k_norm, double head_eps, int64_t heads,
                int64_t shared, double scale)
      : norm_(norm), eps_((float)eps), head_eps_((float)head_eps), scale_((float)scale), heads_(heads), shared_(shared) {
    require(heads > 0 && shared > 0 && heads % shared == 0, "heads cannot be shared out");
    require(q_norm.has_value() == k_norm.has_value(), "queries and keys are both normalized or none");
    if (q_norm) q_norm_ = Numbers(*q_norm), k_norm_ = Numbers(*k_norm);
  }

  void add_packed(ReadOnlyBytes record, const std::array<int64_t, 5>& form) { linears_.emplace_back(record, form); }
  void add_plain(Any w) {
    require(w.ndim() == 2, "a linear has a matrix");
    linears_.emplace_back(w);
  }

  // Keys and values of the token are written to place `held` of rooms (1, shared heads, places, size).
  void step(Any x, Any cosine, Any sine, Strided k, Strided v, int64_t held, Any out, bool exact, int threads) const {
    const Run run = arguments::run_of(threads, exact, "");
    const Isa isa = product_isa(run.isa);
    require(linears_.size() == 4, "there are four linears: q, k, v, o");
    const Linear &q = linears_[0], &key = linears_[1], &value = linears_[2], &o = linears_[3];
    require(k.ndim() == 4 && v.ndim() == 4 && k.shape(0) == 1 && v.shape(0) == 1 && k.stride(3) == 1 && v.stride(3) == 1,
            "there is one sequence");
    const int64_t size = (int64_t)k.shape(3), value_size = (int64_t)v.shape(3);
    require(size > 0 && size % kHeadStep == 0 && value_size > 0 && value_size % kHeadStep == 0, "no such head size");
    require((int64_t)k.shape(1) == shared_ && (int64_t)v.shape(1) == shared_, "rooms have other heads");
    require(held >= 0 && held < (int64_t)k.shape(2) && held < (int64_t)v.shape(2), "there is no room");
    require(q.rows == heads_ * size && key.rows == shared_ * size && value.rows == shared_ * value_size && o.columns == heads_ * value_size,
            "linears do not fit the heads");
    require(q.columns == norm_.count && key.columns == norm_.count && value.columns == norm_.count && o.rows == norm_.count,
            "linears do not fit the norm");
    require((int64_t)cosine.size() == size && (int64_t)sine.size() == size, "whole heads are turned");
    require((int64_t)out.size() == norm_.count, "the answer has another size");
    const Dtype dtype = arguments::dtype_of(k);
    require(arguments::dtype_of(v) == dtype, "keys and values have one dtype");
    for (const Numbers* each : {&q_norm_, &k_norm_})
      require(!each->data || each->count == size || each->count == (each == &q_norm_ ? q : key).rows, "norms do not fit the heads");
    const nb::gil_scoped_release unlocked;
    const std::vector<float> in = read(x, norm_.count, isa);
    std::vector<float> normed = in;
    normalize(normed, norm_, eps_, isa);
    std::vector<std::vector<float>> found = products({&q, &key, &value}, normed, run);
    if (q_norm_.data) {
      normalize(found[0], q_norm_, head_eps_, isa);
      normalize(found[1], k_norm_, head_eps_, isa);
    }
    const std::vector<float> c = Numbers(cosine).floats(isa), s = Numbers(sine).floats(isa);
    turn(found[0], c, s);
    turn(found[1], c, s);
    const auto place = [&](const Strided& room, int64_t head, int64_t at) {
      return (char*)room.data() + (head * room.stride(1) + at * room.stride(2)) * (int64_t)size_of(dtype);
    };
    for (int64_t head = 0; head < shared_; head++) {
      MOEQ_PICK(isa, from_float_array)(found[1].data() + head * size, dtype, place(k, head, held), size);
      MOEQ_PICK(isa, from_float_array)(found[2].data() + head * value_size, dtype, place(v, head, held), value_size);
    }
    std::vector<float> answer((size_t)(heads_ * value_size));
    AttentionJob job{};
    job.q = found[0].data();
    job.k = k.data();
    job.v = v.data();
    job.out = answer.data();
    job.dtype = dtype;
    job.q_dtype = Dtype::float32;
    job.batch = 1;
    job.heads = heads_;
    job.shared = shared_;
    job.size = size;
    job.value_size = value_size;
    job.count = held + 1;
    for (int i = 0; i < 3; i++) {
      job.k_steps[i] = k.stride((size_t)i);
      job.v_steps[i] = v.stride((size_t)i);
    }
    job.scale = scale_;
    attention(job, run);
    write_sum(in, products({&o}, answer, run)[0], out, isa);
  }

 private:
  Numbers norm_, q_norm_, k_norm_;
  float eps_, head_eps_, scale_;
  int64_t heads_, shared_;
  std::vector<Linear> linears_;
};

using Integers = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;

// x + experts(router(norm(x))).
class ExpertsHalf {
 public:
  ExpertsHalf(Any norm, double eps, Any router, int64_t top_k, bool normalized, ReadOnlyBytes data, Integers table, int64_t inner)
      : norm_(norm), router_(router), eps_((float)eps), normalized_(normalized) {
    require(router.ndim() == 2 && (int64_t)router.shape(1) == norm_.count, "the router does not fit the norm");
    require(table.ndim() == 3 && table.shape(1) == 3 && table.shape(2) == 4 && table.shape(0) == router.shape(0),
            "the table does not fit the router");
    require(top_k > 0 && top_k <= kMostChosen && top_k <= (int64_t)router.shape(0), "no such number of experts");
    require(inner > 0, "no such shape");
    job_.data = data.data();
    job_.size = (int64_t)data.size();
    job_.table = table.data();
    job_.num_experts = (int64_t)router.shape(0);
    job_.hidden = norm_.count;
    job_.inner = inner;
    job_.tokens = 1;
    job_.top_k = top_k;
    job_.dtype = job_.weight_dtype = Dtype::float32;
  }

  void step(Any x, Any out, bool exact, int threads) const {
    const Run run = arguments::run_of(threads, exact, "");
    const Isa isa = product_isa(run.isa);
    require((int64_t)out.size() == norm_.count, "the answer has another size");
    const nb::gil_scoped_release unlocked;
    const std::vector<float> in = read(x, norm_.count, isa);
    std::vector<float> normed = in, answer(in.size()), logits((size_t)job_.num_experts);
    normalize(normed, norm_, eps_, isa);
    dense_linear({router_.data, normed.data(), logits.data(), router_.dtype, Dtype::float32, job_.num_experts, norm_.count, 1}, run);
    const Scratch scratch((size_t)(2 * (job_.num_experts + kHeadStep)) * sizeof(float));
    float weight[kMostChosen];
    int64_t index[kMostChosen];
    MOEQ_PICK(isa, choose)
    ({logits.data(), Dtype::float32, job_.num_experts, job_.top_k, normalized_, scratch.floats(), weight, index});
    ExpertsJob job = job_;
    job.x = normed.data();
    job.y = answer.data();
    job.index = index;
    job.weight = weight;
    experts(job, run);
    write_sum(in, answer, out, isa);
  }

 private:
  Numbers norm_, router_;
  float eps_;
  bool normalized_;
  ExpertsJob job_{};
};

}  // namespace

void add_layer(nb::module_& module) {
  nb::class_<AttentionHalf>(module, "AttentionHalf", "x + o(attention(norm(x))) for one token.")
      .def(nb::init<Any, double, std::optional<Any>, std::optional<Any>, double, int64_t, int64_t, double>(), "norm"_a, "eps"_a,
           nb::arg("q_norm").none(), nb::arg("k_norm").none(), "head_eps"_a, "heads"_a, "shared"_a, "scale"_a)
      .def("add_packed", &AttentionHalf::add_packed, "record"_a, "form"_a)
      .def("add_plain", &AttentionHalf::add_plain, nb::arg("w").noconvert())
      .def("step", &AttentionHalf::step, nb::arg("x").noconvert(), nb::arg("cosine").noconvert(), nb::arg("sine").noconvert(),
           nb::arg("k").noconvert(), nb::arg("v").noconvert(), "held"_a, nb::arg("out").noconvert(), "exact"_a, "threads"_a);
  nb::class_<ExpertsHalf>(module, "ExpertsHalf", "x + experts(router(norm(x))) for one token.")
      .def(nb::init<Any, double, Any, int64_t, bool, ReadOnlyBytes, Integers, int64_t>(), "norm"_a, "eps"_a, "router"_a, "top_k"_a,
           "normalized"_a, "data"_a, "table"_a, "inner"_a)
      .def("step", &ExpertsHalf::step, nb::arg("x").noconvert(), nb::arg("out").noconvert(), "exact"_a, "threads"_a);
}

}  // namespace moeq

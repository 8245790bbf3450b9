// moeq._native: checks buffers, lets go of the interpreter lock, runs the kernel. Callers are in src/moeq/native.py,
// which checks options; here only what would corrupt memory is checked.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "decoding.h"
#include "dense_calls.h"
#include "experts.h"
#include "isa.h"
#include "layer.h"
#include "layouts.h"
#include "packing.h"
#include "rounding.h"
#include "threads.h"
#include "trellis.h"

namespace nb = nanobind;
using namespace nb::literals;

using namespace moeq::arguments;

namespace {

std::vector<std::string> isas() {
  std::vector<std::string> names;
  if (moeq::runs(moeq::Isa::avx512)) names.push_back("avx512");
  if (moeq::runs(moeq::Isa::avx2)) names.push_back("avx2");
  names.push_back("base");
  return names;
}

struct Freed {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

bool round_matrix(Any w, Bytes codes, Any scale, Any zero, int fit, int bits, int levels, int64_t group_size,
                  const std::vector<double>& ratios, int refits, int iterations, double p, double beta, double growth,
                  double settled, bool gain, const std::string& isa) {
  require(w.ndim() == 2 && codes.ndim() == 2, "weights and codes are matrices");
  const int64_t rows = (int64_t)w.shape(0), columns = (int64_t)w.shape(1);
  require(rows > 0 && columns > 0 && columns < (1 << 30), "the matrix is empty or too wide");
  require((int64_t)codes.shape(0) == rows && (int64_t)codes.shape(1) == columns, "codes have another shape");
  require(fit >= 0 && fit <= 2 && levels >= 0 && levels <= 3 && bits >= 1 && bits <= 8, "no such rounding");
  require(fit == 0 || !ratios.empty(), "a search needs candidates");
  require(group_size > 0, "groups cannot be empty");
  if (group_size > columns) group_size = columns;
  const size_t groups = (size_t)(rows * ((columns + group_size - 1) / group_size));
  require(scale.size() == groups && scale.itemsize() == 2, "scales have another shape or dtype");
  const size_t zero_bytes = levels == 0 ? 1 : levels == 1 ? 2 : 0;
  require(!zero_bytes || (zero.size() == groups && zero.itemsize() == zero_bytes), "zeros have another shape or dtype");
  moeq::RoundingJob job{};
  job.settings.fit = (moeq::Fit)fit;
  job.settings.bits = bits;
  job.settings.levels = (moeq::Levels)levels;
  job.settings.ratios = ratios.data();
  job.settings.num_ratios = (int)ratios.size();
  job.settings.refits = refits;
  job.settings.iterations = iterations;
  job.settings.p = p;
  job.settings.beta = beta;
  job.settings.growth = growth;
  job.settings.settled = (float)settled;
  job.settings.gain = gain;
  job.w = w.data();
  job.dtype = dtype_of(w);
  job.rows = rows;
  job.columns = columns;
  job.group_size = group_size;
  job.codes = codes.data();
  job.scale = (uint16_t*)scale.data();
  job.zero = zero.data();
  const moeq::Isa chosen = isa_of(isa);
  const nb::gil_scoped_release unlocked;
  const std::unique_ptr<void, Freed> scratch(
      ::operator new(moeq::rounding_scratch(group_size), std::align_val_t{64}));
  job.scratch = scratch.get();
  return MOEQ_PICK(chosen, round_matrix)(job);
}

size_t plane_bytes(int64_t rows, int64_t columns, int width) {
  const int64_t blocks = columns / moeq::kBlock, tail = columns % moeq::kBlock;
  return (size_t)(rows * (blocks * (moeq::kBlock / 8 * width) + (tail + 7) / 8 * width));
}

void pack_plane(Bytes codes, int width, int shift, Bytes out, const std::string& isa) {
  require(codes.ndim() == 2, "codes are a matrix");
  require(width == 1 || width == 2 || width == 4 || width == 8, "no such plane");
  require(shift >= 0 && shift < 8, "no such shift");
  const int64_t rows = (int64_t)codes.shape(0), columns = (int64_t)codes.shape(1);
  require(out.size() == plane_bytes(rows, columns, width), "the plane has another size");
  const moeq::PackJob job{codes.data(), rows, columns, width, shift, out.data()};
  const moeq::Isa chosen = isa_of(isa);
  const nb::gil_scoped_release unlocked;
  MOEQ_PICK(chosen, pack_plane)(job);
}

void decode_matrix(ReadOnlyBytes record, const std::vector<std::tuple<int, int64_t>>& planes, int64_t scales,
                   int64_t zeros, int bits, int levels, int64_t group_size, Any w, int threads,
                   const std::string& isa) {
  require(w.ndim() == 2, "weights are a matrix");
  const int64_t rows = (int64_t)w.shape(0), columns = (int64_t)w.shape(1), size = (int64_t)record.size();
  require(levels >= 0 && levels <= 3 && bits >= 1 && bits <= 8 && group_size > 0, "no such matrix");
  require(!planes.empty() && planes.size() <= 2, "there are one or two planes");
  const auto inside = [size](int64_t offset, size_t bytes, size_t step) {
    require(offset >= 0 && offset % (int64_t)step == 0 && offset <= size && bytes <= (size_t)(size - offset),
            "the record ends before its parts");
  };
  moeq::DecodeJob job{};
  for (const auto& [width, offset] : planes) {
    require(width == 1 || width == 2 || width == 4 || width == 8, "no such plane");
    inside(offset, plane_bytes(rows, columns, width), 1);
    job.planes[job.num_planes++] = {record.data() + offset, width};
  }
  const size_t groups = (size_t)(rows * ((columns + group_size - 1) / group_size));
  inside(scales, 2 * groups, 2);
  inside(zeros, groups * (levels == 0 ? 1 : levels == 1 ? 2 : 0), levels == 1 ? 2 : 1);
  require((uintptr_t)record.data() % 2 == 0, "the record is not aligned");
  job.scale = (const uint16_t*)(record.data() + scales);
  job.zero = record.data() + zeros;
  job.levels = (moeq::Levels)levels;
  job.bits = bits;
  job.rows = rows;
  job.columns = columns;
  job.group_size = group_size;
  job.w = w.data();
  job.dtype = dtype_of(w);
  const moeq::Run run = run_of(threads, true, isa);
  const nb::gil_scoped_release unlocked;
  moeq::decode(job, run);
}

void decode_rows(ReadOnlyBytes record, int64_t rows, int bits, int levels, int64_t group_size, int64_t first, Any w,
                 int threads, const std::string& isa) {
  require(w.ndim() == 2, "weights are a matrix");
  const int64_t count = (int64_t)w.shape(0);
  const moeq::Matrix matrix = moeq::matrix_at(record.data(), (int64_t)record.size(), 0, bits, group_size, levels,
                                              rows, (int64_t)w.shape(1));
  require(levels >= (int)moeq::Levels::vector, "scalar levels are decoded by decode_matrix");
  require(first >= 0 && count <= rows && first <= rows - count, "there are no such rows");
  const moeq::LookUpJob job{&matrix, first, first + count, w.data(), dtype_of(w)};
  const moeq::Run run = run_of(threads, true, isa);
  const nb::gil_scoped_release unlocked;
  moeq::look_up(job, run);
}

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ReadOnlyFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

void trellis_columns(int bits, Floats w, ReadOnlyFloats scale, ReadOnlyFloats upper, Bytes codes, Floats error,
                     const std::string& isa) {
  require(bits >= 1 && bits <= 4, "no such trellis");
  require(w.ndim() == 2 && w.shape(0) > 0 && w.shape(1) > 0, "weights are a matrix");
  const size_t count = w.shape(0), rows = w.shape(1);
  const auto alike = [&](const auto& other) { return other.ndim() == 2 && other.shape(0) == count && other.shape(1) == rows; };
  require(alike(scale) && alike(codes) && alike(error), "scales, codes and errors are shaped like the weights");
  require(upper.ndim() == 2 && upper.shape(0) == count && upper.shape(1) == count, "there is a factor for each pair");
  const moeq::TrellisJob job{bits, (int64_t)count, (int64_t)rows, w.data(), scale.data(), upper.data(), codes.data(), error.data()};
  const moeq::Isa chosen = isa_of(isa);
  const nb::gil_scoped_release unlocked;
  MOEQ_PICK(chosen, trellis_columns)(job);
}

void linear(const std::vector<ReadOnlyBytes>& records, const std::vector<std::array<int64_t, 4>>& forms, Any x,
            const std::vector<Any>& y, bool exact, int threads, const std::string& isa) {
  require(x.ndim() == 2 && records.size() == forms.size() && records.size() == y.size(), "there is a form and an answer for each record");
  moeq::LinearJob job{};
  job.dtype = dtype_of(x);
  job.x = x.data();
  job.tokens = (int64_t)x.shape(0);
  for (size_t i = 0; i < records.size(); i++) {
    const auto& [rows, bits, group_size, levels] = forms[i];
    require(bits >= 1 && bits <= 8 && levels >= 0 && levels <= 5, "no such matrix");
    job.matrices.push_back(moeq::matrix_at(records[i].data(), (int64_t)records[i].size(), 0, (int)bits, group_size,
                                           (int)levels, rows, (int64_t)x.shape(1)));
    require(y[i].ndim() == 2 && y[i].shape(0) == x.shape(0) && (int64_t)y[i].shape(1) == rows, "y has another shape");
    require(dtype_of(y[i]) == job.dtype, "x and y have different dtypes");
    job.y.push_back(y[i].data());
  }
  const moeq::Run run = run_of(threads, exact, isa);
  const nb::gil_scoped_release unlocked;
  moeq::linear(job, run);
}

using Integers = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using ShortIntegers = nb::ndarray<const int16_t, nb::c_contig, nb::device::cpu>;

// What all layouts have in common; the layer's blob and table are the caller's.
moeq::ExpertsJob routed(ReadOnlyBytes data, int64_t num_experts, int64_t inner, Any x, Integers index, Any weight, Any y) {
  require(x.ndim() == 2 && y.ndim() == 2 && x.shape(0) == y.shape(0) && x.shape(1) == y.shape(1), "y is shaped like x");
  require(index.ndim() == 2 && index.shape(0) == x.shape(0), "there is a row of experts for each token");
  require(weight.ndim() == 2 && weight.shape(0) == index.shape(0) && weight.shape(1) == index.shape(1),
          "there is a weight for each choice");
  require(inner > 0 && x.shape(1) > 0, "no such shape");
  moeq::ExpertsJob job{};
  job.data = data.data();
  job.size = (int64_t)data.size();
  job.num_experts = num_experts;
  job.hidden = (int64_t)x.shape(1);
  job.inner = inner;
  job.tokens = (int64_t)x.shape(0);
  job.top_k = (int64_t)index.shape(1);
  job.dtype = dtype_of(x);
  require(dtype_of(y) == job.dtype, "x and y have different dtypes");
  job.x = x.data();
  job.y = y.data();
  job.index = index.data();
  job.weight = weight.data();
  job.weight_dtype = dtype_of(weight);
  return job;
}

void experts(ReadOnlyBytes data, Integers table, int64_t inner, Any x, Integers index, Any weight, Any y, bool exact,
             int threads, const std::string& isa) {
  require(table.ndim() == 3 && table.shape(1) == 3 && table.shape(2) == 4, "the table is (experts, 3, 4)");
  moeq::ExpertsJob job = routed(data, (int64_t)table.shape(0), inner, x, index, weight, y);
  job.table = table.data();
  const moeq::Run run = run_of(threads, exact, isa);
  const nb::gil_scoped_release unlocked;
  moeq::experts(job, run);
}

void spectral_experts(ReadOnlyBytes data, Integers table, Integers starts, ShortIntegers order, int64_t inner, Any x,
                      Integers index, Any weight, Any y, bool exact, int threads, const std::string& isa) {
  require(table.ndim() == 3 && table.shape(0) == 3 && table.shape(1) == 8 && table.shape(2) == 5,
          "the table is (3, 8, 5)");
  require(order.ndim() == 3 && order.shape(0) == 3, "the order is (3, experts, directions)");
  require(starts.ndim() == 3 && starts.shape(0) == 3 && starts.shape(1) == 7 && starts.shape(2) == order.shape(1) + 1,
          "starts are (3, 7, experts + 1)");
  moeq::SpectralJob job{};
  job.routed = routed(data, (int64_t)order.shape(1), inner, x, index, weight, y);
  job.table = table.data();
  job.starts = starts.data();
  job.order = order.data();
  job.directions = (int64_t)order.shape(2);
  const moeq::Run run = run_of(threads, exact, isa);
  const nb::gil_scoped_release unlocked;
  moeq::spectral_experts(job, run);
}

void tiled_experts(ReadOnlyBytes data, Integers table, ReadOnlyBytes sides, Integers tiles, int64_t inner, Any x,
                   Integers index, Any weight, Any y, bool exact, int threads, const std::string& isa) {
  require(table.ndim() == 3 && table.shape(1) == 3 && table.shape(2) == 4, "the table is (experts, 3, 4)");
  require(tiles.ndim() == 2 && tiles.shape(0) == 3 && tiles.shape(1) == 8, "the tiles are (3, 8)");
  moeq::TiledJob job{};
  job.routed = routed(data, (int64_t)table.shape(0), inner, x, index, weight, y);
  job.routed.table = table.data();
  job.sides = sides.data();
  job.sides_size = (int64_t)sides.size();
  job.tiles = tiles.data();
  const moeq::Run run = run_of(threads, exact, isa);
  const nb::gil_scoped_release unlocked;
  moeq::tiled_experts(job, run);
}

double read_bandwidth(ReadOnlyBytes data, int threads, const std::string& isa) {
  const moeq::Run run = run_of(threads, false, isa);
  const nb::gil_scoped_release unlocked;
  return moeq::read_bandwidth(data.data(), data.size(), run);
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Compiled kernels; use them through moeq.native.";
  module.def("isas", &isas, "Instruction sets that run here, best first.");
  module.def("worth_it", &moeq::worth_it, "Whether these kernels are faster than torch on this machine.");
  // Without noconvert a buffer of another layout would be copied, and the results written into the copy.
  module.def("round_matrix", &round_matrix, nb::arg("w").noconvert(), nb::arg("codes").noconvert(),
             nb::arg("scale").noconvert(), nb::arg("zero").noconvert(), nb::kw_only(), "fit"_a, "bits"_a,
             "levels"_a, "group_size"_a, "ratios"_a, "refits"_a, "iterations"_a, "p"_a, "beta"_a, "growth"_a,
             "settled"_a, "gain"_a, "isa"_a = "",
             "Round a matrix into codes, scale and zero; False if a weight is not finite.");
  module.def("pack_plane", &pack_plane, nb::arg("codes").noconvert(), "width"_a, "shift"_a, nb::arg("out").noconvert(),
             nb::kw_only(), "isa"_a = "",
             "Pack some bits of every code.");
  module.def("decode_matrix", &decode_matrix, nb::arg("record").noconvert(), "planes"_a, "scales"_a, "zeros"_a,
             nb::kw_only(), "bits"_a, "levels"_a, "group_size"_a, nb::arg("w").noconvert(), "threads"_a = 1, "isa"_a = "",
             "Decode a matrix record into weights; planes are (width, offset).");
  module.def("decode_rows", &decode_rows, nb::arg("record").noconvert(), "rows"_a, "bits"_a, "levels"_a, "group_size"_a,
             "first"_a, nb::arg("w").noconvert(), "threads"_a = 1, "isa"_a = "",
             "Decode rows of a matrix record in codebooks or of a trellis into weights.");
  module.def("trellis_columns", &trellis_columns, "bits"_a, nb::arg("w").noconvert(), nb::arg("scale").noconvert(),
             nb::arg("upper").noconvert(), nb::arg("codes").noconvert(), nb::arg("error").noconvert(), "isa"_a = "",
             "Round columns one after the other by Viterbi's search, with error feedback.");
  module.def("linear", &linear, "records"_a, "forms"_a, nb::arg("x").noconvert(), "y"_a, "exact"_a, "threads"_a,
             "isa"_a = "", "y = x W^T for matrix records that meet the same few rows of x; forms are (rows, bits, group size, levels).");
  module.def("experts", &experts, nb::arg("data").noconvert(), nb::arg("table").noconvert(), "inner"_a,
             nb::arg("x").noconvert(), nb::arg("index").noconvert(), nb::arg("weight").noconvert(),
             nb::arg("y").noconvert(), "exact"_a, "threads"_a, "isa"_a = "",
             "The routed experts of a layer, gated by SiLU, few tokens.");
  module.def("spectral_experts", &spectral_experts, nb::arg("data").noconvert(), nb::arg("table").noconvert(),
             nb::arg("starts").noconvert(), nb::arg("order").noconvert(), "inner"_a, nb::arg("x").noconvert(),
             nb::arg("index").noconvert(), nb::arg("weight").noconvert(), nb::arg("y").noconvert(), "exact"_a,
             "threads"_a, "isa"_a = "", "As experts, for the layout spectral.");
  module.def("tiled_experts", &tiled_experts, nb::arg("data").noconvert(), nb::arg("table").noconvert(),
             nb::arg("sides").noconvert(), nb::arg("tiles").noconvert(), "inner"_a, nb::arg("x").noconvert(),
             nb::arg("index").noconvert(), nb::arg("weight").noconvert(), nb::arg("y").noconvert(), "exact"_a,
             "threads"_a, "isa"_a = "", "As experts, for the layout tiled.");
  module.def("read_bandwidth", &read_bandwidth, nb::arg("data").noconvert(), "threads"_a, "isa"_a = "",
             "Bytes per second of reading a buffer once.");
  moeq::add_dense(module);
  moeq::add_layer(module);
  module.def("borrows_threads", &moeq::borrows_threads, "Whether threads are those of the process's OpenMP runtime.");
}

// What functions of the extension do with their arguments before they let go of the interpreter lock.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "experts.h"
#include "isa.h"
#include "types.h"

namespace moeq::arguments {

namespace nb = nanobind;

using Any = nb::ndarray<nb::c_contig, nb::device::cpu>;
using ReadOnlyBytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<uint8_t, nb::c_contig, nb::device::cpu>;

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

inline Isa isa_of(const std::string& name) {
  const Isa isa = name.empty()       ? best_isa()
                  : name == "avx512" ? Isa::avx512
                  : name == "avx2"   ? Isa::avx2
                                     : Isa::base;
  require(name.empty() || name == "avx512" || name == "avx2" || name == "base", "no such instruction set");
  require(runs(isa), "this machine lacks the instruction set");
  return isa;
}

inline Run run_of(int threads, bool exact, const std::string& isa) {
  require(threads >= 1 && threads <= 4096, "no such number of threads");
  return {isa_of(isa), threads, exact};
}

template <class Array>
Dtype dtype_of(const Array& w) {
  if (w.dtype() == nb::dtype<float>()) return Dtype::float32;
  const nb::dlpack::dtype dtype = w.dtype();
  require(dtype.bits == 16 && dtype.lanes == 1, "weights must be float32, bfloat16 or float16");
  if (dtype.code == (uint8_t)nb::dlpack::dtype_code::Bfloat) return Dtype::bfloat16;
  require(dtype.code == (uint8_t)nb::dlpack::dtype_code::Float, "weights must be float32, bfloat16 or float16");
  return Dtype::float16;
}

}  // namespace moeq::arguments

// What is not packed, for few tokens, on several threads. The arithmetic is in dense.h.
#pragma once

#include <nanobind/nanobind.h>

namespace moeq {

// Adds dense_linear, attention and rms_norm to the extension.
void add_dense(nanobind::module_& module);

}  // namespace moeq

// What is not packed, as functions of the extension.
#pragma once

#include <nanobind/nanobind.h>

namespace moeq {

// Adds dense_linear, attention, rms_norm and choose to the extension.
void add_dense(nanobind::module_& module);

}  // namespace moeq

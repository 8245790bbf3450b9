// One token through the two halves of a decoder layer of the usual kind, in one call each: what a model's own modules do
// in fifty small ones. Sums and everything between them are float32. The truth are the modules themselves, which are asked
// by numbers before this serves (src/moeq/runtime/whole_layers.py).
#pragma once

#include <nanobind/nanobind.h>

namespace moeq {

// Adds AttentionHalf and ExpertsHalf to the extension.
void add_layer(nanobind::module_& module);

}  // namespace moeq

// What kernels share with their callers.
#pragma once

namespace moeq {

enum class Dtype { float32, bfloat16, float16 };
enum class Levels { asym, asym16, sym, half, vector, trellis };

constexpr int kBlock = 128;  // codes of a row that are interleaved together in a plane

}  // namespace moeq

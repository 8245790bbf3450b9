// Whole layers of the layouts "spectral" and "tiled" (docs/format.md) for few tokens, as experts.h is for "grouped".
#pragma once

#include <cstdint>

#include "experts.h"

namespace moeq {

constexpr int kSlabs = 7;  // widths of components
constexpr int kProjections = 3;

// Experts as components of shared bases. `routed` has the blob, but no table.
struct SpectralJob {
  ExpertsJob routed;
  const int64_t* table;   // projections x (1 + slabs) x (offset, bits, group size, levels, rows): basis, then slabs
  const int64_t* starts;  // projections x slabs x (experts + 1): first row of each expert
  const int16_t* order;   // projections x experts x directions: those of the expert's components
  int64_t directions;
};

// Experts as residuals, which are `routed`, and shared low-rank factors.
struct TiledJob {
  ExpertsJob routed;
  const uint8_t* sides;
  int64_t sides_size;
  const int64_t* tiles;  // projections x (offset, rank, rows, columns, scales, orders, block, plain)
};

// Both throw std::invalid_argument for what points outside its blob.
void spectral_experts(const SpectralJob& job, const Run& run);
void tiled_experts(const TiledJob& job, const Run& run);

}  // namespace moeq

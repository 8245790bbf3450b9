// See trellis.h. Viterbi's search down a column, for all histories at once in lanes, and the error feedback of GPTQ from
// one column to the next.
#include "lanes.h"
#include "trellis.h"
#include "trellis_tables.h"

namespace moeq::MOEQ_ISA {
namespace {

// The last kHistory lowest bits, the newest lowest, are a history; lanes are histories. What leads to one comes from
// either of two, and the parities of both and of the new bit name the subset of levels that it takes.
template <int kBits>
struct Search {
  static constexpr int kStates = 1 << kHistory[kBits], kVectors = kStates / kLanes, kHalf = 1 << (kBits - 1);
  static constexpr int kSubsets = 1 << kParities[kBits];
  static_assert(kVectors >= 2 && kSubsets <= kLanes, "lanes are named so");

  F levels[kHalf];                // of the subset in each lane, by the upper bits of a code
  I subset[kVectors][2];          // what leads to the history in a lane from that whose oldest bit is 0 or 1
  uint8_t subset_of[2][kStates];  // the same
  F cost[kVectors];
  // Of every row: which histories come from one whose oldest bit is 1, and the best upper bits for each subset.
  struct Step {
    uint64_t from_old;
    uint8_t upper[kLanes];
  };
  Step* steps;

  explicit Search(int64_t rows) : steps(new Step[(size_t)rows]) {
    for (int high = 0; high < kHalf; high++) {
      alignas(64) float lanes[kLanes];
      for (int lane = 0; lane < kLanes; lane++)
        lanes[lane] = (float)kTrellis[kBits][high * kSubsets + lane % kSubsets];
      levels[high] = load(lanes);
    }
    for (int old = 0; old < 2; old++) {
      alignas(64) int32_t lanes[kStates];
      for (int to = 0; to < kStates; to++) {
        int found = 0;
        for (int at = 0; at < kParities[kBits]; at++)
          found |= __builtin_parity((unsigned)((old * kStates + to) & kTaps[kBits][at])) << at;
        lanes[to] = found;
        subset_of[old][to] = (uint8_t)found;
      }
      for (int v = 0; v < kVectors; v++) subset[v][old] = load_int(lanes + v * kLanes);
    }
  }

  ~Search() { delete[] steps; }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;

  // Costs of the histories that lanes of vector v come from, the oldest bit being `old`.
  MOEQ_INLINE F before(const F* was, int v, int old) {
    const I bits = bits_of(was[old * (kVectors / 2) + v / 2]);
    return float_of(v % 2 ? zip_high(bits, bits) : zip_low(bits, bits));
  }

  void step(float w, float scale, int64_t n) {
    F was[kVectors];
    for (int v = 0; v < kVectors; v++) was[v] = cost[v];
    const F target = all(w), factor = all(-scale);
    const F first = fma(factor, levels[0], target);
    F least = first * first;
    I which = all_int(0);
#pragma GCC unroll 8
    for (int high = 1; high < kHalf; high++) {
      const F off = fma(factor, levels[high], target), tried = off * off;
      const I lower = less(tried, least);
      least = select(lower, tried, least);
      which = (lower & all_int(high)) | (~lower & which);
    }
    alignas(64) int32_t lanes[kLanes];
    store(lanes, which);
    for (int lane = 0; lane < kLanes; lane++) steps[n].upper[lane] = (uint8_t)lanes[lane];
    uint64_t old = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      const F without = before(was, v, 0) + look_up(least, subset[v][0]);
      const F with = before(was, v, 1) + look_up(least, subset[v][1]);
      old |= (uint64_t)lanes_of(less(with, without)) << (v * kLanes);
      cost[v] = min(with, without);
    }
    steps[n].from_old = old;
  }

  // Codes of a column, and the levels that they name.
  void run(const float* w, const float* scale, int64_t count, uint8_t* codes, float* level) {
    alignas(64) float costs[kStates];
    for (int state = 0; state < kStates; state++) costs[state] = state ? 1e30f : 0.0f;
    for (int v = 0; v < kVectors; v++) cost[v] = load(costs + v * kLanes);
    for (int64_t n = 0; n < count; n++) step(w[n], scale[n], n);
    for (int v = 0; v < kVectors; v++) store(costs + v * kLanes, cost[v]);
    int state = 0;
    for (int other = 1; other < kStates; other++)
      if (costs[other] < costs[state]) state = other;
    for (int64_t n = count - 1; n >= 0; n--) {
      const int old = (int)(steps[n].from_old >> state & 1), found = subset_of[old][state], high = steps[n].upper[found];
      codes[n] = (uint8_t)(high << 1 | (state & 1));
      level[n] = (float)kTrellis[kBits][high * kSubsets + found];
      state = (old * kStates + state) / 2;
    }
  }
};

template <int kBits>
void columns(const TrellisJob& job) {
  Search<kBits> search(job.rows);
  for (int64_t j = 0; j < job.count; j++) {
    float* w = job.w + j * job.rows;
    const float* scale = job.scale + j * job.rows;
    float* error = job.error + j * job.rows;
    const float pivot = job.upper[j * job.count + j];
    // Levels first, where errors will be.
    search.run(w, scale, job.rows, job.codes + j * job.rows, error);
    for (int64_t n = 0; n < job.rows; n++) error[n] = (w[n] - scale[n] * error[n]) / pivot;
    for (int64_t k = j + 1; k < job.count; k++) {
      const float share = job.upper[j * job.count + k];
      if (share == 0.0f) continue;
      float* later = job.w + k * job.rows;
      for (int64_t n = 0; n < job.rows; n++) later[n] -= share * error[n];
    }
  }
}

}  // namespace

void trellis_columns(const TrellisJob& job) {
  switch (job.bits) {
    case 1:
      return columns<1>(job);
    case 2:
      return columns<2>(job);
    case 3:
      return columns<3>(job);
    default:
      return columns<4>(job);
  }
}

}  // namespace moeq::MOEQ_ISA

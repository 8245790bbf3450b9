// See trellis.h. Viterbi's search down a column, for all histories at once in lanes, and the error feedback of GPTQ from
// one column to the next. Restarts cut a column into runs that have nothing to do with each other.
#include "lanes.h"
#include "trellis.h"
#include "trellis_tables.h"

namespace moeq::MOEQ_ISA {
namespace {

// Histories are lanes, 16 or 32 of them; where there are fewer, the oldest bits of a history choose nothing.
template <int kVectors, int kBits>
struct Search {
  static constexpr int kStates = kVectors * kLanes, kHalf = 1 << (kBits - 1);
  // What leads to a history: the oldest bit that it forgets, and the upper bits of the code; entries by lane.
  F entries[kVectors][2][kHalf];
  I chosen[kRestart][kVectors];
  F cost[kVectors];

  Search() {
    const int known = (1 << kHistory[kBits]) - 1;
    for (int v = 0; v < kVectors; v++)
      for (int old = 0; old < 2; old++)
        for (int high = 0; high < kHalf; high++) {
          alignas(64) float lanes[kLanes];
          for (int lane = 0; lane < kLanes; lane++) {
            const int to = v * kLanes + lane, from = (old * kStates + to) / 2;
            lanes[lane] = (float)kTrellis[kBits][(from & known) << kBits | high << 1 | (to & 1)] / 32.0f;
          }
          entries[v][old][high] = load(lanes);
        }
  }

  // Costs of the histories that lanes of vector v come from, the oldest bit being `old`.
  MOEQ_INLINE F before(const F* was, int v, int old) {
    const F from = kVectors == 1 ? was[0] : was[old];
    const I bits = bits_of(from);
    const bool high = kVectors == 1 ? old : v;
    return float_of(high ? zip_high(bits, bits) : zip_low(bits, bits));
  }

  void step(float w, float scale, int64_t n) {
    F was[kVectors];
    for (int v = 0; v < kVectors; v++) was[v] = cost[v];
    const F target = all(w), factor = all(-scale);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      F best = all(0.0f);
      I which = all_int(0);
#pragma GCC unroll 2
      for (int old = 0; old < 2; old++) {
        const F from = before(was, v, old);
#pragma GCC unroll 8
        for (int high = 0; high < kHalf; high++) {
          const F off = fma(factor, entries[v][old][high], target);
          const F tried = fma(off, off, from);
          const int at = old * kHalf + high;
          if (at == 0) {
            best = tried;
            continue;
          }
          const I lower = less(tried, best);
          best = select(lower, tried, best);
          which = (lower & all_int(at)) | (~lower & which);
        }
      }
      cost[v] = best;
      chosen[n][v] = which;
    }
  }

  // Codes of a run of at most kRestart rows.
  void run(const float* w, const float* scale, int64_t count, uint8_t* codes) {
    alignas(64) float costs[kStates];
    for (int state = 0; state < kStates; state++) costs[state] = state ? 1e30f : 0.0f;
    for (int v = 0; v < kVectors; v++) cost[v] = load(costs + v * kLanes);
    for (int64_t n = 0; n < count; n++) step(w[n], scale[n], n);
    for (int v = 0; v < kVectors; v++) store(costs + v * kLanes, cost[v]);
    int state = 0;
    for (int other = 1; other < kStates; other++)
      if (costs[other] < costs[state]) state = other;
    for (int64_t n = count - 1; n >= 0; n--) {
      alignas(64) int32_t lanes[kLanes];
      store(lanes, chosen[n][state / kLanes]);
      const int at = lanes[state % kLanes];
      codes[n] = (uint8_t)((at & (kHalf - 1)) << 1 | (state & 1));
      state = (at / kHalf * kStates + state) / 2;
    }
  }
};

template <int kVectors, int kBits>
void columns(const TrellisJob& job) {
  Search<kVectors, kBits> search;
  const int known = (1 << kHistory[kBits]) - 1;
  for (int64_t j = 0; j < job.count; j++) {
    float* w = job.w + j * job.rows;
    const float* scale = job.scale + j * job.rows;
    uint8_t* codes = job.codes + j * job.rows;
    float* error = job.error + j * job.rows;
    const float pivot = job.upper[j * job.count + j];
    for (int64_t start = 0; start < job.rows; start += kRestart) {
      const int64_t left = job.rows - start, count = left < kRestart ? left : kRestart;
      search.run(w + start, scale + start, count, codes + start);
      int history = 0;
      for (int64_t n = start; n < start + count; n++) {
        const int code = codes[n];
        error[n] = (w[n] - scale[n] * ((float)kTrellis[kBits][history << kBits | code] / 32.0f)) / pivot;
        history = (history << 1 | (code & 1)) & known;
      }
    }
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
      return columns<2, 1>(job);
    case 2:
      return columns<1, 2>(job);
    case 3:
      return columns<1, 3>(job);
    default:
      return columns<1, 4>(job);
  }
}

}  // namespace moeq::MOEQ_ISA

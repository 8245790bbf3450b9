// See rounding.h. Sixteen groups are worked on at once, one per lane, so that neither sums nor the arithmetic on
// scales and zeros ever cross lanes. Their weights lie transposed in `v`: v[j] holds weight j of each group.
#include "rounding.h"

#include "gather.h"
#include "lanes.h"

namespace moeq::MOEQ_ISA {
namespace {

constexpr float kScaleMax = 65504.0f;
constexpr float kScaleMin = 0x1p-24f;
constexpr float kNothing = 0x1p-26f;
constexpr float kGainMin = 0.5f;
constexpr float kGainMax = 2.0f;

// The level set as numbers, broadcast; moeq.quantizers.levels.Levels.
struct Set {
  F top;
  F shared_zero;    // the zero of all groups, unless `stores`
  F zero_step;      // asym only
  F per_zero_step;  // asym only
  bool stores;  // each group has a zero of its own
  bool bytes;   // and stores it in 8 bits
  bool is_signed;
};

Set make_set(const RoundingSettings& settings) {
  Set set;
  const int top = (1 << settings.bits) - 1;
  const double step = top / 255.0;
  set.top = all((float)top);
  set.stores = settings.levels == Levels::asym || settings.levels == Levels::asym16;
  set.bytes = settings.levels == Levels::asym;
  set.is_signed = settings.levels == Levels::sym;
  set.shared_zero = all(set.is_signed ? (float)(1 << (settings.bits - 1)) : (float)top / 2);
  set.zero_step = all((float)step);
  set.per_zero_step = all((float)(1 / step));
  return set;
}

MOEQ_INLINE F zero_byte(const Set& set, F zero) {
  return round_small(min(max(zero * set.per_zero_step, all(0.0f)), all(255.0f)));
}

MOEQ_INLINE F store_zero(const Set& set, F zero) {
  if (!set.stores) return set.shared_zero;
  if (set.bytes) return zero_byte(set, zero) * set.zero_step;
  return round_half(min(max(zero, all(-kScaleMax)), all(kScaleMax)));
}

MOEQ_INLINE F store_scale(F scale) {
  const F size = round_half(min(max(abs(scale), all(kScaleMin)), all(kScaleMax)));
  const F with_sign = float_of(bits_of(size) | (bits_of(scale) & all_int(INT32_MIN)));
  return float_of(bits_of(with_sign) & ~is_zero(scale));
}

MOEQ_INLINE F inverse(F x) { return float_of(bits_of(all(1.0f) / x) & ~is_zero(x)); }

// Sums N terms over the weights, in kWays interleaved chains; what a term adds is up to `term(weight, sums)`.
template <int N, int kWays, class Term>
MOEQ_INLINE void sum(const F* v, int width, F* out, Term term) {
  F sums[kWays][N];
#pragma GCC unroll 16
  for (int way = 0; way < kWays; way++)
#pragma GCC unroll 16
    for (int n = 0; n < N; n++) sums[way][n] = all(0.0f);
  int j = 0;
  for (; j + kWays <= width; j += kWays)
#pragma GCC unroll 16
    for (int way = 0; way < kWays; way++) term(v[j + way], sums[way]);
  for (; j < width; j++) term(v[j], sums[0]);
#pragma GCC unroll 16
  for (int n = 0; n < N; n++) {
    if (kWays == 4)
      out[n] = (sums[0][n] + sums[1][n]) + (sums[2][n] + sums[3][n]);
    else
      out[n] = sums[0][n] + sums[1][n];
  }
}

struct Groups {
  const Set& set;
  F* v;  // weights in units of `unit`
  int width;
  F count;
  F unit;
  F per_unit;
  F zero;  // of the min-max range
  F sum_v;
  F sum_vv;
};

struct Parameters {
  F ratio;
  F zero;
};

MOEQ_INLINE F stored(const Groups& groups, F ratio) { return store_scale(groups.unit * ratio) * groups.per_unit; }

MOEQ_INLINE F code(F t, F top) { return round_small(min(max(t, all(0.0f)), top)); }

// Finds the ranges of the raw weights in `v` and replaces them by v / unit. False if one is not finite.
bool begin(Groups& groups) {
  const Set& set = groups.set;
  F low = all(0.0f), high = all(0.0f), odd = all(0.0f);  // the range always holds zero
  for (int j = 0; j < groups.width; j++) {
    const F w = groups.v[j];
    low = min(w, low);
    high = max(w, high);
    odd = fma(w, all(0.0f), odd);
  }
  int32_t flags[kLanes];
  store(flags, finite(odd));
  for (int lane = 0; lane < kLanes; lane++)
    if (!flags[lane]) return false;
  const F reach = max(-low, high);
  F unit;
  if (set.stores)
    unit = high / set.top - low / set.top;
  else if (set.is_signed)
    unit = select(less(-low, high), -reach, reach) / set.shared_zero;
  else
    unit = reach / set.shared_zero;
  unit = min(max(unit, all(-kScaleMax)), all(kScaleMax));
  groups.unit = float_of(bits_of(unit) & ~less(reach, all(kNothing)));
  groups.per_unit = inverse(groups.unit);
  groups.zero = store_zero(set, -low * groups.per_unit);
  const F per_unit = groups.per_unit;
  for (int j = 0; j < groups.width; j++) groups.v[j] = groups.v[j] * per_unit;
  return true;
}

void moments(Groups& groups) {
  F out[2];
  sum<2, 4>(groups.v, groups.width, out, [](F v, F* sums) __attribute__((always_inline)) {
    sums[0] = sums[0] + v;
    sums[1] = fma(v, v, sums[1]);
  });
  groups.sum_v = out[0];
  groups.sum_vv = out[1];
}

Parameters search(const Groups& groups, const RoundingSettings& settings) {
  const F zero = groups.zero, top = groups.set.top;
  F best = all(__builtin_inff()), best_ratio = all((float)settings.ratios[0]);
  for (int r = 0; r < settings.num_ratios; r++) {
    const F slope = all((float)(1.0 / settings.ratios[r]));
    F error[1];
    sum<1, 4>(groups.v, groups.width, error, [=](F v, F* sums) __attribute__((always_inline)) {
      const F t = fma(v, slope, zero);
      const F e = t - code(t, top);
      sums[0] = fma(e, e, sums[0]);
    });
    const F ratio = all((float)settings.ratios[r]);
    const F in_weights = error[0] * (ratio * ratio);
    const I better = less(in_weights, best);
    best = select(better, in_weights, best);
    best_ratio = select(better, ratio, best_ratio);
  }
  return {stored(groups, best_ratio), zero};
}

Parameters minmax(const Groups& groups, const RoundingSettings& settings) {
  if (settings.bits > 1 || groups.set.is_signed) return {stored(groups, all(1.0f)), groups.zero};
  F size[1];
  sum<1, 4>(groups.v, groups.width, size,
            [](F v, F* sums) __attribute__((always_inline)) { sums[0] = sums[0] + abs(v); });
  return {stored(groups, size[0] / groups.count * all(2.0f)), store_zero(groups.set, all(0.5f))};
}

MOEQ_INLINE F solved(const Groups& groups, F vd, F dd, F ratio) {
  const F fresh = vd / dd;
  return select(greater(fresh * ratio, all(0.0f)), stored(groups, fresh), ratio);
}

Parameters refit(const Groups& groups, Parameters now) {
  const F slope = inverse(now.ratio), zero = now.zero, top = groups.set.top, v_sum = groups.sum_v, n = groups.count;
  F out[3];
  if (!groups.set.stores) {
    sum<2, 4>(groups.v, groups.width, out, [=](F v, F* sums) __attribute__((always_inline)) {
      const F d = code(v * slope + zero, top) - zero;
      sums[0] = fma(v, d, sums[0]);
      sums[1] = fma(d, d, sums[1]);
    });
    return {solved(groups, out[0], out[1], now.ratio), zero};
  }
  sum<3, 4>(groups.v, groups.width, out, [=](F v, F* sums) __attribute__((always_inline)) {
    const F d = code(v * slope + zero, top) - zero;
    sums[0] = fma(v, d, sums[0]);
    sums[1] = fma(d, d, sums[1]);
    sums[2] = sums[2] + d;
  });
  const F vd = out[0], dd = out[1], d = out[2];
  const F line = (vd - d * v_sum / n) / (dd - d * d / n);
  const F wish = zero + (d - v_sum / line) / n;
  const F new_zero = store_zero(groups.set, select(finite(wish), wish, zero));
  const F move = new_zero - zero;
  const F moved_vd = vd - move * v_sum;
  const F moved_dd = dd + move * (n * move - all(2.0f) * d);
  const I moves = greater(moved_vd * moved_vd * dd, vd * vd * moved_dd);
  return {solved(groups, select(moves, moved_vd, vd), select(moves, moved_dd, dd), now.ratio),
          select(moves, new_zero, zero)};
}

MOEQ_INLINE F sane(F growth) {
  return min(max(float_of(bits_of(growth) & finite(growth)), all(-0.5f)), all(1.0f));
}

// One alternation of half-quadratic splitting. Errors up to beta^(-1 / (2 - p)) are kept whole; where that holds for
// all lanes with something to spare, computing the power would give exactly 1.
Parameters shrink(const Groups& groups, Parameters now, double p, double beta) {
  const F exponent = all((float)(p - 2.0)), offset = all((float)-__builtin_log2(beta));
  const F kept_whole = all((float)(0.999 * __builtin_pow(beta, -1.0 / (2.0 - p))));
  const F slope = inverse(now.ratio), zero = now.zero, top = groups.set.top, n = groups.count;
  F out[4];
  sum<4, 2>(groups.v, groups.width, out, [=](F v, F* sums) __attribute__((always_inline)) {
    const F t = v * slope + zero;
    const F q = code(t, top);
    const F e = t - q;
    const F d = q - zero;
    const F kept = any(greater(abs(e), kept_whole)) ? power_below_one(abs(e), exponent, offset) * e : e;
    sums[0] = fma(kept, d, sums[0]);
    sums[1] = fma(d, d, sums[1]);
    sums[2] = sums[2] + d;
    sums[3] = sums[3] + kept;
  });
  const F kd = out[0], dd = out[1], d = out[2], k = out[3];
  if (!groups.set.stores) return {stored(groups, now.ratio * (all(1.0f) + sane(kd / dd))), zero};
  const F growth = sane((kd - k * d / n) / (dd - d * d / n));
  const F move = (growth * d - k) / (n * (all(1.0f) + growth));
  return {stored(groups, now.ratio * (all(1.0f) + growth)), store_zero(groups.set, zero + move)};
}

Parameters half_quadratic(const Groups& groups, const RoundingSettings& settings, Parameters now) {
  I moving = all_int(-1);
  double beta = settings.beta;
  const F settled = all(settings.settled);
  for (int iteration = 0; iteration < settings.iterations; iteration++) {
    const Parameters next = shrink(groups, now, settings.p, beta);
    const I by_ratio = greater(abs(next.ratio / now.ratio - all(1.0f)), settled);
    const I by_zero = greater(abs(next.zero - now.zero), settled);
    moving = moving & (by_ratio | by_zero);
    now.ratio = select(moving, next.ratio, now.ratio);
    now.zero = select(moving, next.zero, now.zero);
    beta *= settings.growth;
  }
  return now;
}

// Writes the codes of 16 groups to `rows`, a chunk of 16 columns at a time; returns sum v d.
F emit(const Groups& groups, Parameters chosen, uint8_t* const* rows, int lanes) {
  const F slope = inverse(chosen.ratio), zero = chosen.zero, top = groups.set.top;
  F vd[2] = {all(0.0f), all(0.0f)};
  for (int j0 = 0; j0 < groups.width; j0 += 16) {
    const int have = groups.width - j0 < 16 ? groups.width - j0 : 16;
    I packed[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; part++) {
      packed[part] = all_int(0);
#pragma GCC unroll 4
      for (int byte = 0; byte < 4; byte++) {
        const int j = 4 * part + byte;
        if (j < have) {
          const F v = groups.v[j0 + j];
          const F raw = min(max(v * slope + zero, all(0.0f)), top) + all(kRounder);
          vd[byte & 1] = fma(v, (raw - all(kRounder)) - zero, vd[byte & 1]);
          packed[part] = packed[part] | ((bits_of(raw) & all_int(0xff)) << (8 * byte));
        }
      }
    }
    I pair[4] = {zip_low(packed[0], packed[2]), zip_high(packed[0], packed[2]), zip_low(packed[1], packed[3]),
                 zip_high(packed[1], packed[3])};
    alignas(64) uint8_t bytes[kLanes][16];
    store(bytes[0], zip_low(pair[0], pair[2]));
    store(bytes[4], zip_high(pair[0], pair[2]));
    store(bytes[8], zip_low(pair[1], pair[3]));
    store(bytes[12], zip_high(pair[1], pair[3]));
    if (have == 16)
      for (int lane = 0; lane < lanes; lane++) std::memcpy(rows[lane] + j0, bytes[lane], 16);
    else
      for (int lane = 0; lane < lanes; lane++) std::memcpy(rows[lane] + j0, bytes[lane], (size_t)have);
  }
  return vd[0] + vd[1];
}

// What the scale must grow by (decision 0013).
MOEQ_INLINE F bounded_gain(const Groups& groups, F vd, F ratio) {
  const F gain = groups.sum_vv / (vd * ratio);
  return min(max(select(finite(gain), gain, all(1.0f)), all(kGainMin)), all(kGainMax));
}

// Up to 16 groups of equal width; `at` counts groups of the matrix.
struct Batch {
  const void* w[kLanes];
  uint8_t* codes[kLanes];
  int64_t at[kLanes];
  int lanes;
  int width;
};

void write_parameters(const RoundingJob& job, const Set& set, const Batch& batch, F scale, F zero) {
  int32_t scales[kLanes], zeros[kLanes];
  store(scales, half_bits(scale));
  if (set.stores)
    store(zeros, set.bytes ? to_int(zero_byte(set, zero)) : half_bits(zero));
  for (int lane = 0; lane < batch.lanes; lane++) {
    job.scale[batch.at[lane]] = (uint16_t)scales[lane];
    if (set.bytes)
      ((uint8_t*)job.zero)[batch.at[lane]] = (uint8_t)zeros[lane];
    else if (set.stores)
      ((uint16_t*)job.zero)[batch.at[lane]] = (uint16_t)zeros[lane];
  }
}

bool round_batch(const RoundingJob& job, const Set& set, Batch& batch) {
  for (int lane = batch.lanes; lane < kLanes; lane++) batch.w[lane] = batch.w[0];
  F* v = (F*)job.scratch;
  switch (job.dtype) {
    case Dtype::float32:
      gather<Dtype::float32>(batch.w, batch.width, v);
      break;
    case Dtype::bfloat16:
      gather<Dtype::bfloat16>(batch.w, batch.width, v);
      break;
    default:
      gather<Dtype::float16>(batch.w, batch.width, v);
  }
  Groups groups{set, v, batch.width, all((float)batch.width), {}, {}, {}, {}, {}};
  if (!begin(groups)) return false;
  moments(groups);
  const RoundingSettings& settings = job.settings;
  Parameters chosen;
  if (settings.fit == Fit::minmax) {
    chosen = minmax(groups, settings);
  } else {
    chosen = search(groups, settings);
    for (int k = 0; k < settings.refits; k++) chosen = refit(groups, chosen);
    if (settings.fit == Fit::half_quadratic) chosen = half_quadratic(groups, settings, chosen);
  }
  const F vd = emit(groups, chosen, batch.codes, batch.lanes);
  F ratio = chosen.ratio;
  if (settings.gain) ratio = ratio * bounded_gain(groups, vd, ratio);
  write_parameters(job, set, batch, store_scale(groups.unit * ratio), chosen.zero);
  return true;
}

}  // namespace

bool round_matrix(const RoundingJob& job) {
  const Set set = make_set(job.settings);
  const int64_t size = job.dtype == Dtype::float32 ? 4 : 2;
  const int64_t full = job.columns / job.group_size;
  const int64_t groups = full + (job.columns % job.group_size ? 1 : 0);
  Batch batch;
  // Full groups first, then the ragged last groups of all rows.
  for (int ragged = 0; ragged < 2; ragged++) {
    batch.width = (int)(ragged ? job.columns % job.group_size : job.group_size);
    batch.lanes = 0;
    const int64_t first = ragged ? full : 0, last = ragged ? groups : full;
    for (int64_t row = 0; row < job.rows; row++) {
      for (int64_t group = first; group < last; group++) {
        const int64_t start = row * job.columns + group * job.group_size;
        batch.w[batch.lanes] = (const char*)job.w + start * size;
        batch.codes[batch.lanes] = job.codes + start;
        batch.at[batch.lanes] = row * groups + group;
        if (++batch.lanes < kLanes) continue;
        if (!round_batch(job, set, batch)) return false;
        batch.lanes = 0;
      }
    }
    if (batch.lanes && !round_batch(job, set, batch)) return false;
  }
  return true;
}

}  // namespace moeq::MOEQ_ISA

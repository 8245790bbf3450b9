// Sixteen lanes of float and int32, made of the widest vectors that the file is compiled for.
//
// Every kernel is compiled once per instruction set (CMakeLists.txt) with MOEQ_ISA naming the namespace. All of them
// compute lane by lane the same IEEE operations in the same order - 16 lanes whatever the registers' width, fused
// multiply-adds only where fma() is written, divisions exact - so the results are the same bits on every machine.
//
// Keep the standard library's templates out of files compiled this way: the linker merges equal instantiations, and
// the one with wide instructions could end up in code that must run everywhere.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if !defined(MOEQ_ISA)
#error "compile with -DMOEQ_ISA=<namespace>"
#endif

#define MOEQ_INLINE static inline __attribute__((always_inline))

namespace moeq::MOEQ_ISA {

constexpr int kLanes = 16;

// One register: F floats, I integers of the same number of lanes. The lanes of a comparison are 0 or -1.

#if defined(__AVX512F__)

typedef float F __attribute__((vector_size(64)));
typedef int32_t I __attribute__((vector_size(64)));
using F1 = F;
using I1 = I;

MOEQ_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
MOEQ_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
MOEQ_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
MOEQ_INLINE I zip_low(I a, I b) {
  const I index = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  return (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)index, (__m512i)b);
}
MOEQ_INLINE I zip_high(I a, I b) {
  const I index = {8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)index, (__m512i)b);
}

#elif defined(__AVX2__) && defined(__FMA__)

typedef float F1 __attribute__((vector_size(32)));
typedef int32_t I1 __attribute__((vector_size(32)));

MOEQ_INLINE F1 fma(F1 a, F1 b, F1 c) { return (F1)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
MOEQ_INLINE F1 min(F1 a, F1 b) { return (F1)_mm256_min_ps((__m256)a, (__m256)b); }
MOEQ_INLINE F1 max(F1 a, F1 b) { return (F1)_mm256_max_ps((__m256)a, (__m256)b); }
MOEQ_INLINE I1 zip_low(I1 a, I1 b) {
  const __m256i even = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  return (I1)_mm256_permute2x128_si256(even, odd, 0x20);
}
MOEQ_INLINE I1 zip_high(I1 a, I1 b) {
  const __m256i even = _mm256_unpacklo_epi32((__m256i)a, (__m256i)b);
  const __m256i odd = _mm256_unpackhi_epi32((__m256i)a, (__m256i)b);
  return (I1)_mm256_permute2x128_si256(even, odd, 0x31);
}

#else

typedef float F1 __attribute__((vector_size(16)));
typedef int32_t I1 __attribute__((vector_size(16)));

#if defined(__ARM_NEON)
MOEQ_INLINE F1 fma(F1 a, F1 b, F1 c) { return (F1)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
// Right but slow where the machine cannot fuse: isa.h says that torch is better then.
MOEQ_INLINE F1 fma(F1 a, F1 b, F1 c) {
  for (int lane = 0; lane < 4; lane++) a[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return a;
}
#endif
// A NaN on the left gives the right operand, as on x86.
MOEQ_INLINE F1 min(F1 a, F1 b) {
  const I1 less = a < b;
  return (F1)((less & (I1)a) | (~less & (I1)b));
}
MOEQ_INLINE F1 max(F1 a, F1 b) {
  const I1 more = a > b;
  return (F1)((more & (I1)a) | (~more & (I1)b));
}
MOEQ_INLINE I1 zip_low(I1 a, I1 b) { return I1{a[0], b[0], a[1], b[1]}; }
MOEQ_INLINE I1 zip_high(I1 a, I1 b) { return I1{a[2], b[2], a[3], b[3]}; }

#endif

#if !defined(__AVX512F__)

// Two registers of half as many lanes; nested, four.
template <class H>
struct Two {
  H low, high;
};

#define MOEQ_BINARY(op)                                 \
  template <class H>                                    \
  MOEQ_INLINE Two<H> operator op(Two<H> a, Two<H> b) {  \
    return {a.low op b.low, a.high op b.high};          \
  }
MOEQ_BINARY(+)
MOEQ_BINARY(-)
MOEQ_BINARY(*)
MOEQ_BINARY(/)
MOEQ_BINARY(&)
MOEQ_BINARY(|)
MOEQ_BINARY(^)
#undef MOEQ_BINARY

template <class H>
MOEQ_INLINE Two<H> operator~(Two<H> a) {
  return {~a.low, ~a.high};
}
template <class H>
MOEQ_INLINE Two<H> operator-(Two<H> a) {
  return {-a.low, -a.high};
}
template <class H>
MOEQ_INLINE Two<H> operator<<(Two<H> a, int bits) {
  return {a.low << bits, a.high << bits};
}
template <class H>
MOEQ_INLINE Two<H> operator>>(Two<H> a, int bits) {
  return {a.low >> bits, a.high >> bits};
}
template <class H>
MOEQ_INLINE Two<H> fma(Two<H> a, Two<H> b, Two<H> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class H>
MOEQ_INLINE Two<H> min(Two<H> a, Two<H> b) {
  return {min(a.low, b.low), min(a.high, b.high)};
}
template <class H>
MOEQ_INLINE Two<H> max(Two<H> a, Two<H> b) {
  return {max(a.low, b.low), max(a.high, b.high)};
}
template <class H>
MOEQ_INLINE Two<H> zip_low(Two<H> a, Two<H> b) {
  return {zip_low(a.low, b.low), zip_high(a.low, b.low)};
}
template <class H>
MOEQ_INLINE Two<H> zip_high(Two<H> a, Two<H> b) {
  return {zip_low(a.high, b.high), zip_high(a.high, b.high)};
}

#if defined(__AVX2__) && defined(__FMA__)
using F = Two<F1>;
using I = Two<I1>;
#else
using F = Two<Two<F1>>;
using I = Two<Two<I1>>;
#endif

#endif  // not AVX-512

// What differs in result type cannot be an operator of Two; these recurse down to the register.

MOEQ_INLINE I1 bits_of(F1 a) { return (I1)a; }
MOEQ_INLINE F1 float_of(I1 a) { return (F1)a; }
MOEQ_INLINE F1 to_float(I1 a) { return __builtin_convertvector(a, F1); }
MOEQ_INLINE I1 to_int(F1 a) { return __builtin_convertvector(a, I1); }
MOEQ_INLINE I1 less(F1 a, F1 b) { return a < b; }
MOEQ_INLINE I1 less(I1 a, I1 b) { return a < b; }

#if !defined(__AVX512F__)
#define MOEQ_UNARY(name)                                         \
  template <class H>                                             \
  MOEQ_INLINE auto name(Two<H> a) -> Two<decltype(name(a.low))> { \
    return {name(a.low), name(a.high)};                          \
  }
MOEQ_UNARY(bits_of)
MOEQ_UNARY(float_of)
MOEQ_UNARY(to_float)
MOEQ_UNARY(to_int)
#undef MOEQ_UNARY
template <class H>
MOEQ_INLINE auto less(Two<H> a, Two<H> b) -> Two<decltype(less(a.low, b.low))> {
  return {less(a.low, b.low), less(a.high, b.high)};
}
#endif

MOEQ_INLINE void set(F1& to, float value) { to = F1{} + value; }
MOEQ_INLINE void set(I1& to, int32_t value) { to = I1{} + value; }
#if !defined(__AVX512F__)
template <class H, class S>
MOEQ_INLINE void set(Two<H>& to, S value) {
  set(to.low, value);
  set(to.high, value);
}
#endif

MOEQ_INLINE F all(float value) {
  F out;
  set(out, value);
  return out;
}
MOEQ_INLINE I all_int(int32_t value) {
  I out;
  set(out, value);
  return out;
}

MOEQ_INLINE F select(I mask, F yes, F no) { return float_of((mask & bits_of(yes)) | (~mask & bits_of(no))); }
// Sixteen numbers by index, whose bits above the fourth do not count.
MOEQ_INLINE F look_up(F table, I index) {
#if defined(__AVX512F__)
  return (F)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__) && defined(__FMA__)
  const auto half = [&](I1 at) {
    const __m256 low = _mm256_permutevar8x32_ps((__m256)table.low, (__m256i)at);
    const __m256 high = _mm256_permutevar8x32_ps((__m256)table.high, (__m256i)at);
    return (F1)_mm256_blendv_ps(low, high, (__m256)(at << 28));
  };
  return {half(index.low), half(index.high)};
#else
  float from[kLanes], to[kLanes];
  int32_t at[kLanes];
  std::memcpy(from, &table, sizeof from);
  std::memcpy(at, &index, sizeof at);
  for (int lane = 0; lane < kLanes; lane++) to[lane] = from[at[lane] & 15];
  std::memcpy(&table, to, sizeof to);
  return table;
#endif
}
MOEQ_INLINE F abs(F a) { return float_of(bits_of(a) & all_int(0x7fffffff)); }
// 0 where a NaN takes part.
MOEQ_INLINE I greater(F a, F b) { return less(b, a); }
MOEQ_INLINE I finite(F a) { return less(bits_of(abs(a)), all_int(0x7f800000)); }
MOEQ_INLINE I is_zero(F a) { return less(bits_of(abs(a)), all_int(1)); }

// Whether a lane of a comparison holds.
#if defined(__AVX512F__)
MOEQ_INLINE bool any(I mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
#elif defined(__AVX2__) && defined(__FMA__)
MOEQ_INLINE bool any(I mask) { return _mm256_movemask_ps((__m256)(mask.low | mask.high)) != 0; }
#else
MOEQ_INLINE bool any(I mask) {
  const I1 either = (mask.low.low | mask.low.high) | (mask.high.low | mask.high.high);
  return (either[0] | either[1] | either[2] | either[3]) != 0;
}
#endif

// The lanes of a comparison that hold, as bits.
MOEQ_INLINE uint32_t lanes_of(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__) && defined(__FMA__)
  return (uint32_t)_mm256_movemask_ps((__m256)mask.low) | (uint32_t)_mm256_movemask_ps((__m256)mask.high) << 8;
#else
  int32_t lanes[kLanes];
  std::memcpy(lanes, &mask, sizeof lanes);
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; lane++) found |= (uint32_t)(lanes[lane] & 1) << lane;
  return found;
#endif
}

// Register by register: a copy of all lanes at once would go through memory, half a register at a time, and wait there.
MOEQ_INLINE void load_to(const void* from, F1& to) { std::memcpy(&to, from, sizeof to); }
MOEQ_INLINE void load_to(const void* from, I1& to) { std::memcpy(&to, from, sizeof to); }
MOEQ_INLINE void store_from(void* to, F1 a) { std::memcpy(to, &a, sizeof a); }
MOEQ_INLINE void store_from(void* to, I1 a) { std::memcpy(to, &a, sizeof a); }
#if !defined(__AVX512F__)
template <class H>
MOEQ_INLINE void load_to(const void* from, Two<H>& to) {
  load_to(from, to.low);
  load_to((const char*)from + sizeof(H), to.high);
}
template <class H>
MOEQ_INLINE void store_from(void* to, Two<H> a) {
  store_from(to, a.low);
  store_from((char*)to + sizeof(H), a.high);
}
#endif

MOEQ_INLINE I load_int(const void* from) {
  I out;
  load_to(from, out);
  return out;
}
MOEQ_INLINE F load(const float* from) {
  F out;
  load_to(from, out);
  return out;
}
MOEQ_INLINE void store(void* to, I a) { store_from(to, a); }
MOEQ_INLINE void store(void* to, F a) { store_from(to, a); }

// Halves onto each other, until one is left.
#if defined(__AVX2__) && defined(__FMA__)
MOEQ_INLINE float sum_lanes(__m256 v) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
MOEQ_INLINE float sum_lanes(F v) {
#if defined(__AVX512F__)
  return sum_lanes(_mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1)));
#else
  return sum_lanes((__m256)(v.low + v.high));
#endif
}
#else
MOEQ_INLINE float sum_lanes(F v) {
  alignas(64) float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
  return lanes[0];
}
#endif

// Rounds to the nearest integer, ties to even, for 0 <= a < 2^22; the low bits of the sum are that integer.
constexpr float kRounder = 8388608.0f;

MOEQ_INLINE F round_small(F a) { return (a + all(kRounder)) - all(kRounder); }

// Rows to columns: lane r of result c is lane c of argument r.
MOEQ_INLINE void transpose(I* x) {
  I y[kLanes];
#pragma GCC unroll 16
  for (int round = 0; round < 2; round++) {
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
      y[2 * i] = zip_low(x[i], x[i + 8]);
      y[2 * i + 1] = zip_high(x[i], x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 8; i++) {
      x[2 * i] = zip_low(y[i], y[i + 8]);
      x[2 * i + 1] = zip_high(y[i], y[i + 8]);
    }
  }
}

// float16 numbers as float, and back. Rounds to nearest even; |a| must not exceed 65504.
MOEQ_INLINE F round_half(F a) {
  const F size = abs(a);
  const I sign = bits_of(a) & all_int(INT32_MIN);
  const I raw = bits_of(size);
  const F normal = float_of((raw + all_int(0xfff) + ((raw >> 13) & all_int(1))) & all_int(~0x1fff));
  const F subnormal = (size + all(0.5f)) - all(0.5f);  // numbers from 0.5 to 1 are 2^-24 apart, as these are
  return float_of(bits_of(select(less(size, all(0x1p-14f)), subnormal, normal)) | sign);
}

// The float16 bits of what round_half returned, in the low half of each lane.
MOEQ_INLINE I half_bits(F a) {
  const F size = abs(a);
  const I sign = (bits_of(a) >> 16) & all_int(0x8000);
  const I normal = (bits_of(size) >> 13) - all_int(112 << 10);
  const I subnormal = to_int(size * all(0x1p24f));
  const I small = less(size, all(0x1p-14f));
  return (small & subnormal) | (~small & normal) | sign;
}

// float16 bits in the low halves (the high ones are ignored) as float.
MOEQ_INLINE F half_to_float(I bits) {
  const I size = bits & all_int(0x7fff);
  const I sign = (bits & all_int(0x8000)) << 16;
  const F normal = float_of((size << 13) + all_int(112 << 23));
  const F subnormal = to_float(size) * all(0x1p-24f);
  F out = select(less(size, all_int(0x400)), subnormal, normal);
  out = select(less(all_int(0x7bff), size), float_of((size << 13) | all_int(0x7f800000)), out);
  return float_of(bits_of(out) | sign);
}

// 2^power for powers of -127 to 0: an exponent times a polynomial over -1/2 .. 1/2 (minimax, error 2e-9). What would be
// below 2^-126 is 0.
MOEQ_INLINE F two_to(F power) {
  const F shifted = power + all(1.5f * kRounder);  // negative numbers are rounded too
  const F g = power - (shifted - all(1.5f * kRounder));
  F two = all(0.00015345811f);
  two = fma(two, g, all(0.00133999309f));
  two = fma(two, g, all(0.00961848907f));
  two = fma(two, g, all(0.0555032864f));
  two = fma(two, g, all(0.240226462f));
  two = fma(two, g, all(0.693147182f));
  two = fma(two, g, all(1.0f));
  // The low bits of `shifted` are the whole part; at -127 the exponent field is 0 and so is the product.
  return two * float_of((bits_of(shifted) + all_int(127)) << 23);
}

// 2^(exponent log2(x) + offset) but at most 1, for x >= 0. Off by a few units in the last place.
//
// log2 is the exponent plus a polynomial over sqrt(1/2) .. sqrt(2) (minimax, error 5e-8); x = 0 counts as 2^-127.
MOEQ_INLINE F power_below_one(F x, F exponent, F offset) {
  const I from_root = bits_of(x) - all_int(0x3f3504f3);
  const F whole = to_float(from_root >> 23);
  const F f = float_of(bits_of(x) - ((from_root >> 23) << 23)) - all(1.0f);
  F log = all(-0.145757645f);
  log = fma(log, f, all(0.236882538f));
  log = fma(log, f, all(-0.250061184f));
  log = fma(log, f, all(0.286708534f));
  log = fma(log, f, all(-0.36008811f));
  log = fma(log, f, all(0.480939388f));
  log = fma(log, f, all(-0.721357107f));
  log = fma(log, f, all(1.44269478f));
  log = fma(log, f, whole);
  return two_to(max(min(fma(log, exponent, offset), all(0.0f)), all(-127.0f)));
}

}  // namespace moeq::MOEQ_ISA

// See matvec.h: what is done to vectors before and after products, in plain loops over lanes.
#include "lanes.h"
#include "matvec.h"
#include "planes.h"
#include "records.h"

namespace moeq::MOEQ_ISA {

void quantize(const Activations& out, int64_t columns) {
  float* x = (float*)out.x;
  int8_t* q = (int8_t*)out.q;
  const int64_t blocks = num_blocks(columns);
  for (int64_t column = columns; column < blocks * kBlock; column++) x[column] = 0.0f;
  for (int grain = 0; grain < kGrains; grain++)
    for (int64_t run = blocks << grain; run % 8; run++)
      ((float*)out.scale[grain])[run] = ((float*)out.sum[grain])[run] = 0.0f;
  for (int64_t block = 0; block < blocks; block++) {
    const float* from = x + block * kBlock;
    int8_t* to = q + block * kBlock;
    uint32_t largest = 0;  // floats without signs are ordered as their bits are
    for (int j = 0; j < kBlock; j++) {
      const uint32_t size = bits_from_float(from[j]) & 0x7fffffffu;
      largest = size > largest ? size : largest;
    }
    const bool finite = largest < 0x7f800000u;
    const float top = float_from_bits(largest);
    const bool some = finite && top > 1e-30f;
    const float scale = some ? top / 127.0f : finite ? 0.0f : float_from_bits(0x7fc00000u);
    const float inverse = some ? 127.0f / top : 0.0f;
    constexpr float rounder = 1.5f * kRounder;
    for (int j = 0; j < kBlock; j++) {
      const float scaled = finite ? from[j] * inverse : 0.0f;
      to[j] = (int8_t)(bits_from_float(scaled + rounder) - bits_from_float(rounder));
    }
    float sums[4];
    for (int part = 0; part < 4; part++) {
      int32_t sum = 0;
      for (int j = 0; j < 32; j++) sum += to[32 * part + j];
      sums[part] = (float)sum;
    }
    for (int grain = 0; grain < kGrains; grain++) {
      const int parts = 1 << grain;
      for (int part = 0; part < parts; part++) {
        float sum = 0.0f;
        for (int j = part * (4 / parts); j < (part + 1) * (4 / parts); j++) sum += sums[j];
        ((float*)out.scale[grain])[block * parts + part] = scale;
        ((float*)out.sum[grain])[block * parts + part] = sum;
      }
    }
  }
}

void silu_gate(float* inner, const float* up, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    alignas(64) float gate_here[kLanes] = {}, up_here[kLanes] = {};
    const size_t size = (size_t)min_of(count - j, kLanes) * sizeof(float);
    std::memcpy(gate_here, inner + j, size);
    std::memcpy(up_here, up + j, size);
    const F gate = load(gate_here);
    const F decay = two_to(max(abs(gate) * all(-1.44269504f), all(-127.0f)));  // e^-|gate|
    const F sigmoid = select(less(gate, all(0.0f)), decay, all(1.0f)) / (all(1.0f) + decay);
    store(gate_here, gate * sigmoid * load(up_here));
    std::memcpy(inner + j, gate_here, size);
  }
}

void to_float_array(const void* from, Dtype dtype, float* to, int64_t count) {
  const uint16_t* halves = (const uint16_t*)from;
  if (dtype == Dtype::float32)
    std::memcpy(to, from, (size_t)count * sizeof(float));
  else if (dtype == Dtype::bfloat16)
    for (int64_t j = 0; j < count; j++) to[j] = float_from_bits((uint32_t)halves[j] << 16);
  else
    for (int64_t j = 0; j < count; j++) to[j] = half_to_float(halves[j]);
}

void from_float_array(const float* from, Dtype dtype, void* to, int64_t count) { store_as(from, count, dtype, to, 0); }

void add_scaled(const float* from, float weight, float* to, int64_t count) {
  for (int64_t j = 0; j < count; j++) to[j] += weight * from[j];
}

uint64_t read_all(const void* from, size_t bytes) {
  // The fastest of the loops tried: four runs, some lines of each at a time, left to the hardware to fetch ahead.
  typedef uint64_t Words __attribute__((vector_size(32), aligned(1), may_alias));
  constexpr size_t kStep = 256;
  const char* at = (const char*)from;
  const size_t quarter = bytes / 4 / kStep * kStep;
  Words a = {}, b = {}, c = {}, d = {};
  for (size_t j = 0; j < quarter; j += kStep)
    for (size_t run = 0; run < 4; run++) {
      const Words* here = (const Words*)(at + run * quarter + j);
      a ^= here[0] ^ here[4];
      b ^= here[1] ^ here[5];
      c ^= here[2] ^ here[6];
      d ^= here[3] ^ here[7];
    }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1] ^ a[2] ^ a[3];
}

}  // namespace moeq::MOEQ_ISA

// Which instruction set to run, found out once at load time.
#pragma once

#if defined(__x86_64__)
#define MOEQ_X86 1
#else
#define MOEQ_X86 0
#endif

namespace moeq {

enum class Isa { base, avx2, avx512 };

inline bool runs(Isa isa) {
#if MOEQ_X86
  switch (isa) {
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && runs(Isa::avx2);
    case Isa::avx2:
      // Every processor with these has F16C, which older compilers cannot ask for.
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    default:
      return true;
  }
#else
  return isa == Isa::base;
#endif
}

// Whether bytes can be multiplied and added to 32 bits in one instruction, and looked up in tables of 32 and more entries;
// not every machine with AVX-512 can. The first that had only the former (Cascade Lake) lose a tenth by AVX2.
inline bool has_byte_instructions() {
#if MOEQ_X86
  return runs(Isa::avx512) && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

// Files with products are compiled for these where they are for AVX-512.
inline Isa product_isa(Isa isa) { return isa == Isa::avx512 && !has_byte_instructions() ? Isa::avx2 : isa; }

inline Isa best_isa() {
  static const Isa best = runs(Isa::avx512) ? Isa::avx512 : runs(Isa::avx2) ? Isa::avx2 : Isa::base;
  return best;
}

// Whether kernels are worth calling: x86 without AVX2 has no fused multiply-add, and torch is faster than imitating it.
inline bool worth_it() { return !MOEQ_X86 || best_isa() != Isa::base; }

// The variant of a kernel for an instruction set: MOEQ_PICK(isa, pack_plane) is avx2::pack_plane and so on.
#if MOEQ_X86
#define MOEQ_PICK(isa, name)                                   \
  ((isa) == ::moeq::Isa::avx512 ? ::moeq::avx512::name         \
   : (isa) == ::moeq::Isa::avx2 ? ::moeq::avx2::name           \
                                : ::moeq::base::name)
#else
#define MOEQ_PICK(isa, name) (::moeq::base::name)
#endif

}  // namespace moeq

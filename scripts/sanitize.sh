#!/bin/sh
# Builds tests/native/check_kernels.cpp with sanitizers and runs it: make sanitize.
set -eu
cd "$(dirname "$0")/.."
. scripts/native_files.sh
out=build/sanitize
mkdir -p "$out"
cxx="${CXX:-g++}"
common="-std=gnu++17 -O1 -g -ffp-contract=off -fno-math-errno -Wno-psabi -Icsrc -DMOEQ_OWN_THREADS -fno-omit-frame-pointer"
sets="base"
[ "$(uname -m)" = x86_64 ] && sets="base avx2 avx512"
for kind in address,undefined thread; do
  objects=""
  for isa in $sets; do
    case $isa in
      base) flags="" ;;
      avx2) flags="-mavx2 -mfma -mf16c" ;;
      avx512) flags="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx512vbmi -mavx2 -mfma -mf16c" ;;
    esac
    for kernel in $kernels; do
      object="$out/$kernel-$isa.o"
      # shellcheck disable=SC2086
      $cxx $common $flags -fsanitize=$kind -fno-sanitize=alignment -DMOEQ_ISA=$isa -c csrc/$kernel.cpp -o "$object"
      objects="$objects $object"
    done
  done
  # shellcheck disable=SC2086
  $cxx $common -fsanitize=$kind -fno-sanitize=alignment $checks $objects -o "$out/check-$kind" -pthread -ldl
  printf '%s: ' "$kind"
  "$out/check-$kind" "${1:-200}"
done

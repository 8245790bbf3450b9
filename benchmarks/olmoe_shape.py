"""A model of OLMoE-1B-7B's shape, packed by us and quantized by llama.cpp, for the race of benchmarks/llama_cpp.py.

    python benchmarks/olmoe_shape.py --llama-cpp DIR --scratch DIR --tokenizer DIR [--layers 16] [--kinds Q2_K,Q4_K_M]

Weights are random; bits, shapes and routing are those of the real one. DIR needs 35 GB for all 16 layers. Leaves
DIR/packed and DIR/<kind>.gguf.
"""

import argparse
import sys
from pathlib import Path

from gguf_sources import CONVERT, run
from scale import make_checkpoint

PACKING = ("--method", "uniform", "--quantizer", "rtn", "--bits", "2.9", "--dense-bits", "attention=4,lm_head=6")
"""The bits that llama.cpp's mix Q2_K gives experts."""


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory with tokenizer.json")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--kinds", default="Q2_K")
    args = parser.parse_args()
    source, packed, first = args.scratch / "source", args.scratch / "packed", args.scratch / "bf16.gguf"
    make_checkpoint(source, args.layers, args.tokenizer)
    if not packed.exists():
        code = "import sys; from moeq_cli import main; sys.exit(main(sys.argv[1:]))"
        run(sys.executable, "-c", code, "quantize", source, packed, *PACKING, "--quiet")
    if not first.exists():
        code = CONVERT.format(root=str(args.llama_cpp), model=str(source), out=str(first)).replace('"f16"', '"bf16"')
        run(sys.executable, "-c", code)
    for kind in args.kinds.split(","):
        if not (args.scratch / f"{kind}.gguf").exists():
            run(args.llama_cpp / "build/bin/llama-quantize", first, args.scratch / f"{kind}.gguf", kind, "2")
    print(*sorted(file.name for file in args.scratch.iterdir()))


if __name__ == "__main__":
    main()

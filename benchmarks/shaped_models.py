"""Models of well known shapes, packed by us and quantized by llama.cpp, for the race of benchmarks/llama_cpp.py.

    python benchmarks/shaped_models.py --llama-cpp DIR --scratch DIR --tokenizer DIR [--shape olmoe-1b-7b] [--layers 16]

Weights are random; bits, shapes and routing are those of the real ones. All 16 layers of OLMoE-1B-7B need 35 GB.
Leaves DIR/packed and DIR/<kind>.gguf.
"""

import argparse
import sys
from pathlib import Path

from gguf_sources import CONVERT, run
from scale import CONFIG, make_checkpoint

PACKING = ("--method", "uniform", "--quantizer", "rtn", "--bits", "2.9", "--dense-bits", "attention=4,lm_head=6")
"""The bits that llama.cpp's mix Q2_K gives experts."""


QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "pad_token_id": 1,
}
SHAPES = {"olmoe-1b-7b": CONFIG, "qwen3-30b-a3b": QWEN3}


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory with tokenizer.json")
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--kinds", default="Q2_K")
    args = parser.parse_args()
    source, packed, first = args.scratch / "source", args.scratch / "packed", args.scratch / "bf16.gguf"
    make_checkpoint(source, args.layers, args.tokenizer, SHAPES[args.shape])
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

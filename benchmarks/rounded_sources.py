"""Peak memory on a source in block FP8: random weights of DeepSeek-V3's shape, cut to a few layers and experts.

    python benchmarks/rounded_sources.py --scratch DIR [--layers 2 --experts 40]

Every run is a process of its own; peak RSS is the kernel's. Rows go to stdout, for benchmarks/scale.md.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from scale import quantize

from moeq.checkpoint.write import ShardWriter, write_index
from moeq.report.tables import human_bytes, markdown_table

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
BLOCK = 128
Named = tuple[str, str, tuple[int, ...]]


def linears(layer: int, experts: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The weights of a layer that are in FP8."""
    hidden, inner, heads = 7168, 2048, 128
    prefix = f"model.layers.{layer}."
    yield f"{prefix}self_attn.q_a_proj", (1536, hidden)
    yield f"{prefix}self_attn.q_b_proj", (heads * 192, 1536)
    yield f"{prefix}self_attn.kv_a_proj_with_mqa", (576, hidden)
    yield f"{prefix}self_attn.kv_b_proj", (heads * 256, 512)
    yield f"{prefix}self_attn.o_proj", (hidden, heads * 128)
    for name in ("shared_experts", *(f"experts.{expert}" for expert in range(experts))):
        yield f"{prefix}mlp.{name}.gate_proj", (inner, hidden)
        yield f"{prefix}mlp.{name}.up_proj", (inner, hidden)
        yield f"{prefix}mlp.{name}.down_proj", (hidden, inner)


def tensors(layer: int, experts: int) -> Iterator[Named]:
    """Name, dtype and shape of what a layer stores."""
    for name, shape in linears(layer, experts):
        yield f"{name}.weight", "F8_E4M3", shape
        yield f"{name}.weight_scale_inv", "F32", tuple(-(-side // BLOCK) for side in shape)
    prefix = f"model.layers.{layer}."
    yield f"{prefix}mlp.gate.weight", "BF16", (experts, 7168)
    yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (experts,)
    for name, width in (
        ("input_layernorm", 7168), ("post_attention_layernorm", 7168), ("self_attn.q_a_layernorm", 1536),
        ("self_attn.kv_a_layernorm", 512),
    ):  # fmt: skip
        yield f"{prefix}{name}.weight", "BF16", (width,)


def make(directory: Path, layers: int, experts: int) -> int:
    """Write the checkpoint, a shard for each layer; its bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    outer: list[Named] = [
        (f"model.{n}.weight", "BF16", s) for n, s in (("embed_tokens", (8192, 7168)), ("norm", (7168,)))
    ]
    outer.append(("lm_head.weight", "BF16", (8192, 7168)))
    groups = [outer, *(list(tensors(layer, experts)) for layer in range(layers))]
    weight_map, total = {}, 0
    for index, group in enumerate(groups, start=1):
        file = f"model-{index:05}-of-{len(groups):05}.safetensors"
        with ShardWriter(directory / file, group) as writer:
            for name, dtype, shape in group:
                noise = torch.randn(shape, generator=generator)
                if dtype == "F8_E4M3":
                    value = (noise * 100).to(torch.float8_e4m3fn)
                elif dtype == "F32":
                    value = noise.abs() * 2e-4 if name.endswith("scale_inv") else noise * 0.01
                else:
                    value = (noise * 0.02 + ("norm" in name)).bfloat16()
                writer.write(name, value)
                weight_map[name] = file
                total += value.numel() * value.element_size()
    write_index(directory, weight_map, total)
    config = CONFIG | {"num_hidden_layers": layers, "n_routed_experts": experts}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return total


def main() -> None:
    """Make the source, quantize it, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=40)
    args = parser.parse_args()
    source = args.scratch / "fp8"
    size = make(source, args.layers, args.experts)
    expert = 2 * 3 * math.prod((2048, 7168))
    rows = []
    for name in ("rtn", "hqq"):
        options = {"quantizer": name, "bits": 2.5, "dense_bits": "8", "device": "cpu"}
        run = quantize(source, args.scratch / "packed", options)
        rows.append((name, f"{run['rss'] / 2**30:.2f} GiB", f"{run['bits']:.4f}", human_bytes(run["stored"])))
    words = f"{args.layers} layers of {args.experts} experts, {human_bytes(size)} in FP8"
    print(f"{words}; an expert has {human_bytes(expert)} in bfloat16")
    print(markdown_table(("quantizer", "peak RSS", "bits/expert weight", "stored"), rows))


if __name__ == "__main__":
    main()

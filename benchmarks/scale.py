"""Peak memory and time on a checkpoint of the shape of OLMoE-1B-7B (13.8 GB, random bfloat16 weights).

    python benchmarks/scale.py --scratch DIR --calibration FILE --tokenizer DIR --output benchmarks/scale.md

DIR needs 45 GB. Without calibration: rtn and hqq at 4 bits on all 16 layers, against a plain
read-cast-write of the same files in the same run (interleaved, median of --rounds). With it: gptq at
2 bits on a cut of 4 layers, 128 x 512 tokens, time per layer against the Hessian products and Cholesky
factorizations of the same layer alone. Every moeq run is a process of its own; peak RSS is the kernel's.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moeq.checkpoint.read import Reader
from moeq.checkpoint.write import ShardWriter, write_index
from moeq.report.tables import markdown_table

CONFIG = {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "eos_token_id": 0,
    "pad_token_id": 1,
}
WORKER = """
import json, resource, sys, time
started = time.perf_counter()
import moeq
options = json.loads(sys.argv[3])
imported = time.perf_counter()
marks = []
report = moeq.quantize(sys.argv[1], sys.argv[2], progress=lambda *a: marks.append((*a, time.perf_counter())), **options)
print(json.dumps({
    "wall": time.perf_counter() - started,
    "import": imported - started,
    "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "bits": report.expert_bits_per_weight,
    "stored": report.stored_bytes,
    "seconds": report.seconds,
    "counts": None if report.tokens_per_expert is None else report.tokens_per_expert["layers"],
    "blocks": [mark for mark in marks if mark[0] == "packing"],
}))
"""


def layer_tensors(layer: int, config: dict[str, Any] = CONFIG) -> list[tuple[str, tuple[int, ...]]]:
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    queries = hidden if size is None else heads * size
    keys = queries * config["num_key_value_heads"] // heads
    prefix = f"model.layers.{layer}."
    linears = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    names = [(f"{prefix}self_attn.{name}_proj.weight", shape) for name, shape in linears.items()]
    names += [(f"{prefix}self_attn.{name}_norm.weight", (size or linears[name][0],)) for name in "qk"]
    names += [(f"{prefix}{name}_layernorm.weight", (hidden,)) for name in ("input", "post_attention")]
    names.append((f"{prefix}mlp.gate.weight", (config["num_experts"], hidden)))
    for expert in range(config["num_experts"]):
        names += [(f"{prefix}mlp.experts.{expert}.{name}_proj.weight", (inner, hidden)) for name in ("gate", "up")]
        names.append((f"{prefix}mlp.experts.{expert}.down_proj.weight", (hidden, inner)))
    return names


def make_checkpoint(directory: Path, num_layers: int, tokenizer: Path | None, config: dict[str, Any] = CONFIG) -> None:
    """Write the checkpoint, one shard for each layer; norms near one, everything else normal(0, 0.02)."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    outer = [("model.embed_tokens.weight", (vocabulary, hidden)), ("model.norm.weight", (hidden,))]
    outer.append(("lm_head.weight", (vocabulary, hidden)))
    groups = [outer, *(layer_tensors(layer, config) for layer in range(num_layers))]
    weight_map = {}
    total = 0
    for index, group in enumerate(groups, start=1):
        file = f"model-{index:05}-of-{len(groups):05}.safetensors"
        with ShardWriter(directory / file, [(name, "BF16", shape) for name, shape in group]) as writer:
            for name, shape in group:
                noise = torch.randn(shape, generator=generator) * 0.02
                writer.write(name, (noise + 1 if name.endswith("norm.weight") else noise).bfloat16())
                weight_map[name] = file
                total += 2 * noise.numel()
    write_index(directory, weight_map, total)
    if tokenizer is not None:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, directory / name)
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}), encoding="utf-8")


def read_cast_write(source: Path, out: Path) -> float:
    """The yardstick: read every tensor, cast it to float16, write it, file by file, with fsync."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    started = time.perf_counter()
    with Reader(source) as reader:
        files: dict[str, list[str]] = {}
        for name, info in reader.headers.items():
            files.setdefault(info.file, []).append(name)
        for file, names in files.items():
            with (out / file).open("wb") as handle:
                for name in names:
                    cast = reader.tensor(name).to(torch.float16)
                    handle.write(memoryview(cast.view(-1).view(torch.uint8).numpy()))
                handle.flush()
                os.fsync(handle.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(out)
    return seconds


def quantize(source: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """One moeq run in a fresh process."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", WORKER, str(source), str(out), json.dumps(options)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    shutil.rmtree(out)
    return json.loads(done.stdout.splitlines()[-1])


def floor_seconds(counts: list[int]) -> float:
    """Hessian products and Cholesky factorizations of one layer, nothing else, with its own token counts."""
    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    seconds = 0.0
    for count in counts:
        for width in (hidden, inner):
            x = torch.randn(max(count, 1), width)
            started = time.perf_counter()
            hessian = x.T @ x
            hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
            torch.linalg.cholesky(inverse, upper=True)
            seconds += time.perf_counter() - started
    return seconds


def data_free(args: argparse.Namespace, source: Path) -> str:
    plain: list[float] = []
    runs: dict[str, list[dict[str, Any]]] = {"rtn": [], "hqq": []}
    for _ in range(args.rounds):
        plain.append(read_cast_write(source, args.scratch / "cast"))
        print(f"read-cast-write {plain[-1]:.1f} s", file=sys.stderr, flush=True)
        for name, done in runs.items():
            options = {"quantizer": name, "bits": 4, "accounting": "codes", "device": "cpu"}
            done.append(quantize(source, args.scratch / "packed", options))
            print(name, done[-1], file=sys.stderr, flush=True)
    rows = [("read-cast-write", f"{statistics.median(plain):.0f}", "1.00", "", "", "")]
    for name, done in runs.items():
        walls = [run["wall"] for run in done]
        ratios = [wall / base for wall, base in zip(walls, plain, strict=True)]
        rows.append(
            (
                f"moeq {name}, 4-bit codes",
                f"{statistics.median(walls):.0f}",
                f"{statistics.median(ratios):.2f}",
                f"{max(run['rss'] for run in done) / 2**30:.2f} GiB",
                f"{done[0]['bits']:.4f}",
                f"{done[0]['stored'] / 1e9:.2f} GB",
            )
        )
    return markdown_table(("run", "seconds", "ratio", "peak RSS", "bits/expert weight", "stored"), rows)


def calibrated(args: argparse.Namespace, source: Path) -> str:
    rows = []
    for _ in range(args.rounds):
        options = {"quantizer": "gptq", "bits": 2, "accounting": "codes", "calibration": str(args.calibration)}
        options |= {"nsamples": 128, "seqlen": 512, "device": "cpu"}
        run = quantize(source, args.scratch / "packed", options)
        stamps = [mark[3] for mark in run["blocks"]]
        layers = [after - before for before, after in itertools.pairwise(stamps)]
        floors = [floor_seconds(counts) for counts in run["counts"]]
        ratio = statistics.median(layers) / statistics.median(floors)
        print(run, floors, file=sys.stderr, flush=True)
        rows.append(
            (
                f"{statistics.median(layers):.1f}",
                f"{statistics.median(floors):.1f}",
                f"{ratio:.2f}",
                f"{run['rss'] / 2**30:.2f} GiB",
                f"{run['seconds']['pack']:.0f}",
                str(min(min(counts) for counts in run["counts"])),
            )
        )
    header = (
        "seconds per layer",
        "its Hessians and Cholesky alone",
        "ratio",
        "peak RSS",
        "seconds, all",
        "fewest tokens",
    )
    return markdown_table(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, default=Path("../shared/data/c4/calibration.txt"))
    parser.add_argument("--tokenizer", type=Path, default=Path("assets/demo-qwen3moe-4m"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/scale.md"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("data-free", "calibrated"))
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    parts = []
    if args.only != "calibrated":
        make_checkpoint(args.scratch / "olmoe", 16, None)
        parts.append("## Without data, all 16 layers\n\n" + data_free(args, args.scratch / "olmoe"))
    if args.only != "data-free":
        make_checkpoint(args.scratch / "olmoe-4", 4, args.tokenizer)
        parts.append(
            "## gptq, 2-bit codes, 4 layers, 128 x 512 tokens\n\n" + calibrated(args, args.scratch / "olmoe-4")
        )
    title = f"# Scale: a checkpoint of OLMoE-1B-7B's shape\n\nMade by `{' '.join(['python', *sys.argv])}` on "
    machine = (
        f"{os.cpu_count()} CPU cores, torch {torch.__version__}, shared with others: ratios count, seconds do not."
    )
    args.output.write_text(title + machine + "\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""GGUF files made by llama.cpp itself, read by moeq: weights bit for bit, and what both say about a text.

    python benchmarks/gguf_sources.py --llama-cpp DIR --scratch DIR [--model ../shared/models/ref-qwen3moe-62m]

DIR is a checkout of llama.cpp with llama-quantize and llama-perplexity in build/bin. Its converter makes an F16 file of
the model, its quantizer the others, its perplexity program the second number of each line. The converter refuses
tokenizers that it has no hash of; it is told that ours splits text as GPT-2's.
"""

import argparse
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import torch
from torch import Tensor

import moeq
from moeq.arch.gguf_source import open_source
from moeq.checkpoint.rounded.gguf import PLAIN
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_any, load_tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gguf_files import parts_of

KINDS = ("F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
CONTEXT = 512
CONVERT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/gguf-py"]
import convert_hf_to_gguf
from conversion import base
for found in list(vars(base).values()):
    if isinstance(found, type) and "get_vocab_base_pre" in vars(found):
        found.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv[1:] = [{model!r}, "--outfile", {out!r}, "--outtype", "f16"]
convert_hf_to_gguf.main()
"""


def run(*command: str | Path) -> str:
    """What a program says; its failure is ours."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def different(file: Path, directory: Path) -> tuple[int, str]:
    """Tensors that are not what the package gguf decodes, in bfloat16 where blocks were; and the file's types."""
    found = parts_of(load_any(directory, "cpu", torch.float32))
    wrong, kinds = 0, set()
    for tensor in gguf.GGUFReader(file).tensors:
        plain = tensor.tensor_type.name in PLAIN
        want = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        want = want if plain else want.to(torch.bfloat16).float()
        wrong += int(not torch.equal(torch.from_numpy(found[str(tensor.name)]).float(), want))
        kinds |= set() if tensor.tensor_type.name == "F32" else {tensor.tensor_type.name}
    return wrong, ", ".join(sorted(kinds))


@torch.no_grad()
def perplexity(directory: Path, text: str, chunks: int) -> float:
    """As llama-perplexity counts: of each window the second half."""
    model = load_any(directory, "cpu", torch.float32)
    ids = torch.tensor(load_tokenizer(directory)(text)["input_ids"])[: chunks * CONTEXT].view(chunks, CONTEXT)
    losses: list[Tensor] = []
    for window in ids.split(8):
        logits = model(input_ids=window).logits[:, CONTEXT // 2 : -1].log_softmax(-1)
        losses.append(-logits.gather(-1, window[:, CONTEXT // 2 + 1 :, None]).flatten())
    return float(torch.cat(losses).mean().exp())


def main() -> None:
    """Convert, quantize, read, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-62m"))
    parser.add_argument("--text", type=Path, default=Path("../shared/data/wikitext2/test.txt"))
    parser.add_argument("--chunks", type=int, default=40)
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    programs = args.llama_cpp / "build" / "bin"
    first = args.scratch / "F16.gguf"
    code = CONVERT.format(root=str(args.llama_cpp), model=str(args.model), out=str(first))
    run(sys.executable, "-c", code)
    lines = []
    for kind in KINDS:
        file = args.scratch / f"{kind}.gguf"
        if kind != "F16":
            run(programs / "llama-quantize", first, file, kind, "1")
        said = run(
            *(programs / "llama-perplexity", "-m", file, "-f", args.text, "-c", str(CONTEXT), "-t", "1"),
            *("--chunks", str(args.chunks)),
        )
        found = re.search(r"PPL = ([\d.]+)", said)
        assert found is not None, said[-500:]
        directory = open_source(file)
        wrong, kinds = different(file, directory)
        ours = perplexity(directory, args.text.read_text(encoding="utf-8"), args.chunks)
        out = args.scratch / f"{kind}-packed"
        shutil.rmtree(out, ignore_errors=True)
        moeq.quantize(file, out, bits=3, quantizer="hqq", device="cpu", method="uniform")
        packed = perplexity(out, args.text.read_text(encoding="utf-8"), args.chunks)
        lines.append((kind, kinds, str(wrong), f"{float(found[1]):.4f}", f"{ours:.4f}", f"{packed:.2f}"))
        print(*lines[-1], flush=True)
    header = ("file", "types in it", "tensors that differ", "perplexity, llama.cpp", "moeq", "packed at 3 bits, hqq")
    print(markdown_table(header, lines))


if __name__ == "__main__":
    main()

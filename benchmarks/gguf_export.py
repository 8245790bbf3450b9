"""GGUF files of equal size by llama.cpp's own quantizer and by moeq, all run by llama.cpp.

    python benchmarks/gguf_export.py --llama-cpp DIR --scratch DIR [--model DIR] [--kinds Q2_K,...]

DIR is a checkout of llama.cpp with llama-quantize, llama-imatrix and llama-perplexity in build/bin. Its files are made
from an F16 file of its own converter, without an importance matrix, with its own (128 windows of 512 tokens), and with
one by `moeq imatrix`. Ours get as
many windows of the same two texts, the output at 8 bits and embeddings at 4 as llama.cpp's files of 2 bits have them;
attention and experts get what then fits into a file that is no larger, by one program. KL to F16 is llama.cpp's own
figure, over windows of each text. In the end llama-bench decodes with every file, one thread, files taking turns.
"""

import argparse
import json
import re
import shutil
import statistics
import sys
from pathlib import Path

import gguf
import numpy as np

import moeq
from moeq.report.tables import markdown_table
from moeq.runtime.load import load_tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from gguf_sources import CONVERT, run

CONTEXT, WINDOWS = 512, 128
ROUNDS = 5
EMBEDDING_SAVED = 2 - 18 / 32
"""Bytes that a weight of the table of tokens loses at 4 bits."""
NEAR = 0.003
"""A file that is smaller by no more than this share is taken."""
DYNAMIC = (
    *("--tensor-type", "attn=q8_0", "--tensor-type", "blk\\.[01]\\.ffn_down_exps=q6_k"),
    *("--tensor-type", "ffn_down_exps=q4_k"),
)
"""Choices in the manner of Unsloth's dynamic files: attention at 8 bits, down wider, in the first layers most."""


def texts(data: Path, scratch: Path) -> dict[str, Path]:
    """Name -> a plain file of each text to judge by."""
    mixture = scratch / "mixture.txt"
    lines = (data / "mixture" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    mixture.write_text("\n\n".join(json.loads(line)["text"] for line in lines), encoding="utf-8")
    return {"wikitext2": data / "wikitext2" / "test.txt", "c4": data / "c4" / "eval.txt", "mixture": mixture}


def calibration(data: Path, model: Path, scratch: Path) -> tuple[str, Path]:
    """Texts for moeq, and a plain file with about as many tokens of each for llama-imatrix."""
    tokenizer = load_tokenizer(model)
    lines = (data / "mixture" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    both = (
        (data / "c4" / "calibration.txt").read_text(encoding="utf-8"),
        "\n\n".join(json.loads(x)["text"] for x in lines),
    )
    parts = [tokenizer.decode(tokenizer(text)["input_ids"][: WINDOWS // 2 * CONTEXT]) for text in both]
    plain = scratch / "calibration.txt"
    plain.write_text("\n\n".join(parts), encoding="utf-8")
    return f"{data / 'c4' / 'calibration.txt'}:0.5,{data / 'mixture' / 'calibration.jsonl'}:0.5", plain


def base_of(programs: Path, first: Path, text: Path, out: Path, chunks: int) -> None:
    """The original's predictions, as llama.cpp stores them."""
    run(
        *(programs / "llama-perplexity", "-m", first, "-f", text, "-c", str(CONTEXT), "-t", "1"),
        *("--chunks", str(chunks), "--kl-divergence-base", out),
    )


def divergence(programs: Path, file: Path, base: Path) -> float:
    """Mean KL of a file to the stored predictions."""
    for _ in range(9):  # the program now and then ends before its last lines are written
        said = run(
            *(programs / "llama-perplexity", "-m", file, "-c", str(CONTEXT), "-t", "1"),
            *("--kl-divergence", "--kl-divergence-base", base),
        )
        found = re.search(r"Mean\s+KLD:\s+([\d.]+)", said)
        if found is not None:
            return float(found[1])
    raise SystemExit(said[-800:])


def theirs(programs: Path, first: Path, scratch: Path, name: str, words: tuple[str, ...], kind: str) -> Path:
    """A file by llama.cpp's quantizer."""
    file = scratch / f"{name.replace(' ', '-')}.gguf"
    run(programs / "llama-quantize", *words, first, file, kind, "1")
    return file


def ours(model: Path, first: Path, scratch: Path, text: str, size: int, seed: int) -> tuple[Path, float]:
    """A file by moeq of at most `size` bytes, and bits per expert weight.

    The program's budget is one of the packed checkpoint, whose tables of tokens have 16 bits: it is moved until the
    file is as large as wanted. Costs are measured once.
    """
    options = {
        "serve": "gguf", "method": "auto", "effort": "fast", "calibration": text, "seed": seed, "device": "cpu",
        "dense_bits": "attention=auto,shared=8,dense=8,lm_head=8",
    }  # fmt: skip
    costs, packed, file = scratch / f"costs-{seed}", scratch / "packed", scratch / "made.gguf"
    best = None
    budget = size + EMBEDDING_SAVED * sum(_rows(first))
    for _ in range(4):
        if not costs.exists():
            moeq.measure(model, **options, size=str(int(budget))).save(costs)
        shutil.rmtree(packed, ignore_errors=True)
        file.unlink(missing_ok=True)
        report = moeq.quantize(model, packed, size=str(int(budget)), costs=str(costs), quality=False, **options)
        moeq.export(packed, file, form="gguf", like=first, embeddings=4)
        over = file.stat().st_size - size
        if over <= 0:
            best = scratch / f"moeq-{size}-{seed}.gguf", report.expert_bits_per_weight
            shutil.copy(file, best[0])
            if over > -NEAR * size:
                break
        budget -= over if over > 0 else over // 2
    assert best is not None, "no file was small enough"
    return best


def speeds(programs: Path, files: list[Path]) -> list[float]:
    """Tokens a second that llama.cpp decodes with each file: medians over `ROUNDS`, files taking turns."""
    found: list[list[float]] = [[] for _ in files]
    for _ in range(ROUNDS):
        for file, rates in zip(files, found, strict=True):
            words = ("-p", "0", "-n", "64", "-d", "512", "-t", "1", "-r", "1", "-o", "json")
            said = run(programs / "llama-bench", "-m", file, *words)
            rates.append(json.JSONDecoder().raw_decode(said[said.index("[\n") :])[0][0]["avg_ts"])
    return [statistics.median(rates) for rates in found]


def _rows(file: Path) -> list[int]:
    """Weights of the table of tokens that is rounded while exporting."""
    return [int(np.prod(t.shape)) for t in gguf.GGUFReader(file).tensors if t.name == "token_embd.weight"]


def main() -> None:
    """Make all files, then judge them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("../shared/models/ref-qwen3moe-62m"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--kinds", default="Q2_K,Q3_K_M,Q4_K_M")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--theirs", action="store_true", help="files by llama-quantize alone")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    programs = args.llama_cpp / "build" / "bin"
    first, matrix = args.scratch / "F16.gguf", args.scratch / "imatrix.gguf"
    run(sys.executable, "-c", CONVERT.format(root=str(args.llama_cpp), model=str(args.model), out=str(first)))
    both, plain = calibration(args.data, args.model, args.scratch)
    run(
        *(programs / "llama-imatrix", "-m", first, "-f", plain, "-o", matrix, "-c", str(CONTEXT)),
        *("--chunks", str(WINDOWS), "-t", "1"),
    )
    own = args.scratch / "imatrix-of-moeq.gguf"
    own.unlink(missing_ok=True)
    moeq.imatrix(args.model, own, calibration=both, nsamples=WINDOWS, seqlen=CONTEXT, device="cpu")
    bases = {}
    for name, text in texts(args.data, args.scratch).items():
        bases[name] = args.scratch / f"{name}.base"
        base_of(programs, first, text, bases[name], args.chunks)
    lines: list[tuple[str, ...]] = []
    files: list[Path] = []

    def judge(title: str, file: Path, bits: str) -> None:
        found = [divergence(programs, file, base) for base in bases.values()]
        size = file.stat().st_size
        kinds = sorted({t.tensor_type.name for t in gguf.GGUFReader(file).tensors if "exps" in t.name})
        row = (title, f"{size:,}", ", ".join(kinds), bits, *(f"{kl:.4f}" for kl in found), f"{np.mean(found):.4f}")
        lines.append(row)
        files.append(file)
        print(*row, flush=True)

    for kind in args.kinds.split(","):
        with_matrix = ("--imatrix", str(matrix))
        rows = ((kind, ()), (f"{kind} imatrix", with_matrix), (f"{kind} imatrix of moeq", ("--imatrix", str(own))))
        for title, words in (*rows, (f"{kind} dynamic", with_matrix + DYNAMIC)):
            file = theirs(programs, first, args.scratch, title, words, kind)
            judge(title, file, "")
            if title.endswith(("imatrix", "dynamic")) and not args.theirs:
                for seed in map(int, args.seeds.split(",")):
                    made, bits = ours(args.model, first, args.scratch, both, file.stat().st_size, seed)
                    judge(f"moeq, seed {seed}, not larger", made, f"{bits:.3f}")
    header = ("file", "bytes", "types of experts", "expert bits", *bases, "mean KL", "tokens/s")
    rates = speeds(programs, files)
    print(markdown_table(header, [(*line, f"{rate:.0f}") for line, rate in zip(lines, rates, strict=True)]))


if __name__ == "__main__":
    main()

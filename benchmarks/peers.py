"""What other tools make of the reference model, measured like ours: the same windows, the same float32, the same code.

    python benchmarks/peers.py tokens --work DIR     write DIR/ids.pt: the calibration tokens that moeq takes (C4)
    python benchmarks/peers.py measure --work DIR --checkpoints NAME=CHECKPOINT ...

Peers run in environments of their own (AutoRound needs another transformers). What was run there:

    AutoRound(model, tokenizer, scheme="W2A16", group_size=128, sym=False, iters=20 or 200, nsamples=128, seqlen=512,
              dataset=[those tokens], device_map="cpu", layer_config={every linear outside the experts: {"bits": 16}})
        .quantize_and_save(out, format="auto_gptq")
"""

import json
from pathlib import Path

import torch
from harness import TEXTS, Bench, arguments, mean_kl, parse

from moeq.checkpoint.read import read_headers
from moeq.recipe import Recipe
from moeq.report.tables import markdown_table
from moeq.writing.calibration_text import calibration_tokens


def expert_bits(directory: Path, weights: int) -> float:
    """Stored bits per expert weight, as the files have them: codes, scales, zeros, indices of groups."""
    size = 0
    for file in directory.glob("*.safetensors"):
        head = file.open("rb")
        header = json.loads(head.read(int.from_bytes(head.read(8), "little")))
        places = [info["data_offsets"] for name, info in header.items() if ".experts." in name]
        size += sum(end - start for start, end in places)
    return 8 * size / weights


def main() -> None:
    parser = arguments("peers", __doc__, ("tokens", "measure"))
    parser.set_defaults(model=Path("../shared/models/ref-qwen3moe-62m"), nsamples=128, max_tokens=20_480)
    parser.add_argument("--checkpoints", nargs="+", default=[], metavar="NAME=CHECKPOINT")
    parser.add_argument("--seqlen", type=int, default=512)
    args = parse(parser)
    bench = Bench.of(args, seqlen=args.seqlen, evenly=True)
    if args.what == "tokens":
        recipe = Recipe(
            method="uniform", bits=3, calibration=str(bench.calibration), nsamples=args.nsamples, seqlen=args.seqlen
        )
        tokens, _ = calibration_tokens(args.model, recipe, None)
        torch.save(tokens.ids_NT, args.work / "ids.pt")
        return
    weights = sum(
        torch.Size(info.shape).numel() for name, info in read_headers(args.model).items() if ".experts." in name
    )
    rows = []
    for each in args.checkpoints:
        name, _, directory = each.partition("=")
        row = bench.measure(bench.open(Path(directory)))
        row |= {"name": name, "bits_per_weight": expert_bits(Path(directory), weights)}
        with (args.work / "peers.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
        kls = [f"{row[f'{text}_kl']:.3f}" for text in TEXTS]
        perplexities = " / ".join(f"{row[f'{text}_perplexity']:.1f}" for text in TEXTS)
        rows.append((name, f"{row['bits_per_weight']:.4f}", *kls, f"{mean_kl(row):.3f}", perplexities))
    header = (
        "checkpoint",
        "stored bits",
        *(f"KL {text}" for text in TEXTS),
        "mean KL",
        f"perplexity {' / '.join(TEXTS)}",
    )
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()

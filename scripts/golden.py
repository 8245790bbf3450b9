"""Hashes of what moeq writes, to show that a change of the house changed nothing: run before and after, and compare.

    python scripts/golden.py before.json
    python scripts/golden.py after.json --compare before.json

Every method packs the bundled model with few tokens on one thread; hashed are all files of the checkpoints and the JSON
documents of the verbs, without times and paths. Sums of floats differ between processors: compare on one machine only.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

ASSETS = Path(__file__).parent.parent / "assets"
MODEL, TEXT, EVAL = (str(ASSETS / name) for name in ("demo-qwen3moe-4m", "text/calibration.txt", "text/eval.txt"))
FEW = ["--calibration", TEXT, "--nsamples", "4", "--seqlen", "64", "--seed", "3"]
METHODS = {
    "uniform-rtn": ["--bits", "3.7", "--quantizer", "rtn", "--dense-bits", "8"],
    "uniform-hqq": ["--bits", "3.2"],
    "uniform-minmax": ["--bits", "5", "--quantizer", "minmax", "--group-size", "32", "--levels", "asym16"],
    "uniform-gptq": ["--bits", "2.6", *FEW],
    "uniform-gptq-mc": ["--bits", "2.6", "--quantizer", "gptq-mc", *FEW],
    "uniform-vector": ["--bits", "3.2", "--quantizer", "vector", *FEW],
    "size-dense": ["--method", "gemq", "--router", "none", "--dense-bits", "auto", "--size", "3.4MB", *FEW],
    "pmq": ["--method", "pmq", "--bits", "2.3", *FEW],
    "alphaq": ["--method", "alphaq", "--bits", "2.5"],
    "gemq": ["--method", "gemq", "--bits", "2.3", *FEW],
    "gemq-progressive": ["--method", "gemq", "--bits", "2.2", "--progressive", "3", *FEW],
    "bitsmoe": ["--method", "bitsmoe", "--bits", "3", *FEW],
    "bitsmoe-gptq": ["--method", "bitsmoe", "--bits", "3", "--quantizer", "gptq", *FEW],
    "tileq": ["--method", "tileq", "--bits", "3.3", "--rank", "4", "--tile-options", "rotation=expert", *FEW],
    "tileq-vector": ["--method", "tileq", "--bits", "3.3", "--quantizer", "vector", "--rank", "2", *FEW],
}
VOLATILE = {"seconds", "peak_rss", "load_seconds", "command", "model", "output", "directory", "path", "file", "created"}


def run(words: list[str]) -> dict[str, Any]:
    """The JSON document of a call of the command line."""
    from moeq import cli

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main([*words, "--json"])
    if status:
        raise SystemExit(f"{' '.join(words)} failed with {status}: {err.getvalue()[-2000:]}")
    return json.loads(out.getvalue())


def steady(value: Any) -> Any:
    """A document without what changes from run to run."""
    if isinstance(value, dict):
        return {
            key: steady(inner)
            for key, inner in value.items()
            if key not in VOLATILE and not key.endswith(("_seconds", "_hash", "_per_second"))
        }
    if isinstance(value, list):
        return [steady(inner) for inner in value]
    return value if not (isinstance(value, str) and "/" in value) else "path"


def digest(value: Any) -> str:
    """The hash of a document."""
    return hashlib.sha256(json.dumps(steady(value), sort_keys=True).encode()).hexdigest()[:16]


def files_of(directory: Path) -> dict[str, str]:
    """File -> hash; what names the command or this machine is left out."""
    found = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in ("README.md", "moeq_recipe.yaml", "recipe.yaml"):
            found[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def main() -> None:
    """Hash everything, and compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=Path, help="hashes of before; exits with 1 where they differ")
    parser.add_argument("--only", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            options, out = METHODS[name], Path(scratch) / name
            found[f"{name}: plan"] = digest(run(["plan", MODEL, *options]))
            found[f"{name}: quantize"] = digest(run(["quantize", MODEL, str(out), "--device", "cpu", *options]))
            found[f"{name}: files"] = files_of(out)
            found[f"{name}: inspect"] = digest(run(["inspect", str(out)]))
            found[f"{name}: verify"] = digest(run(["verify", str(out)]))
            found[f"{name}: eval"] = digest(
                run(["eval", str(out), "--text", EVAL, "--reference", MODEL, "--seqlen", "64", "--max-tokens", "512"])
            )
            print(name, file=sys.stderr)
        costs = str(Path(scratch) / "costs.json")
        found["measure"] = digest(run(["measure", MODEL, costs, "--method", "gemq", "--device", "cpu", *FEW]))
        found["pareto"] = digest(run(["pareto", MODEL, "--method", "gemq", "--costs", costs]))
        plan = str(Path(scratch) / "plan.json")
        found["allocate"] = digest(
            run(["allocate", MODEL, plan, "--method", "gemq", "--costs", costs, "--bits", "2.5"])
        )
        found["generate"] = digest(run(["generate", str(Path(scratch) / args.only[0]), "The", "--max-new-tokens", "8"]))
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    if args.compare:
        before = json.loads(args.compare.read_text())
        changed = [key for key in sorted({*before, *found}) if before.get(key) != found.get(key)]
        for key in changed:
            print(f"{key}: {before.get(key)} -> {found.get(key)}")
        raise SystemExit(1 if changed else 0)


if __name__ == "__main__":
    main()

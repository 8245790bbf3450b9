"""An exported checkpoint in the real vLLM: differences of log-probabilities, against moeq's own answers.

    python benchmarks/vllm_export.py ask --packed PACKED --exported EXPORTED --text FILE --scratch DIR
    VLLM/bin/python benchmarks/vllm_export.py answer --exported EXPORTED --scratch DIR       (in vLLM's environment)
    python benchmarks/vllm_export.py compare --packed PACKED --original MODEL --scratch DIR

EXPORTED is what `moeq export compressed-tensors` made of PACKED. vLLM on CPUs has kernels for 4 bits alone, in groups
of 64 or 128, and only on processors with AMX. `answer` on the original gives the control: what bfloat16 alone changes.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

WINDOWS, LENGTH = 8, 128
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def ask(args: argparse.Namespace) -> None:
    """Write the windows that are asked about."""
    from moeq.runtime.load import load_tokenizer

    ids = load_tokenizer(args.packed)(args.text.read_text(encoding="utf-8"))["input_ids"]
    windows = [ids[at * LENGTH : (at + 1) * LENGTH] for at in range(WINDOWS)]
    (args.scratch / "windows.json").write_text(json.dumps(windows))


def answer(args: argparse.Namespace) -> None:
    """Log-probabilities of every token of the windows, by vLLM."""
    os.environ.update(QUIET)
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=str(args.exported), dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=4, seed=0,
        distributed_executor_backend="uni",
    )  # fmt: skip
    windows = json.loads((args.scratch / "windows.json").read_text())
    asked = [{"prompt_token_ids": ids} for ids in windows]
    done = llm.generate(asked, SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=0))
    found = [[next(iter(token.values())).logprob for token in each.prompt_logprobs[1:]] for each in done]
    (args.scratch / f"answers-{args.exported.name}.json").write_text(json.dumps(found))


def compare(args: argparse.Namespace) -> None:
    """Mean differences, in nats."""
    import torch

    from moeq.runtime.load import load_any

    ids_NT = torch.tensor(json.loads((args.scratch / "windows.json").read_text()))

    def own(model: Any) -> torch.Tensor:
        with torch.no_grad():
            logs_NTV = model(input_ids=ids_NT).logits.float().log_softmax(-1)
        return logs_NTV[:, :-1].gather(-1, ids_NT[:, 1:, None])[..., 0]

    wanted = {
        args.packed.name: own(load_any(args.packed, "cpu", torch.float32)),
        args.original.name: own(load_any(args.original, "cpu", torch.float32)),
    }
    for path in sorted(args.scratch.glob("answers-*.json")):
        found = torch.tensor(json.loads(path.read_text()))
        for name, values in wanted.items():
            away = (found - values).abs().mean()
            print(f"{path.stem.removeprefix('answers-')} in vLLM against {name} in float32: {away:.4f}")
    ours, original = wanted.values()
    print(f"{args.packed.name} against {args.original.name}, both in float32: {(ours - original).abs().mean():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("ask", "answer", "compare"))
    for name in ("packed", "exported", "original", "text", "scratch"):
        parser.add_argument(f"--{name}", type=Path)
    args = parser.parse_args()
    {"ask": ask, "answer": answer, "compare": compare}[args.what](args)


if __name__ == "__main__":
    main()

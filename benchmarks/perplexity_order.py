"""Why perplexity and KL order rows differently: how sharp the answers are.

    python benchmarks/perplexity_order.py [--model MODEL] [--max-tokens 8192]

Logits of the original and of packed models are divided by a temperature before both measures are taken. KL is always
to the original at temperature 1.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from harness import BATCH, TEXTS, Bench, arguments, parse
from torch import Tensor

from moeq.report.tables import markdown_table

TEMPERATURES = (0.9, 1.0, 1.1, 1.2)


@torch.no_grad()
def logits_of(model: Any, rows: list[Tensor]) -> Iterator[Tensor]:
    """Of one window after the other, (T, V)."""
    for start in range(0, len(rows), BATCH):
        yield from model(input_ids=torch.stack(rows[start : start + BATCH]), use_cache=False).logits.float()


def measured(model: Any, original: Any, bench: Bench) -> dict[float, tuple[float, float, float]]:
    """Temperature -> perplexity, KL and mean entropy, the mean over texts (of logarithms)."""
    sums = {t: torch.zeros(3, dtype=torch.float64) for t in TEMPERATURES}
    for name in TEXTS:
        rows = bench.windows[name]
        count = sum(len(row) - 1 for row in rows)
        for row, theirs_TV, ours_TV in zip(rows, logits_of(original, rows), logits_of(model, rows), strict=True):
            p_TV = theirs_TV[:-1].log_softmax(-1)
            for t in TEMPERATURES:
                q_TV = (ours_TV[:-1] / t).log_softmax(-1)
                loss = -q_TV.gather(-1, row[1:, None]).sum()
                kl = (p_TV.exp() * (p_TV - q_TV)).sum()
                entropy = -(q_TV.exp() * q_TV).sum()
                sums[t] += torch.stack((loss, kl, entropy)).double() / count / len(TEXTS)
    return {t: (float(total[0].exp()), float(total[1]), float(total[2])) for t, total in sums.items()}


def main() -> None:
    """One table."""
    parser = arguments("perplexity_order", __doc__)
    parser.set_defaults(model=Path("../shared/models/ref-qwen3moe-62m"), nsamples=128, max_tokens=8192)
    args = parse(parser)
    bench = Bench.of(args, seqlen=512, evenly=True)
    original = bench.open(bench.model)
    found = {"the original": measured(original, original, bench)}
    for name, options in (
        ("uniform", {}),
        ("uniform, scales not grown", {"gain": False}),
        ("uniform, rounded to nearest", {"quantizer": "rtn"}),
    ):
        with bench.packed(method="uniform", bits=2.125, **bench.options(**options)) as (packed, _):
            found[name] = measured(bench.open(packed), original, bench)
    lines = [
        (name, f"{t:g}", f"{ppl:.2f}", f"{kl:.4f}", f"{entropy:.3f}")
        for name, rows in found.items()
        for t, (ppl, kl, entropy) in rows.items()
    ]
    print(markdown_table(("what", "temperature", "perplexity", "KL", "entropy"), lines))
    print(json.dumps(found))


if __name__ == "__main__":
    main()

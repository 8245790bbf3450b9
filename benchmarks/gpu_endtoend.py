"""The bundled model packed on the GPU by each method, loaded there, and compared with itself on the CPU."""

import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu_model import captured
from transformers import StaticCache

import moeq

ASSETS = Path(__file__).parent.parent / "assets"
MODEL, TEXT = ASSETS / "demo-qwen3moe-4m", ASSETS / "text" / "calibration.txt"
METHODS: dict[str, dict[str, Any]] = {
    "uniform gptq": {"bits": 3.2},
    "uniform hqq": {"bits": 3.2, "quantizer": "hqq", "dense_bits": "8"},
    "uniform vector": {"bits": 3.2, "quantizer": "vector"},
    "uniform trellis": {"bits": 2.2, "quantizer": "trellis"},
    "bitsmoe": {"method": "bitsmoe", "bits": 3},
    "tileq": {"method": "tileq", "bits": 3.3, "rank": 4},
    "gemq": {"method": "gemq", "bits": 2.5},
    "alphaq": {"method": "alphaq", "bits": 2.5},
    "pmq": {"method": "pmq", "bits": 2.5},
}
DATALESS = ("uniform hqq",)
SMOKE_METHODS = ("uniform hqq",)
NEW_TOKENS = 16


def rows(device: torch.device, *, smoke: bool, quick: bool, until: float) -> Iterator[dict[str, Any]]:
    """A row for each method."""
    text = {"calibration": TEXT, "nsamples": 4 if smoke else 16, "seqlen": 32 if smoke else 128}
    for name in SMOKE_METHODS if smoke else METHODS:
        if time.monotonic() > until:
            yield {"what": name, "skipped": "out of time"}
            continue
        options = METHODS[name] | ({} if name in DATALESS else text)
        with TemporaryDirectory() as scratch:
            start = time.perf_counter()
            moeq.quantize(MODEL, Path(scratch) / "packed", device=str(device), quality=False, **options)
            seconds = time.perf_counter() - start
            yield {"what": name, "pack s": seconds, **_compare(Path(scratch) / "packed", device, smoke=smoke)}


@torch.no_grad()
def _compare(packed: Path, device: torch.device, *, smoke: bool) -> dict[str, Any]:
    """Logits and greedy tokens on the GPU against those on the CPU, and those of a captured graph."""
    here = moeq.load(packed, device="cpu", dtype="float32", exact_activations=True)
    start = time.perf_counter()
    there = moeq.load(packed, device=device, dtype="float32")
    seconds = time.perf_counter() - start
    ids_BT = torch.arange(1, 1 + (8 if smoke else 64)).view(2, -1) * 7 % 4000 + 1
    wanted = here(input_ids=ids_BT, use_cache=False).logits
    found = there(input_ids=ids_BT.to(device), use_cache=False).logits.cpu()
    row: dict[str, Any] = {
        "load s": seconds,
        "error": ((found - wanted).norm() / wanted.norm()).item(),
        "same top-1": (found.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
    }
    count = 2 if smoke else NEW_TOKENS
    given: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
    spoken = [model.generate(ids_BT[:1].to(model.device), **given).cpu() for model in (here, there)]
    row["same tokens"] = (spoken[0] == spoken[1]).float().mean().item()
    if smoke:
        return row | {"graph": "skipped: needs CUDA"}
    cache = StaticCache(config=there.config, max_cache_len=64)
    token, position = torch.full((1, 1), 5, device=device), torch.tensor([7], device=device)

    def step() -> torch.Tensor:
        return there(
            input_ids=token, past_key_values=cache, position_ids=position.unsqueeze(0), cache_position=position
        ).logits

    plain = step().clone()
    graph, answer = captured(step)
    graph.replay()
    torch.cuda.synchronize()
    row["graph"] = "same" if torch.allclose(answer, plain, rtol=1e-3, atol=1e-3) else "differs"
    return row

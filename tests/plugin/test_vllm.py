"""Packed checkpoints in the real vLLM: `make test-vllm` makes an environment that has it and runs this there.

vLLM reads a checkpoint as it is; what it says must be what moeq says in transformers, in float32.
"""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

import gc
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="make test-vllm runs it in an environment of its own")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import moeq
from moeq.errors import OptionError

FEW: dict[str, Any] = {"device": "cpu", "quality": False, "seqlen": 64, "nsamples": 8}
WAYS: dict[str, dict[str, Any]] = {
    "grouped, mixed": {"method": "uniform", "quantizer": "rtn", "bits": 2.6, "group_size": 64},
    "grouped, other linears too": {
        "method": "uniform", "quantizer": "rtn", "bits": 3.4, "dense_bits": "attention=6,lm_head=8",
    },
    "trellises": {"method": "gemq", "bits": 2.5, "cost": "weight-error", "quantizer": "trellis"},
    "spectral": {"method": "bitsmoe", "bits": 3.0},
    "tiled": {"method": "tileq", "bits": 3.2, "rank": "4"},
    "ggml": {"method": "uniform", "serve": "gguf", "calibration": "none", "bits": 5},
}  # fmt: skip
IDS = [[(7 * at + at * at + 31 * row) % 4000 for at in range(48)] for row in range(6)]
NEW = 12


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, demo_dir: Path, calibration_text: Path) -> Any:
    """Name of a way -> the bundled model packed so."""
    made: dict[str, Path] = {}

    def make(way: str) -> Path:
        if way not in made:
            made[way] = tmp_path_factory.mktemp("vllm") / "packed"
            options = {"calibration": calibration_text, **WAYS[way]}
            moeq.quantize(demo_dir, made[way], **options, **FEW)
        return made[way]

    return make


def serving(model: Path, **more: Any) -> LLM:
    """The model in this process."""
    usual = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 8, "seed": 0}
    return LLM(str(model), **(usual | {"enforce_eager": True, "distributed_executor_backend": "uni"} | more))


def said(llm: LLM, ids: list[list[int]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probability of every token of some windows but the first, and what comes after them."""
    ask = SamplingParams(max_tokens=NEW, temperature=0, prompt_logprobs=0)
    done = llm.generate([{"prompt_token_ids": each} for each in ids], ask, use_tqdm=False)
    logs = [[next(iter(token.values())).logprob for token in each.prompt_logprobs[1:]] for each in done]
    return torch.tensor(logs), [list(each.outputs[0].token_ids) for each in done]


def wanted(model: Path, ids: list[list[int]]) -> tuple[torch.Tensor, list[list[int]]]:
    """The same by transformers."""
    ours = moeq.load(model, device="cpu", dtype="float32")
    ids_NT = torch.tensor(ids)
    with torch.no_grad():
        logs_NTV = ours(input_ids=ids_NT).logits.log_softmax(-1)
        out = ours.generate(ids_NT, attention_mask=torch.ones_like(ids_NT), max_new_tokens=NEW, do_sample=False)
    return logs_NTV[:, :-1].gather(-1, ids_NT[:, 1:, None])[..., 0], out[:, ids_NT.shape[1] :].tolist()


def closed(llm: LLM) -> None:
    """Give back what an engine holds."""
    del llm
    cleanup_dist_env_and_memory()
    gc.collect()


@pytest.mark.parametrize("way", WAYS)
def test_it_says_what_transformers_says(way: str, packed: Any) -> None:
    llm = serving(packed(way))
    logs, out = said(llm, IDS)
    closed(llm)
    right, wanted_out = wanted(packed(way), IDS)
    assert (logs - right).abs().mean() < 1e-5
    same = sum(a == b for one, other in zip(out, wanted_out, strict=True) for a, b in zip(one, other, strict=False))
    assert same >= 0.9 * NEW * len(IDS)  # where two words are as likely, a rounding decides


def test_a_compiled_graph_and_pieces_of_prompts(packed: Any) -> None:
    """torch compiles around the operators; prompts come in pieces, and a known beginning is not read again."""
    way = "grouped, mixed"
    llm = serving(
        packed(way), enforce_eager=False, enable_prefix_caching=True, enable_chunked_prefill=True,
        max_num_batched_tokens=32, max_num_seqs=4,
    )  # fmt: skip
    ask = SamplingParams(max_tokens=NEW, temperature=0)
    prompts = [{"prompt_token_ids": each} for each in IDS]
    first = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, ask, use_tqdm=False)]
    again = [list(each.outputs[0].token_ids) for each in llm.generate(prompts, ask, use_tqdm=False)]
    closed(llm)
    assert again == first
    _, right = wanted(packed(way), IDS)
    same = sum(a == b for one, other in zip(first, right, strict=True) for a, b in zip(one, other, strict=False))
    assert same >= 0.9 * NEW * len(IDS)


def test_what_is_missing_is_said(packed: Any, tmp_path: Path) -> None:
    shutil.copytree(packed("grouped, mixed"), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="format version 99"):
        serving(tmp_path / "other")


@pytest.mark.parametrize("experts", [False, True])
def test_two_ranks(experts: bool, packed: Any, tmp_path: Path) -> None:
    """Experts are dealt out whole, whether tensors are split or experts."""
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "if __name__ == '__main__':\n"
        "    from test_vllm import IDS, said, serving\n"
        "    llm = serving(sys.argv[2], tensor_parallel_size=2, enable_expert_parallel=sys.argv[3] == 'True',\n"
        "                  distributed_executor_backend='mp')\n"
        "    logs, out = said(llm, IDS)\n"
        "    json.dump([logs.tolist(), out], open(sys.argv[4], 'w'))\n"
    )
    (tmp_path / "run.py").write_text(script)
    words = [sys.executable, tmp_path / "run.py", Path(__file__).parent, packed("grouped, mixed"), experts]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    subprocess.run([*map(str, words), str(tmp_path / "out.json")], check=True, env=environment, timeout=400)
    logs, _ = json.loads((tmp_path / "out.json").read_text())
    right, _ = wanted(packed("grouped, mixed"), IDS)
    assert (torch.tensor(logs) - right).abs().mean() < 1e-5


def test_packed_linears_are_not_split(packed: Any) -> None:
    from moeq.integrations.vllm import Config, Packed

    entry = Config.from_config(
        json.loads((packed("grouped, other linears too") / "config.json").read_text())["quantization_config"]
    )
    part = entry.dense["model.layers.0.self_attn.o_proj"]
    with pytest.raises(OptionError, match="cannot be split over ranks"):
        Packed((part,), entry, "x").create_weights(
            torch.nn.Module(), part.shape[1] // 2, [part.shape[0]], part.shape[1], part.shape[0], torch.float32
        )


def test_a_server_and_many_who_ask(packed: Any, tmp_path: Path) -> None:
    """`vllm serve DIR` knows the format without a flag; 64 requests at once get what one alone gets."""
    port = 18473
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(packed("grouped, mixed")), "--port", str(port)]
    more = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "16", "--enforce-eager"]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([sys.executable, *words, *more, "--served-model-name", "packed"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 300
        while not _healthy(port):
            assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(1)

        def ask(number: int) -> str:
            body = {"model": "packed", "prompt": IDS[number % 6], "max_tokens": NEW, "temperature": 0}
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=120) as answer:
                return str(json.load(answer)["choices"][0]["text"])

        alone = [ask(number) for number in range(6)]
        with ThreadPoolExecutor(64) as pool:
            many = list(pool.map(ask, range(64)))
    finally:
        server.terminate()
        server.wait(60)
        log.close()
    assert sum(many[number] == alone[number % 6] for number in range(64)) >= 60


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False

"""Continues a text, to see a model speak."""

from dataclasses import dataclass
from pathlib import Path

import torch

from moeq.arch.gguf_source import open_source
from moeq.errors import OptionError
from moeq.runtime.ahead import Told
from moeq.runtime.growing import growing_cache
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages.chat import Pieces, Sampling, Show


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateReport:
    """A prompt and what the model added."""

    model: str
    prompt: str
    continuation: str
    new_tokens: int


def run(
    model: str | Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
    compiled: Told | None = None,
    show: Show | None = None,
) -> GenerateReport:
    """Continue `prompt`, greedily at temperature 0; `compiled` is told of kernels that are compiled for a GPU.

    `show` gets the continuation piece by piece, as it comes.

    Code in its directory is run only with `trust_remote_code`, and only if transformers does not have the model.

    Raises:
        OptionError: empty prompt, or a count or temperature that makes no sense.
        CheckpointError, PackedError: the model cannot be loaded.
    """
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    directory = open_source(model)
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if ids.numel() == 0:
        raise OptionError("the prompt has no tokens", option="prompt", fix="give some text")
    loaded = load_any(directory, device, exact_activations=None, trust_remote_code=trust_remote_code, compiled=compiled)
    with torch.random.fork_rng(enabled=temperature > 0), torch.inference_mode():
        torch.manual_seed(seed)
        output = loaded.generate(
            ids.to(loaded.device),
            attention_mask=torch.ones_like(ids).to(loaded.device),
            past_key_values=growing_cache(loaded),
            streamer=None if show is None else Pieces(tokenizer, show),
            **sampling.arguments(tokenizer),
        )
    added = output[0, ids.shape[1] :]
    return GenerateReport(
        model=str(directory),
        prompt=prompt,
        continuation=tokenizer.decode(added, skip_special_tokens=True),
        new_tokens=int(added.numel()),
    )

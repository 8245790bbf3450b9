"""Measures how fast a packed checkpoint runs on this machine's CPU, against the speed at which its memory is read.

A token that is decoded must read every weight that takes part in it once: bytes per token over bytes per second is the
time that no program can go below (the roofline). Both are measured here, in one run, with the same threads.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from moeq import native
from moeq.arch.gguf_source import open_source
from moeq.errors import OptionError
from moeq.layouts.grouped.serving import PackedLinear
from moeq.layouts.serving import ExpertsModule
from moeq.runtime import load
from moeq.runtime.growing import growing_cache
from moeq.stages.breakdown import Part, watched

Progress = Callable[[str, int, int], None]

BUFFER_BYTES: Final = 256 << 20
"""What the bandwidth is measured on: more than last-level caches hold."""
PROFILED_TOKENS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """What was measured; see docs/json.md."""

    model: str
    threads: int
    dtype: str
    kernels: str
    load_seconds: float
    prefill_tokens: int
    prefill_tokens_per_second: float
    decode_tokens: int
    decode_tokens_per_second: float
    bytes_per_token: int
    expert_bytes_per_token: int
    read_bandwidth: float | None
    roofline_tokens_per_second: float | None
    roofline_share: float | None
    shares: dict[str, float]
    breakdown: tuple[Part, ...]
    peak_rss: int


def run(
    model: str | Path,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    threads: int | None = None,
    exact_activations: bool = False,
    breakdown: bool = False,
    progress: Progress | None = None,
) -> BenchReport:
    """Run random tokens through a packed checkpoint, on the CPU.

    Args:
        model: what `moeq quantize` wrote.
        prompt_tokens: tokens of the prompt, which are processed at once.
        new_tokens: tokens decoded after it, one by one.
        threads: of torch and of the kernels; None leaves torch's number.
        exact_activations: do not round activations when decoding (`moeq.load`).
        breakdown: say what each kind of module takes of a token.
        progress: called with what is done, how much of it, and how much there is.

    Raises:
        OptionError: a count below 1, or a prompt that is too long for the model.
        PackedError: not a packed checkpoint, or a damaged one.
    """
    for option, value in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens), ("threads", threads)):
        if value is not None and value < 1:
            raise OptionError(f"{value} is too small", option=option, fix="give at least 1")
    directory = open_source(model)
    started = time.perf_counter()
    loaded = load.load(directory, device="cpu", exact_activations=exact_activations or None)
    load_seconds = time.perf_counter() - started
    longest = load.context_length(loaded)
    if prompt_tokens + new_tokens + PROFILED_TOKENS > longest:
        raise OptionError(
            f"prompt, {new_tokens} new tokens and {PROFILED_TOKENS} to profile exceed the model's {longest}",
            option="prompt-tokens",
            fix="give fewer",
        )
    with _threads(threads), torch.inference_mode():
        measured = _measure(loaded, str(directory), load_seconds, prompt_tokens, new_tokens, progress or _silent)
        return replace(measured, breakdown=_broken_down(loaded, prompt_tokens)) if breakdown else measured


def _measure(
    model: Any, name: str, load_seconds: float, prompt_tokens: int, new_tokens: int, progress: Progress
) -> BenchReport:
    prompt = _prompt(model, prompt_tokens)
    buffer = torch.ones(BUFFER_BYTES, dtype=torch.uint8) if native.available() else None
    bandwidths = []
    first: dict[str, Any] = {}
    prefill = []
    for round_ in range(2):  # the first one reads pages from disk
        started = time.perf_counter()
        first = _read(model, prompt)
        prefill.append(time.perf_counter() - started)
        progress("prefill", round_ + 1, 2)
    cache, token = first["past_key_values"], _likeliest(first)
    steps: list[float] = []
    expert_bytes: list[int] = []
    for step in range(new_tokens):
        if buffer is not None and step % max(1, new_tokens // 8) == 0:  # bandwidth changes while others compute
            bandwidths.append(native.read_bandwidth(buffer))
        started = time.perf_counter()
        token = _next(model, token, cache)
        steps.append(time.perf_counter() - started)
        progress("decode", step + 1, new_tokens)
    with _timed(model) as seconds, _counted(model, expert_bytes):
        started = time.perf_counter()
        for _ in range(PROFILED_TOKENS):
            token = _next(model, token, cache)
        total = time.perf_counter() - started
    per_token = sum(expert_bytes) // PROFILED_TOKENS
    all_bytes = per_token + _other_bytes(model)
    speed = 1 / statistics.median(steps)
    bandwidth = statistics.median(bandwidths) if bandwidths else None
    roofline = bandwidth / all_bytes if bandwidth is not None else None
    shares = {part: value / total for part, value in seconds.items()}
    return BenchReport(
        model=name,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        kernels=native.isas()[0] if native.available() else "torch",
        load_seconds=load_seconds,
        prefill_tokens=prompt_tokens,
        prefill_tokens_per_second=prompt_tokens / min(prefill),
        decode_tokens=new_tokens,
        decode_tokens_per_second=speed,
        bytes_per_token=all_bytes,
        expert_bytes_per_token=per_token,
        read_bandwidth=bandwidth,
        roofline_tokens_per_second=roofline,
        roofline_share=None if roofline is None else speed / roofline,
        shares={**shares, "rest": 1 - sum(shares.values())},
        breakdown=(),
        peak_rss=_peak_rss(),
    )


def _prompt(model: Any, tokens: int) -> torch.Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))


def _read(model: Any, prompt: torch.Tensor) -> Any:
    """A prompt's answer: logits of its last token alone where the family can, as `generate` asks for them."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return model(input_ids=prompt, past_key_values=growing_cache(model), use_cache=True, **last)


def _next(model: Any, token: torch.Tensor, cache: Any) -> torch.Tensor:
    return _likeliest(model(input_ids=token, past_key_values=cache, use_cache=True))


def _likeliest(answer: Any) -> torch.Tensor:
    """The token after the last one, (B, 1)."""
    found: torch.Tensor = answer["logits"][:, -1:].argmax(-1)
    return found


def _broken_down(model: Any, prompt_tokens: int) -> tuple[Part, ...]:
    """What modules take of tokens after a prompt."""
    out = _read(model, _prompt(model, prompt_tokens))
    cache, token = out["past_key_values"], _likeliest(out)
    with watched(model) as found:
        for _ in range(PROFILED_TOKENS):
            token = _next(model, token, cache)
    return found.parts(PROFILED_TOKENS)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _hooked(hooks: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _timed(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds that experts and other linears take, while the context lasts."""
    seconds = {"experts": 0.0, "linears": 0.0}
    starts: list[float] = []

    def before(*_: Any) -> None:
        starts.append(time.perf_counter())

    def after(part: str, *_: Any) -> None:
        seconds[part] += time.perf_counter() - starts.pop()

    hooks = []
    for module in model.modules():
        part = "experts" if _is_experts(module) else "linears" if _is_linear(module) else None
        if part is not None:
            hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(partial(after, part))]
    with _hooked(hooks):
        yield seconds


@contextmanager
def _counted(model: nn.Module, sizes: list[int]) -> Iterator[None]:
    """Collects the bytes of the experts that are chosen, while the context lasts."""

    def count(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        sizes.append(_chosen_bytes(module, arguments[2]))

    with _hooked([module.register_forward_pre_hook(count) for module in model.modules() if _is_experts(module)]):
        yield


def _is_experts(module: nn.Module) -> bool:
    return isinstance(module, ExpertsModule)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, PackedLinear | nn.Linear)


def _chosen_bytes(module: nn.Module, index_Tk: torch.Tensor) -> int:
    """Bytes that the chosen experts of a layer take, with all that they share."""
    assert isinstance(module, ExpertsModule)
    return module.chosen_bytes(_chosen(index_Tk, module.layer.num_experts))


def _chosen(index_Tk: torch.Tensor, num_experts: int) -> list[int]:
    return [expert for expert in torch.unique(index_Tk).tolist() if expert < num_experts]


def _other_bytes(model: Any) -> int:
    """Everything but experts and embeddings: read once for each token."""
    tables = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    output = model.get_output_embeddings()
    tied = 0
    if isinstance(output, nn.Linear) and id(output.weight) in tables:  # one table for both: the output reads all of it
        tied = output.weight.numel() * output.weight.itemsize
    plain = sum(p.numel() * p.itemsize for p in model.parameters() if id(p) not in tables)
    packed = sum(module.matrix.record.numel() for module in model.modules() if isinstance(module, PackedLinear))
    return plain + packed + tied


def _peak_rss() -> int:
    """Most bytes of memory that this process ever held, mapped files included; 0 where the system does not say."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmHWM")), 0)


def _silent(_what: str, _done: int, _total: int) -> None:
    pass

"""Streaming block by block gives what the whole model gives."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moeq.arch import hooks
from moeq.arch.inventory import read_inventory
from moeq.arch.keymap import build_keymap, load_prefix, unload_prefix
from moeq.arch.meta import build_meta_model
from moeq.calibration.spill import SpillPool
from moeq.calibration.stream import Capture, Streamer, _Log
from moeq.checkpoint.read import Reader


class Loader:
    def __init__(self, model, keymap, reader) -> None:
        self.model, self.keymap, self.reader = model, keymap, reader
        self.loaded: list[str] = []

    def __call__(self, block: str) -> nn.Module:
        load_prefix(self.model, block, self.keymap, self.reader.tensor, torch.float32)
        self.loaded.append(block)
        return self.model.get_submodule(block)

    def unload(self, block: str) -> None:
        unload_prefix(self.model, block)
        self.loaded.remove(block)


def stream(directory: Path, ids_NT: Tensor, visitor, routing: str | int = "natural", tmp: Path = Path()) -> Loader:
    inventory, headers = read_inventory(directory)
    hooks.register_experts()
    driver, skeleton = build_meta_model(directory), build_meta_model(directory)
    for layer in inventory.layers:
        hooks.strip_weights(skeleton, layer.path)
    blocks = tuple(layer.block for layer in inventory.layers)
    with Reader(directory, headers) as reader:
        keymap = build_keymap(driver, headers)
        load_prefix(driver, "", keymap, reader.tensor, torch.float32, skip=blocks)
        loader = Loader(skeleton, keymap, reader)
        Streamer(
            driver=driver,
            blocks=blocks,
            loader=loader,
            experts={layer.path: index for index, layer in enumerate(inventory.layers)},
            top_k=tuple(layer.top_k for layer in inventory.layers),
            hidden=tuple(layer.shapes["down"][0] for layer in inventory.layers),
            visitor=visitor,
            pool=SpillPool(tmp),
            device=torch.device("cpu"),
            routing=routing,
        ).run(ids_NT)
    return loader


def whole_model_calls(directory: Path, ids_NT: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What each experts module of the unstreamed model was asked, and answered."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    calls = []
    for module in model.modules():
        if hasattr(module, "is_transposed"):
            module.register_forward_hook(lambda _, args, out: calls.append((*args, out)))
    with torch.inference_mode():
        model(input_ids=ids_NT, use_cache=False)
    return calls


def test_streaming_equals_the_whole_model(demo_dir: Path, tmp_path: Path) -> None:
    ids_NT = torch.randint(0, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
    calls = whole_model_calls(demo_dir, ids_NT)
    seen: list[Capture] = []

    def visitor(layer: int, experts: nn.Module, capture: Capture) -> Tensor:
        seen.append(capture)
        return calls[layer][3]

    loader = stream(demo_dir, ids_NT, visitor, tmp=tmp_path)
    assert len(seen) == len(calls) == 4
    assert loader.loaded == []
    for capture, (x_TH, index_Tk, weights_Tk, _) in zip(seen, calls, strict=True):
        torch.testing.assert_close(capture.x_TH, x_TH, rtol=1e-4, atol=1e-5)
        assert torch.equal(capture.index_Tk, index_Tk)
        torch.testing.assert_close(capture.weights_Tk, weights_Tk, rtol=1e-4, atol=1e-6)
        assert capture.stats_Tk is capture.index_Tk


def test_micro_batches_do_not_change_what_is_seen(demo_dir: Path, tmp_path: Path, monkeypatch) -> None:
    ids_NT = torch.randint(0, 4000, (7, 16), generator=torch.Generator().manual_seed(1))
    runs = []
    for tokens in (16, 48, 10_000):
        monkeypatch.setattr("moeq.calibration.stream.MICRO_BATCH_TOKENS", tokens)
        captures: list[Capture] = []

        def visitor(layer: int, experts: nn.Module, capture: Capture, captures: list = captures) -> Tensor:
            captures.append(capture)
            return capture.x_TH * 0.5

        stream(demo_dir, ids_NT, visitor, tmp=tmp_path)
        runs.append(captures)
    for other in runs[1:]:
        for left, right in zip(runs[0], other, strict=True):
            torch.testing.assert_close(left.x_TH, right.x_TH, rtol=1e-4, atol=1e-5)
            assert torch.equal(left.index_Tk, right.index_Tk)


@pytest.mark.parametrize("tokens", [24, 10_000])
def test_there_may_be_as_many_sequences_as_tokens(tokens: int, demo_dir: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("moeq.calibration.stream.MICRO_BATCH_TOKENS", tokens)
    ids_NT = torch.randint(0, 4000, (13, 12), generator=torch.Generator().manual_seed(3))
    runs = []
    for count in (13, 12):  # the second has as many as tokens
        captures: list[Capture] = []

        def visitor(layer: int, experts: nn.Module, capture: Capture, captures: list = captures) -> Tensor:
            captures.append(capture)
            return capture.x_TH * 0.5

        stream(demo_dir, ids_NT[:count], visitor, routing=2, tmp=tmp_path)
        runs.append(captures)
    for more, square in zip(*runs, strict=True):
        for name in ("x_TH", "index_Tk", "weights_Tk", "stats_Tk"):
            found, wanted = getattr(square, name), getattr(more, name)[: 12 * 12]
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_wider_routing_keeps_the_natural_choices(demo_dir: Path, tmp_path: Path) -> None:
    ids_NT = torch.randint(0, 4000, (3, 16), generator=torch.Generator().manual_seed(2))
    captures: list[Capture] = []

    def visitor(layer: int, experts: nn.Module, capture: Capture) -> Tensor:
        captures.append(capture)
        return torch.zeros_like(capture.x_TH)

    stream(demo_dir, ids_NT, visitor, routing=3, tmp=tmp_path)
    for capture in captures:
        assert capture.stats_Tk is not None
        assert capture.stats_Tk.shape[1] == 6
        assert torch.equal(capture.stats_Tk[:, :2].sort().values, capture.index_Tk.sort().values)
    captures.clear()
    stream(demo_dir, ids_NT, visitor, routing="all", tmp=tmp_path)
    assert all(capture.stats_Tk is None for capture in captures)


def test_what_was_captured_is_gone_when_the_block_runs_on(demo_dir: Path, tmp_path: Path) -> None:
    """A layer's inputs are as large as everything else together: they are held once, and not a moment too long."""
    ids_NT = torch.randint(0, 4000, (5, 24), generator=torch.Generator().manual_seed(0))
    alive: list[bool] = []

    def visitor(layer: int, experts: nn.Module, capture: Capture) -> Tensor:
        known = weakref.ref(capture.x_TH)
        experts.register_forward_pre_hook(lambda *_: alive.append(known() is not None))
        assert experts.get_submodule(hooks.HANDLER)._logs == (None, None, None)
        return torch.zeros_like(capture.x_TH)

    stream(demo_dir, ids_NT, visitor, tmp=tmp_path)
    assert alive == [False] * 4


@pytest.mark.parametrize("expected", [0, 1, 10, 30])
def test_a_log_holds_what_came_however_much_was_expected(expected: int, tmp_path: Path) -> None:
    parts = [torch.randn(size, 3) for size in (4, 0, 7, 1, 9)]
    log = _Log(SpillPool(tmp_path), expected)
    assert log.rows() is None
    for part in parts:
        log.add(part)
    rows = log.rows()
    assert rows is not None
    assert torch.equal(rows, torch.cat(parts))
    if expected == 30:
        assert rows.untyped_storage().nbytes() == 30 * 3 * 4

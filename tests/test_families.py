"""Every MoE family of transformers: quantize, write, reload through transformers, compare logits.

The packed model must give the logits of the stock model that holds the same dequantized weights, whatever the layout.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.utils import logging

import moeq
import zoo
from moeq.allocation import measuring as costs_of
from moeq.allocation import plans as allocate
from moeq.arch.inventory import read_inventory
from moeq.calibration.tokens import TokenBatch, token_hash
from moeq.errors import OptionError
from moeq.format.records import decode_matrix
from moeq.layouts.grouped.serving import PackedExperts
from moeq.layouts.spectral.serving import SpectralExperts
from moeq.model_parts import MoeLayer
from moeq.recipe import Recipe
from moeq.runtime.load import set_exact

UNSUPPORTED = {"diffusion_gemma"}
"""Named with their reasons in docs/families.md."""
NOT_CAUSAL = {"openai_privacy_filter"}
"""There is no next token to take gradients of."""
DAILY = {
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "granitemoe",
    "openai_privacy_filter",
    "nemotron_h",
}
"""One of every way to store experts; in shared bases the others wait for `make nightly`."""


def dense(handler: PackedExperts | SpectralExperts, expert: int, projection: str) -> Tensor:
    """The matrix (N, K) that packed bytes stand for."""
    if isinstance(handler, SpectralExperts):
        return handler.layer.dense(expert, projection)
    matrix = handler.layer.matrix(expert, projection)
    return decode_matrix(matrix.record, matrix.spec, matrix.shape)


def stacked(handler: PackedExperts | SpectralExperts, layer: MoeLayer, projections: tuple[str, ...]) -> Tensor:
    """The decoded weights in the arrangement of the family's own stacked parameter."""
    experts = []
    for expert in range(layer.num_experts):
        parts = [dense(handler, expert, projection) for projection in projections]
        whole = torch.cat(parts) if layer.concatenated else torch.stack(parts, dim=1).flatten(0, 1)
        experts.append(whole.T if layer.transposed else whole)
    return torch.stack(experts)


def fill(experts: nn.Module, handler: PackedExperts | SpectralExperts, layer: MoeLayer) -> None:
    """Give a stock experts module the weights that the packed one decodes to."""
    inputs = tuple(name for name in layer.projections if name != "down")
    fused = experts.gate_up_proj if "gate" in inputs else experts.up_proj
    with torch.no_grad():
        fused.copy_(stacked(handler, layer, inputs))
        experts.down_proj.copy_(stacked(handler, layer, ("down",)))


def logits(model: nn.Module, ids_NT: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=ids_NT, use_cache=False).logits


@pytest.mark.parametrize("model_type", [name for name in zoo.FAMILIES if name not in UNSUPPORTED])
def test_family(model_type: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    source, packed_dir = tmp_path / "source", tmp_path / "packed"
    zoo.make_tiny(model_type, source, dtype=torch.float32)
    # Between two widths: some matrices of a layer get 3 bits and some 4.
    report = moeq.quantize(source, packed_dir, bits=4.4, quantizer="rtn", group_size=32, dense_bits="8", device="cpu")
    assert report.verified.logits_finite
    architecture = getattr(transformers, zoo.FAMILIES[model_type].architecture)
    inventory = moeq.inspect(source)
    packed = architecture.from_pretrained(packed_dir, dtype=torch.float32)
    set_exact(packed, True)
    stock = architecture.from_pretrained(source, dtype=torch.float32)
    original = logits(stock, ids := torch.arange(2, 26).view(2, 12))
    for layer in inventory.layers:
        fill(stock.get_submodule(layer.path), packed.get_submodule(layer.path).moeq, layer)
    for linear in inventory.dense:
        packed_linear = packed.get_submodule(linear.path)
        if linear.kind != "lm_head":
            assert packed_linear.data is not None, linear.path
            with torch.no_grad():
                stock.get_submodule(linear.path).weight.copy_(packed_linear.weight)
    wanted, answer = logits(stock, ids), logits(packed, ids)
    assert not torch.allclose(original, wanted, rtol=1e-3, atol=1e-4), "quantization must have changed something"
    torch.testing.assert_close(answer, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "model_type",
    [
        pytest.param(name, marks=[pytest.mark.nightly] * (name not in DAILY))
        for name in zoo.FAMILIES
        if name not in UNSUPPORTED
    ],
)
def test_family_in_a_shared_basis(model_type: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    source, packed_dir, costs = tmp_path / "source", tmp_path / "packed", tmp_path / "costs"
    zoo.make_tiny(model_type, source, dtype=torch.float32)
    inventory, headers = read_inventory(source)
    ids_NT = torch.arange(2, 74).view(6, 12)
    tokens = TokenBatch(ids_NT=ids_NT, hash=token_hash(ids_NT), source="made up", seed=0)
    # Bases and maps cost most of so small a model.
    options: dict[str, Any] = {"method": "bitsmoe", "bits": 14, "group_size": 32, "device": "cpu"}
    if model_type in NOT_CAUSAL:
        options["cost_options"] = "importance=routing"
    recipe = Recipe(**options, calibration="unused").settled()
    what = costs_of.Subject(
        source=source,
        inventory=inventory,
        headers=headers,
        recipe=recipe,
        candidates=allocate.candidate_specs(recipe, None),
        tokens=tokens,
    )
    if "gate" not in inventory.layers[0].projections:
        with pytest.raises(OptionError, match="no gate"):
            costs_of.table(what, output=costs)
        return
    costs_of.table(what, output=costs)
    report = moeq.quantize(source, packed_dir, costs=str(costs), quality=False, **options)
    assert report.verified.logits_finite
    architecture = getattr(transformers, zoo.FAMILIES[model_type].architecture)
    packed = architecture.from_pretrained(packed_dir, dtype=torch.float32)
    set_exact(packed, True)
    stock = architecture.from_pretrained(source, dtype=torch.float32)
    original = logits(stock, ids_NT)
    for layer in inventory.layers:
        fill(stock.get_submodule(layer.path), packed.get_submodule(layer.path).moeq, layer)
    wanted, answer = logits(stock, ids_NT), logits(packed, ids_NT)
    assert not torch.allclose(original, wanted, rtol=1e-4, atol=1e-5), "quantization must have changed something"
    torch.testing.assert_close(answer, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_at_least_sixty_families() -> None:
    assert len(zoo.FAMILIES) - len(UNSUPPORTED) >= 60

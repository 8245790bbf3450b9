"""Exports for programs that know nothing of moeq: compressed-tensors, read by the real transformers."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import moeq
import zoo
from moeq.artifacts import Plan
from moeq.checkpoint.read import read_headers
from moeq.checkpoint.rounded.base import unpack_stream
from moeq.errors import BudgetError, OptionError, OutputError, PackedError
from moeq.runtime.load import load_any
from moeq.stages import export
from moeq.writing.compressed_tensors import NAMES, pack_stream


def widths(directory: Path) -> list[set[tuple[int, str]]]:
    """Layer -> widths and level sets of its experts."""
    plan = Plan.load(directory / "moeq_plan.json")
    return [
        {(plan.specs[width].bits, plan.specs[width].levels) for row in layer for width in row} for layer in plan.experts
    ]


@pytest.fixture(scope="module")
def mixed(demo_dir: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, layers of several widths."""
    out = tmp_path_factory.mktemp("export") / "mixed"
    few = {"calibration": calibration_text, "nsamples": 4, "seqlen": 64}
    moeq.quantize(demo_dir, out, method="gemq", serve="vllm-native", bits=3.2, device="cpu", **few)
    return out


def test_a_layer_has_one_width(mixed: Path) -> None:
    found = widths(mixed)
    assert all(len(layer) == 1 for layer in found)
    assert len(set.union(*found)) > 1
    assert {levels for layer in found for _, levels in layer} == {"sym"}


@pytest.mark.parametrize("bits", [2.2, 2.6, 3.2])
def test_uniform_raises_whole_layers(bits: float, demo_dir: Path, tmp_path: Path) -> None:
    report = moeq.quantize(
        demo_dir, tmp_path / "out", method="uniform", quantizer="rtn", serve="vllm-native", bits=bits, device="cpu"
    )
    assert all(len(layer) == 1 for layer in widths(tmp_path / "out"))
    assert report.expert_bits_per_weight <= bits


def test_transformers_alone_loads_it(demo_dir: Path, tmp_path: Path) -> None:
    """One width for all layers: transformers has one for the experts of a model."""
    logging.disable_progress_bar()
    moeq.quantize(
        demo_dir, tmp_path / "packed", method="uniform", quantizer="rtn", serve="vllm-native", bits=3.2,
        dense_bits="8", device="cpu",
    )  # fmt: skip
    report = export.run(tmp_path / "packed", tmp_path / "out")
    assert report.widths == (3, 3, 3, 3)
    assert "moeq" not in json.dumps(json.loads((tmp_path / "out" / "config.json").read_text()).get("auto_map", {}))
    ids_NT = torch.arange(1, 65).view(2, 32)
    ours = moeq.load(tmp_path / "packed", device="cpu", dtype="float32", exact_activations=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted, found = ours(input_ids=ids_NT).logits, theirs(input_ids=ids_NT).logits
    # It multiplies codes and scales in float16.
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()


@pytest.mark.parametrize("model_type", sorted(NAMES))
def test_families(model_type: str, tmp_path: Path) -> None:
    """Names in files are those that transformers looks for."""
    logging.disable_progress_bar()
    zoo.make_tiny(model_type, tmp_path / "source", dtype=torch.float32)
    moeq.quantize(
        tmp_path / "source", tmp_path / "packed", method="uniform", quantizer="rtn", serve="vllm-native", bits=5.5,
        group_size=-1, device="cpu",
    )  # fmt: skip
    export.run(tmp_path / "packed", tmp_path / "out")
    ids_NT = torch.arange(2, 26).view(2, 12)
    ours = moeq.load(tmp_path / "packed", device="cpu", dtype="float32", exact_activations=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        wanted, found = ours(input_ids=ids_NT).logits, theirs(input_ids=ids_NT).logits
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()


def test_widths_by_layer_read_back(mixed: Path, tmp_path: Path) -> None:
    """What compressed-tensors' own code unpacks, layer by layer, are our codes."""
    out = tmp_path / "out"
    report = export.run(mixed, out)
    assert report.checked == 2 * len(report.widths)
    groups = json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"].values()
    for layer, bits in enumerate(report.widths):
        name = f"model.layers.{layer}.mlp.experts.3.up_proj"
        mine = [group for group in groups if any(re.match(each.removeprefix("re:"), name) for each in group["targets"])]
        assert [group["weights"]["num_bits"] for group in mine] == [bits]
        stored = load_file(out / read_headers(out)[f"{name}.weight"].file)
        codes_NK = unpack_from_int32(stored[f"{name}.weight_packed"], bits, torch.Size(stored[f"{name}.weight_shape"]))
        assert codes_NK.unique().numel() == 1 << bits


@given(bits=st.sampled_from([2, 3, 4, 5, 6, 8]), rows=st.integers(1, 5), columns=st.integers(1, 140))
def test_streams(bits: int, rows: int, columns: int) -> None:
    codes_NK = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = pack_stream(codes_NK, bits)
    assert torch.equal(unpack_stream(packed, bits, columns), codes_NK.int())
    theirs = unpack_from_int32(packed, bits, torch.Size((rows, columns)))
    assert torch.equal(theirs.int() + 2 ** (bits - 1), codes_NK.int())


def test_what_it_cannot_hold(packed_demo: Path, mixed: Path, demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="serve vllm-native"):
        export.run(packed_demo, tmp_path / "out")
    with pytest.raises(OptionError, match="compressed-tensors"):
        export.run(mixed, tmp_path / "out", form="awq")
    with pytest.raises(PackedError):
        export.run(demo_dir, tmp_path / "out")
    with pytest.raises(OutputError):
        export.run(mixed, mixed / "inside")
    other = tmp_path / "other"
    shutil.copytree(mixed, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt_oss"}))
    with pytest.raises((OptionError, PackedError)):
        export.run(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gemq", "quantizer": "trellis"}, "nothing of trellis"),
        ({"method": "bitsmoe"}, "nothing of bitsmoe"),
        ({"method": "tileq"}, "nothing of tileq"),
        ({"method": "gemq", "candidates": "1,2"}, "nothing of 1,2"),
        ({"method": "gemq", "levels": "asym"}, "nothing of asym"),
        ({"serve": "ollama"}, "choose one of moeq, vllm-native"),
    ],
)
def test_wrong_options(options: dict[str, str], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        moeq.Recipe(**{"serve": "vllm-native", "bits": 3, **options})


def test_groups_that_are_not_whole_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    zoo.make_tiny("qwen3_moe", tmp_path / "source", dtype=torch.float32)
    with pytest.raises(OptionError, match=r"40 inputs are no whole groups of 32.*group-size -1"):
        moeq.plan(tmp_path / "source", method="uniform", serve="vllm-native", bits=5, group_size=32)


def test_a_budget_that_cannot_be_met(demo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"give at least 2\.1"):
        moeq.quantize(
            demo_dir, tmp_path / "out", method="gemq", cost="weight-error", quantizer="rtn", serve="vllm-native",
            bits=1.5, device="cpu",
        )  # fmt: skip


def test_nothing_stays_of_what_failed(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError("no space")

    monkeypatch.setattr(export, "_check", full)
    with pytest.raises(OSError, match="no space"):
        export.run(mixed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_says_what_one_width_for_a_layer_costs(demo_dir: Path, tmp_path: Path) -> None:
    options = {"method": "gemq", "cost": "weight-error", "unit": "matrix", "quantizer": "rtn", "serve": "vllm-native"}
    costs = tmp_path / "costs"
    moeq.measure(demo_dir, **options, calibration="none").save(costs)
    said = " ".join(moeq.plan(demo_dir, **options, calibration="none", costs=costs, bits=3.2).warnings)
    found = re.search(r"one width for a layer costs ([\d.]+) % of predicted loss", said)
    assert found
    assert float(found[1]) > 0


def test_moeq_itself_reads_what_it_exported(mixed: Path, tmp_path: Path) -> None:
    """Widths by layer too, which transformers' own reader does not know: exports are subjects of eval and compare."""
    export.run(mixed, tmp_path / "out")
    ids_NT = torch.arange(1, 65).view(2, 32)
    with torch.no_grad():
        wanted = moeq.load(mixed, device="cpu", dtype="float32", exact_activations=True)(input_ids=ids_NT).logits
        found = load_any(tmp_path / "out", "cpu", torch.float32)(input_ids=ids_NT).logits
    assert (found - wanted).abs().max() < 2e-3 * wanted.abs().max()  # decoded to bfloat16

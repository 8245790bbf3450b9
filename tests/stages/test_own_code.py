"""Models that transformers does not have: experts found by name, loaded by the checkpoint's own code, if trusted."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moeq
import zoo
from moeq import cli
from moeq.errors import CheckpointError, MissingTensorError, NotMoeError, OptionError, TensorError
from moeq.layouts.grouped.serving import PackedLinear
from moeq.runtime.load import load_any

CODE = Path(__file__).parent.parent / "own_code"
SCHEMES = [
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("linear", "linear_v", "linear_1"),
    ("fc1", "fc2"),
]
OPTIONS: dict[str, Any] = {"bits": 9.5, "group_size": 32, "device": "cpu", "trust_remote_code": True}


def make(directory: Path, scheme: tuple[str, ...] = SCHEMES[0], **more: Any) -> Path:
    """A checkpoint of random weights with its code beside it."""
    directory.mkdir()
    for file in CODE.glob("*.py"):
        shutil.copy(file, directory)
    *inputs, output = scheme
    torch.manual_seed(0)
    found: dict[str, Tensor] = {"embed.weight": torch.randn(128, 64), "lm_head.weight": torch.randn(128, 64) / 8}
    for layer in range(2):
        found[f"layers.{layer}.mix.weight"] = torch.randn(64, 64) / 8
        found[f"layers.{layer}.gate.weight"] = torch.randn(4, 64) / 8
        for expert in range(4):
            for name in inputs:
                found[f"layers.{layer}.experts.{expert}.{name}.weight"] = torch.randn(48, 64) / 8
            found[f"layers.{layer}.experts.{expert}.{output}.weight"] = torch.randn(64, 48) / 8
    weights = {name: value.bfloat16() for name, value in found.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "pebble",
        "architectures": ["PebbleForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_pebble.PebbleConfig",
            "AutoModelForCausalLM": "modeling_pebble.PebbleForCausalLM",
        },
        "scheme": list(scheme),
        "num_experts_per_tok": 2,
        "dtype": "bfloat16",
        **more,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 51).view(2, 24)).logits.float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packed_experts_in_the_place_of_theirs(scheme: tuple[str, ...], tmp_path: Path) -> None:
    source, out = make(tmp_path / "source", scheme), tmp_path / "out"
    report = moeq.quantize(source, out, **OPTIONS)
    assert report.expert_parameters == 2 * 4 * len(scheme) * 48 * 64
    want = logits(load_any(source, "cpu", torch.float32, trust_remote_code=True))
    model = moeq.load(out, device="cpu", dtype=torch.float32, exact_activations=True, trust_remote_code=True)
    packed = [path for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 2 * 4 * len(scheme)
    found = logits(model)
    assert ((found - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.03
    assert moeq.verify(out, trust_remote_code=True).decoded == len(packed)
    assert not torch.equal(found, want)


@pytest.mark.parametrize("options", [{"method": "alphaq"}, {"cost": "weight-error", "unit": "matrix"}])
def test_widths_by_costs_that_need_no_text(options: dict[str, Any], tmp_path: Path) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    more = {"scope": "global", "shares": "none", "solver": "auto"} if "cost" in options else {}
    moeq.quantize(source, out, **(OPTIONS | {"bits": 4.2} | options | more))
    plan = json.loads((out / "moeq_plan.json").read_text())
    assert len({width for layer in plan["experts"] for expert in layer for width in expert}) > 1
    assert logits(moeq.load(out, device="cpu", trust_remote_code=True)).isfinite().all()


def test_their_code_runs_only_when_it_is_trusted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And nobody is asked."""
    source, out, mark = make(tmp_path / "source"), tmp_path / "out", tmp_path / "ran"
    # A config class of its own: transformers remembers for the process which model belongs to one.
    (source / "configuration_pebble.py").write_text(
        (source / "configuration_pebble.py").read_text() + "\n\nMARKED = 1\n"
    )
    text = (source / "modeling_pebble.py").read_text()
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace("modeling_pebble", "modeling_marked"))
    (source / "modeling_marked.py").write_text(text.replace("\nRAN = ", f"\nPath({str(mark)!r}).touch()\nRAN = "))
    moeq.quantize(source, out, **OPTIONS)
    assert mark.exists()
    mark.unlink()
    assert moeq.inspect(source).apart
    for call in (
        lambda: moeq.plan(source, bits=4),
        lambda: moeq.quantize(source, tmp_path / "other", bits=4, device="cpu"),
        lambda: moeq.load(out, device="cpu"),
        lambda: load_any(source, "cpu"),
    ):
        with pytest.raises(CheckpointError, match="only code in its own directory") as caught:
            call()
        assert caught.value.option == "trust-remote-code"
    assert cli.main(["verify", str(out)]) == 1
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not mark.exists()


def test_transformers_alone_loads_it(tmp_path: Path) -> None:
    """In a process that never imported moeq: the hook does."""
    source, out = make(tmp_path / "source"), tmp_path / "out"
    moeq.quantize(source, out, **OPTIONS)
    program = f"""
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
print(type(model.layers[0].experts[0].gate_proj).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "PackedLinear"


def test_a_text_is_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = make(tmp_path / "source"), tmp_path / "out"
    zoo.write_tokenizer(source)
    moeq.quantize(source, out, **OPTIONS)
    words = ["generate", str(out), "a b", "--max-new-tokens", "3", "--device", "cpu", "--json"]
    assert cli.main(words) == 1
    capsys.readouterr()
    assert cli.main([*words, "--trust-remote-code"]) == 0
    assert json.loads(capsys.readouterr().out)["new_tokens"] == 3


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({"method": "gemq"}, "cost"),
        ({"method": "tileq"}, "method"),
        ({"method": "bitsmoe"}, "method"),
        ({"quantizer": "gptq"}, "quantizer"),
        ({"router": "task"}, "router"),
        ({"dense_bits": "8"}, "dense-bits"),
        ({"mtp": "drop"}, "mtp"),
    ],
)
def test_what_needs_their_code_to_calibrate(options: dict[str, Any], option: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="without data") as caught:
        moeq.plan(make(tmp_path / "source"), **(OPTIONS | {"bits": 4.2} | options))
    assert caught.value.option == option


def test_calibration_text_is_refused_not_ignored(tmp_path: Path, calibration_text: Path) -> None:
    source = make(tmp_path / "source")
    zoo.write_tokenizer(source)
    for more in ({}, {"quantizer": "hqq"}):
        with pytest.raises(OptionError, match="without data") as caught:
            moeq.plan(source, calibration=str(calibration_text), **more, **OPTIONS)
        assert caught.value.option == "calibration"


def test_checkpoints_that_lack_something(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    found = load_file(source / "model.safetensors")

    def save(tensors: dict[str, Tensor]) -> None:
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})

    name = "layers.1.experts.2.up_proj.weight"
    save({key: value for key, value in found.items() if key != name})
    with pytest.raises(MissingTensorError) as caught:
        moeq.plan(source, **OPTIONS)
    assert caught.value.tensor == name
    save(found | {name: torch.zeros(48, 63, dtype=torch.bfloat16)})
    with pytest.raises(TensorError, match="unlike"):
        moeq.plan(source, **OPTIONS)
    save({key: value for key, value in found.items() if "experts" not in key})
    with pytest.raises(NotMoeError, match="no tensor is named"):
        moeq.plan(source, **OPTIONS)
    save(found)
    config = json.loads((source / "config.json").read_text())
    del config["num_experts_per_tok"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="how many experts a token uses"):
        moeq.plan(source, **OPTIONS)


def test_what_transformers_itself_loads_is_the_same(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    theirs = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(logits(theirs), logits(load_any(source, "cpu", torch.float32, trust_remote_code=True)))

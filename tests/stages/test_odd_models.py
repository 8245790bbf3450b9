"""Models that are unlike most: what their configs leave out, parts that speak, numbers that are too small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import families
import moeq
import zoo
from moeq.errors import BudgetError, MissingTensorError, NotMoeError, OptionError, TensorError
from moeq.format.manifest import read_manifest
from moeq.layouts.serving import layout
from moeq.runtime.attach import map_packed

OPTIONS: dict[str, Any] = {"bits": 9.5, "group_size": 32, "quantizer": "hqq", "device": "cpu"}


def edit(directory: Path, change: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 27)[None], use_cache=False).logits.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_that_only_a_part_names_or_nobody(dtype: torch.dtype, tmp_path: Path) -> None:
    """transformers would take that of the first tensor, which is ours and of bytes."""
    source, out = tmp_path / "source", tmp_path / "out"
    zoo.make_tiny("qwen3_vl_moe", source, dtype=dtype)

    def forget(config: dict[str, Any]) -> None:
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            part.pop("dtype", None)

    edit(source, forget)
    moeq.quantize(source, out, **OPTIONS)
    assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert moeq.load(out).dtype == dtype


def test_the_text_part_of_a_model_with_towers_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    zoo.make_tiny("qwen3_5_moe", source, dtype=torch.bfloat16)
    moeq.quantize(source, out, **OPTIONS)
    wanted = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    found = logits(moeq.load(out, device="cpu", dtype=torch.float32, exact_activations=True))
    assert (found - wanted).norm() / wanted.norm() < 0.1


def test_another_experts_implementation_changes_nothing(packed_tiny: Path) -> None:
    model = moeq.load(packed_tiny, device="cpu")
    before = logits(model)
    model.set_experts_implementation("eager")
    assert torch.equal(logits(model), before)


def test_a_config_may_hold_infinity(tmp_path: Path) -> None:
    source = tmp_path / "source"
    zoo.make_tiny("qwen3_moe", source, dtype=torch.bfloat16)
    edit(source, lambda config: config.update(time_step_limit=[0.0, float("inf")]))
    assert moeq.inspect(source).model_hash == moeq.inspect(source).model_hash
    moeq.quantize(source, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(("power", "refused"), [(0, False), (14, True), (24, True)])
def test_weights_whose_scales_float16_would_lose(power: int, refused: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    zoo.make_tiny("qwen3_moe", source, dtype=torch.bfloat16)
    found = load_file(source / "model.safetensors")
    for name, value in found.items():
        if "experts" in name:
            found[name] = value * 2.0**-power if "up_proj" in name else value * 2.0**power if "down" in name else value
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    if not refused:
        moeq.quantize(source, tmp_path / "out", **OPTIONS)
        return
    with pytest.raises(TensorError, match=r"so small .*experts.*up_proj"):
        moeq.quantize(source, tmp_path / "out", **OPTIONS)


def test_experts_outside_the_protocol_are_not_called_dense(tmp_path: Path) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "intermediate_size_mlp": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    more = {"num_local_experts": 4, "interleave_moe_layer_step": 1, "pad_token_id": 0}
    more["num_experts_per_tok"] = 2  # with one, moeq makes them follow it
    config = transformers.Llama4TextConfig(**sizes, **heads, **more)
    transformers.Llama4ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotMoeError, match="outside transformers' experts protocol") as caught:
        moeq.plan(tmp_path, **OPTIONS)
    assert "experts" in str(caught.value.tensor)


def test_plan_refuses_to_tune_routers_that_no_gradient_reaches(tmp_path: Path, calibration_text: Path) -> None:
    zoo.make_tiny("llama4", tmp_path)
    zoo.write_tokenizer(tmp_path)
    text: dict[str, Any] = {"calibration": str(calibration_text), "nsamples": 4, "seqlen": 48}
    for loss in ("task", "kl"):
        with pytest.raises(OptionError, match="llama4 cannot be tuned") as caught:
            moeq.plan(tmp_path, **OPTIONS, **text, router=loss)
        assert caught.value.option == "router"
    moeq.plan(tmp_path, **OPTIONS, **text)


def test_a_model_that_labels_tokens(tmp_path: Path, calibration_text: Path) -> None:
    source = tmp_path / "source"
    zoo.make_tiny("openai_privacy_filter", source, dtype=torch.bfloat16)
    zoo.write_tokenizer(source)
    calibrated = OPTIONS | {"quantizer": "gptq", "calibration": str(calibration_text), "nsamples": 4, "seqlen": 48}
    report = moeq.quantize(source, tmp_path / "out", **calibrated)
    assert report.quality is None
    assert "does not predict" in str(report.quality_note)


def shrink(part: Any) -> None:
    """All parts of an omni model as small as those of the zoo."""
    for value in list(vars(part).values()):
        if isinstance(value, transformers.PreTrainedConfig):
            shrink(value)
    sizes = families.TEXT if {"num_experts", "vocab_size"} & vars(part).keys() else families.TOWER
    for key, value in (sizes | {"num_hidden_layers": 2}).items():
        if key in vars(part) and not isinstance(getattr(type(part), key, None), property):
            setattr(part, key, value)
    if vars(part).get("layer_types"):
        part.layer_types = part.layer_types[:2]


def test_thinker_and_talker_of_an_omni_model(tmp_path: Path) -> None:
    """Experts lie a level deeper, in two parts that speak; the whole has no call of its own."""
    config = transformers.Qwen3OmniMoeConfig()
    shrink(config)
    config.talker_config.text_config.shared_expert_intermediate_size = 40
    config.talker_config.spatial_merge_size = 2
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    model = transformers.Qwen3OmniMoeForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.02)
    model.save_pretrained(tmp_path / "source")
    paths = {layer.path.split(".")[0] for layer in moeq.inspect(tmp_path / "source").layers}
    assert paths == {"thinker", "talker"}
    moeq.quantize(tmp_path / "source", tmp_path / "out", **OPTIONS)
    found = moeq.load(tmp_path / "out", device="cpu", dtype=torch.float32, exact_activations=True)
    wanted = logits(model.float().thinker.eval())
    assert ((logits(found.thinker) - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.05


def test_experts_that_only_the_config_names_are_not_called_dense(tmp_path: Path) -> None:
    """JetMoe keeps its experts in linears whose names say nothing."""
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.JetMoeConfig(**sizes, num_key_value_heads=2, kv_channels=16, num_local_experts=4)
    transformers.JetMoeForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(NotMoeError, match="outside transformers' experts protocol"):
        moeq.plan(tmp_path, **OPTIONS)


def with_mtp(directory: Path) -> dict[str, Tensor]:
    """A checkpoint with one layer behind its last, as DeepSeek and GLM have it; the tensors of that layer."""
    zoo.make_tiny("glm4_moe", directory, dtype=torch.bfloat16)
    count = json.loads((directory / "config.json").read_text())["num_hidden_layers"]
    found = load_file(directory / "model.safetensors")
    last = f"model.layers.{count - 1}."
    extra = {n.replace(last, f"model.layers.{count}."): v.clone() for n, v in found.items() if n.startswith(last)}
    extra[f"model.layers.{count}.eh_proj.weight"] = torch.randn(64, 128).bfloat16()
    save_file(found | extra, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory, lambda config: config.update(num_nextn_predict_layers=1))
    return extra


def test_layers_that_predict_further_tokens(tmp_path: Path) -> None:
    source = tmp_path / "source"
    extra = with_mtp(source)
    for choice in ("keep", "drop"):
        out, options = tmp_path / choice, OPTIONS | {"mtp": choice}
        said = [text for text in moeq.plan(source, **options).warnings if "further tokens" in text]
        assert len(said) == 1
        assert said[0].startswith(f"{len(extra)} tensors")
        moeq.quantize(source, out, **options)
        places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
        config = json.loads((out / "config.json").read_text())
        assert config["num_nextn_predict_layers"] == (1 if choice == "keep" else 0)
        assert (set(extra) <= set(places)) == (choice == "keep")
        if choice == "drop":
            assert not set(extra) & set(places)
        for name, value in extra.items() if choice == "keep" else ():
            assert torch.equal(load_file(out / places[name])[name], value)
        assert logits(moeq.load(out, device="cpu")).isfinite().all()


@pytest.mark.parametrize("method", ["uniform", "uniform, gptq", "gemq", "alphaq"])
def test_their_experts_are_packed_with_the_rest(method: str, tmp_path: Path, calibration_text: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    extra = with_mtp(source)
    options: dict[str, Any] = {"mtp": "pack", "method": method.split(",", maxsplit=1)[0], "bits": 6.6, "group_size": 32}
    if method in ("uniform, gptq", "gemq"):
        zoo.write_tokenizer(source)
        options |= {"calibration": str(calibration_text), "nsamples": 4, "seqlen": 48}
    if method == "gemq":
        options |= {"router": "none", "candidates": "2,4,8"}
    report = moeq.quantize(source, out, device="cpu", **options)
    assert 6 < report.expert_bits_per_weight <= 6.6
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    experts = {name: value for name, value in extra.items() if ".experts." in name and "shared" not in name}
    assert experts
    assert not set(experts) & set(places)
    assert set(extra) - set(experts) <= set(places)
    manifest = read_manifest(out)
    entry = manifest.layers[-1]
    assert [layer.attached for layer in manifest.layers].count(False) == 1
    assert not entry.attached
    assert moeq.verify(out).layers == len(manifest.layers)
    dense = layout(entry.layout).open(entry, map_packed(out / name for name in set(places.values()))).dense
    for name, value in experts.items():
        found = dense(int(name.split(".experts.")[1].split(".")[0]), name.split(".")[-2].removesuffix("_proj"))
        assert (found - value.float()).norm() / value.float().norm() < 0.1, name
    assert logits(moeq.load(out, device="cpu")).isfinite().all()


def test_their_experts_count_for_a_size(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    with_mtp(source)
    with pytest.raises(BudgetError) as caught:
        moeq.plan(source, size="1kB", mtp="pack")
    least = int(str(caught.value.fix).split("at least ")[1].split(" bytes")[0])
    moeq.quantize(source, out, size=str(least), mtp="pack", device="cpu")
    assert sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) <= least
    with pytest.raises(BudgetError, match="cannot be reached"):
        moeq.plan(source, size=str(least - 2000), mtp="pack")


@pytest.mark.parametrize("options", [{"method": "bitsmoe"}, {"method": "tileq"}, {"quantizer": "vector"}])
def test_layouts_that_cannot_take_them(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="without data") as caught:
        moeq.Recipe(bits=4, mtp="pack", **options)
    assert "keep" in caught.value.fix


def test_an_expert_of_theirs_is_absent(tmp_path: Path) -> None:
    extra = with_mtp(tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    name = next(name for name in sorted(extra) if ".experts.2." in name)
    del found[name]
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match="absent") as caught:
        moeq.plan(tmp_path, bits=6, mtp="pack", group_size=32)
    assert caught.value.tensor == name
    moeq.plan(tmp_path, bits=6, group_size=32)

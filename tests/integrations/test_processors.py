"""Multimodal models: packed, they answer pictures that their processor made numbers of; towers stay as they are."""

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast, ProcessorMixin

import moeq
import zoo
from moeq.runtime.load import load_any

image_module = pytest.importorskip("PIL.Image")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sort:
    """A family with a processor that needs nothing but PIL for pictures.

    Attributes:
        processor: its class.
        image: module and class of its image processor, and what shrinks it.
        tokens: special tokens; the first stands for a picture in a text.
        config: keys of config.json -> place in `tokens`, or a value.
        text: with one picture in it.
        names: of the first tokens, where the processor asks the tokenizer for them.
    """

    processor: str
    image: tuple[str, str, dict[str, Any]]
    tokens: tuple[str, ...]
    config: dict[str, Any]
    text: str
    names: tuple[str, ...] = ()


PATCHES = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
SORTS = {
    "qwen3_vl_moe": Sort(
        processor="Qwen3VLProcessor",
        image=(
            "qwen2_vl.image_processing_pil_qwen2_vl",
            "Qwen2VLImageProcessorPil",
            PATCHES | {"size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}},
        ),
        tokens=("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
        config={"image_token_id": 0, "video_token_id": 1, "vision_start_token_id": 2, "vision_end_token_id": 3},
        text="<|vision_start|><|image_pad|><|vision_end|>what is this",
    ),
    "glm4v_moe": Sort(
        processor="Glm4vProcessor",
        image=(
            "glm4v.image_processing_pil_glm4v",
            "Glm4vImageProcessorPil",
            PATCHES | {"size": {"shortest_edge": 28 * 28, "longest_edge": 2 * 56 * 56}},
        ),
        tokens=(
            "<|image|>",
            "<|video|>",
            "<|begin_of_image|>",
            "<|end_of_image|>",
            "<|begin_of_video|>",
            "<|end_of_video|>",
        ),
        config={"image_token_id": 0, "video_token_id": 1, "image_start_token_id": 2, "image_end_token_id": 3},
        text="<|begin_of_image|><|image|><|end_of_image|>what is this",
    ),
    "gemma4": Sort(
        processor="Gemma4Processor",
        image=(
            "gemma4.image_processing_pil_gemma4",
            "Gemma4ImageProcessorPil",
            {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3},
        ),
        tokens=("<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>"),
        config={"image_token_id": 0, "boi_token_id": 1, "eoi_token_id": 2, "audio_token_id": 3, "video_token_id": 6},
        text="<|image|>what is this",
        names=("image_token", "boi_token", "eoi_token", "audio_token", "boa_token", "eoa_token"),
    ),
}


def tokenizer(special: tuple[str, ...], names: tuple[str, ...]) -> PreTrainedTokenizerFast:
    letters = ["<unk>", "<pad>", "<eos>", *string.printable[:90], *special]
    inner = Tokenizer(WordLevel({letter: index for index, letter in enumerate(letters)}, unk_token="<unk>"))
    inner.pre_tokenizer, inner.decoder = Split("", "isolated"), Fuse()
    marks = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    known = {"extra_special_tokens": dict(zip(names, special, strict=False))} if names else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=list(special), **marks, **known)


def make(family: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A checkpoint, and its processor."""
    sort = SORTS[family]
    zoo.make_tiny(family, directory, dtype=torch.bfloat16)
    words = tokenizer(sort.tokens, sort.names)
    words.save_pretrained(directory)
    ids = words.convert_tokens_to_ids(list(sort.tokens))
    config = json.loads((directory / "config.json").read_text())
    config |= {key: ids[place] for key, place in sort.config.items() if key in config}
    (directory / "config.json").write_text(json.dumps(config))
    module, name, options = sort.image
    images = getattr(__import__(f"transformers.models.{module}", fromlist=[name]), name)(**options)
    # What takes videos apart needs torchvision; pictures do not.
    check = ProcessorMixin.check_argument_for_proper_class
    monkeypatch.setattr(
        ProcessorMixin,
        "check_argument_for_proper_class",
        lambda self, name, value: None if value is None else check(self, name, value),
    )
    absent = {"feature_extractor": None, "video_processor": None} if sort.names else {}
    made: Callable[..., Any] = getattr(transformers, sort.processor)(image_processor=images, tokenizer=words, **absent)
    return made


@pytest.mark.parametrize("family", SORTS)
def test_pictures_are_answered_and_towers_untouched(
    family: str, tmp_path: Path, calibration_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    processor = make(family, source, monkeypatch)
    text = {"calibration": str(calibration_text), "nsamples": 4, "seqlen": 48, "quality": False}
    moeq.quantize(source, out, bits=9.5, group_size=32, device="cpu", **text)
    assert_towers_kept(source, out)
    pixels = (np.random.default_rng(0).random((56, 56, 3)) * 255).astype("uint8")
    inputs = processor(text=[SORTS[family].text], images=[image_module.fromarray(pixels)], return_tensors="pt")
    assert_pictures_count(source, out, dict(inputs))


def assert_towers_kept(source: Path, out: Path) -> None:
    names = {}
    for directory in (source, out):
        for file in directory.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                names |= {(directory.name, name): opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    towers = [name for where, name in names if where == "source" and ("visual" in name or "vision" in name)]
    assert towers
    for name in towers:
        assert torch.equal(names["out", name], names["source", name])


def assert_pictures_count(source: Path, out: Path, inputs: dict[str, Any]) -> None:
    """The packed model answers as the original does, otherwise for another picture, and goes on writing."""
    original = load_any(source, "cpu", torch.float32)
    packed = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        want, found = original(**inputs).logits, packed(**inputs).logits
    assert ((found - want).norm(dim=-1) / want.norm(dim=-1)).median() < 0.05
    other = inputs | {"pixel_values": torch.flip(inputs["pixel_values"], (-1,)) + 1}
    with torch.no_grad():
        assert (packed(**other).logits - found).abs().max() > 1e-3, "the picture matters"
    answer = packed.generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=1)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 4 or 2 in answer


def test_llama4_answers_pictures(tmp_path: Path, calibration_text: Path) -> None:
    """Its experts follow no protocol until moeq makes them; its processor needs torchvision: the numbers are ours."""
    source, out = tmp_path / "source", tmp_path / "out"
    zoo.make_tiny("llama4", source, dtype=torch.bfloat16)
    zoo.write_tokenizer(source)
    config = json.loads((source / "config.json").read_text())
    config |= {"image_token_index": 120, "image_token_id": 120}
    (source / "config.json").write_text(json.dumps(config))
    text = {"calibration": str(calibration_text), "nsamples": 4, "seqlen": 48, "quality": False}
    moeq.quantize(source, out, bits=9.5, group_size=32, device="cpu", **text)
    assert_towers_kept(source, out)
    ids = torch.tensor([[5, 120, 7, 8, 9, 10]])  # a tile of 28 x 28 is one token
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert_pictures_count(source, out, {"input_ids": ids, "pixel_values": pixels})

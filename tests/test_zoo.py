from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import zoo
from moeq.arch.discover import is_experts
from moeq.arch.sorted_rows import adopt

LANGUAGE_MODELS = [name for name, family in zoo.FAMILIES.items() if not family.no_logits]


def test_all_families_but_the_listed_ones_are_language_models() -> None:
    assert set(zoo.FAMILIES) - set(LANGUAGE_MODELS) == {"diffusion_gemma", "openai_privacy_filter"}


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_logits_are_finite_varied_and_depend_on_the_experts(model_type: str) -> None:
    model = zoo.make_model(model_type)
    ids = torch.randint(3, zoo.VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert logits.shape == (2, 24, zoo.VOCABULARY)
        assert logits.isfinite().all()
        assert 0.3 < logits.std() < 3
        adopt(model)
        for experts in filter(is_experts, model.modules()):
            experts.down_proj.zero_()
        change = (model(input_ids=ids).logits - logits).norm() / logits.norm()
    assert change > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_seed_and_dtype_decide_the_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        zoo.make_tiny("qwen3_moe", tmp_path / name, seed=seed, dtype=dtype)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert {tensor.dtype for tensor in a.values()} == {dtype}
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a)


def test_every_family_of_transformers_is_in_the_zoo() -> None:
    folder = Path(transformers.__file__).parent / "models"
    families = {
        file.parent.name
        for file in folder.glob("*/modeling_*.py")
        if "use_experts_implementation" in file.read_text(encoding="utf-8")
    }
    covered = {getattr(transformers, family.architecture).__module__.split(".")[-2] for family in zoo.FAMILIES.values()}
    assert families <= covered

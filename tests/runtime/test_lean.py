"""Modules that answer few tokens through kernels of ours answer what they answered before."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moeq
from moeq import native
from moeq.layouts import trust
from moeq.layouts.grouped.serving import PackedLinear, Siblings
from moeq.runtime import lean
from moeq.runtime.growing import growing_cache
from moeq.runtime.lean import LeanLinear, LeanNorm, LeanRouter

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiled kernels")


@pytest.fixture(scope="module")
def plainly(packed_demo: Path) -> Callable[[torch.dtype], nn.Module]:
    """Loads the demo as it was before there were lean modules."""

    def load(dtype: torch.dtype) -> nn.Module:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moeq.runtime.lean.lighten", lambda _: False)
            return moeq.load(packed_demo, device="cpu", dtype=dtype, exact_activations=True)

    return load


@torch.inference_mode()
def decoded(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None, prompt: int = 20) -> Tensor:
    """Logits of the tokens after a prompt, read one by one."""
    cache, found = growing_cache(model), []
    pieces = [(0, prompt), *((start, start + 1) for start in range(prompt, ids_BT.shape[1]))]
    for start, stop in pieces:
        mask = None if mask_BT is None else mask_BT[:, :stop]
        found.append(model(ids_BT[:, start:stop], attention_mask=mask, past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, dim=1)


def ids(batch: int, count: int) -> Tensor:
    return torch.randint(3, 4000, (batch, count), generator=torch.Generator().manual_seed(3))


def test_which_modules(packed_demo: Path) -> None:
    model = moeq.load(packed_demo, device="cpu")
    layer = model.model.layers[0]
    assert isinstance(layer.input_layernorm, LeanNorm)
    assert isinstance(layer.self_attn.q_norm, LeanNorm)
    assert isinstance(layer.mlp.gate, LeanRouter)
    assert isinstance(layer.self_attn.q_proj, PackedLinear)
    assert model.config._attn_implementation == lean.ATTENTION
    eager = AutoModelForCausalLM.from_pretrained(packed_demo, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager", "what a user chose stays"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_answers_are_the_same(packed_demo: Path, plainly: Callable[..., Any], dtype: torch.dtype) -> None:
    """Of one text, and of two of which one is filled up on the left."""
    ours, theirs = moeq.load(packed_demo, device="cpu", dtype=dtype, exact_activations=True), plainly(dtype)
    near = 1e-4 if dtype == torch.float32 else 0.15
    mask_BT = torch.ones(2, 40, dtype=torch.int64)
    mask_BT[0, :7] = 0
    for batch, mask in ((1, None), (2, mask_BT)):
        found, wanted = decoded(ours, ids(batch, 40), mask), decoded(theirs, ids(batch, 40), mask)
        seen = torch.ones_like(found[..., 0], dtype=torch.bool) if mask is None else mask.bool()
        error = (found - wanted).float()[seen].norm(dim=-1) / wanted.float()[seen].norm(dim=-1)
        assert float(error.median()) < near / 10
        assert float(error.max()) < near


def test_each_call_is_made(packed_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding goes through the kernels, not around them; where layers are not answered whole."""
    monkeypatch.setattr("moeq.runtime.whole_layers.join_layers", lambda _: None)
    model = moeq.load(packed_demo, device="cpu", dtype=torch.bfloat16)
    counts: dict[str, int] = {}
    real = native.module()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return getattr(real, name)

    cache = growing_cache(model)
    with torch.inference_mode():
        model(ids(1, 20), past_key_values=cache, use_cache=True)
        model(ids(1, 1), past_key_values=cache, use_cache=True)  # siblings are watched
        monkeypatch.setattr(native, "_module", Counting())
        model(ids(1, 1), past_key_values=cache, use_cache=True)
    layers = model.config.num_hidden_layers
    assert counts["attention"] == counts["choose"] == counts["experts"] == layers
    assert counts["rms_norm"] == 4 * layers + 1
    assert counts["linear"] == 2 * layers, "q, k and v in one call, and o"
    assert counts["dense_linear"] == layers + 1, "routers, and the head"


def test_copies_and_pickles(packed_demo: Path) -> None:
    model = moeq.load(packed_demo, device="cpu")
    wanted = decoded(model, ids(1, 24))
    assert torch.equal(decoded(copy.deepcopy(model), ids(1, 24)), wanted)
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp.gate):
        again = pickle.loads(pickle.dumps(module))
        assert type(again) is type(module)
        assert torch.equal(again.weight, module.weight)


def test_gradients_reach_norms_and_routers(packed_demo: Path) -> None:
    model = moeq.load(packed_demo, device="cpu", dtype=torch.float32)
    model(ids(1, 4), labels=ids(1, 4)).loss.backward()
    layer = model.model.layers[0]
    for module in (layer.input_layernorm, layer.mlp.gate, layer.self_attn.k_norm):
        assert module.weight.grad is not None
        assert float(module.weight.grad.abs().max()) > 0


class Norm(nn.Module):
    """A norm that is not what it looks like: Gemma's, which multiplies with 1 + w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64) / 10)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (64,), eps=self.eps) * (1 + self.weight)


class Router(nn.Module):
    """A router that takes sigmoids, as DeepSeek's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 64) / 8)
        self.top_k = 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.T
        return logits, *torch.topk(logits.sigmoid(), self.top_k)


def test_what_only_looks_alike_is_left_alone() -> None:
    model = nn.ModuleList([Norm(), Router(), nn.LayerNorm(64), nn.Linear(64, 8), nn.Embedding(9, 64)])
    lean.lighten(model)
    assert [type(module) for module in model] == [Norm, Router, nn.LayerNorm, LeanLinear, nn.Embedding]


def test_distrusted_kernels_serve_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "compiled", lambda *_: False)
    linear = nn.Linear(64, 8)
    lean.lighten(nn.ModuleList([linear]))
    assert type(linear) is nn.Linear


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(dtype: torch.dtype, tokens: int) -> None:
    linear = nn.Linear(300, 70, dtype=dtype)
    wanted = linear.double()(x := torch.randn(2, tokens, 300, dtype=torch.float64).to(dtype).double())
    linear = linear.to(dtype)
    lean.lighten(nn.ModuleList([linear]))
    with torch.no_grad():
        found = linear(x.to(dtype))
    assert found.dtype == dtype
    assert torch.allclose(found.double(), wanted, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-4)


def test_siblings_follow_what_is_seen(packed_demo: Path) -> None:
    """q, k and v follow each other, o stays alone; an answer that is not fetched is computed no more."""
    model = moeq.load(packed_demo, device="cpu", dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    alone = [copy.deepcopy(member) for member in members]
    for member in alone:
        member._together = None
    siblings = Siblings(members)
    for place, member in enumerate(members):
        member.join(siblings, place)
    x = [torch.randn(1, 1, attention.q_proj.in_features) for _ in range(5)]
    with torch.inference_mode():
        for step in x[:3]:
            for member, single in zip(members, alone, strict=True):
                assert torch.equal(member(step), single(step))
        assert siblings._followers == {0: [1, 2]}
        members[0](x[3])
        assert torch.equal(members[1](x[3]), alone[1](x[3]))
        members[0](x[4])  # v was not asked for
        assert siblings._followers == {0: [1]}
        assert torch.equal(members[2](x[4]), alone[2](x[4]))
        assert torch.equal(members[1](x[4]), alone[1](x[4]))


def test_inputs_that_change_between_siblings(packed_demo: Path) -> None:
    """Who is given the same tensor, but with other numbers in it, does not follow."""
    model = moeq.load(packed_demo, device="cpu", dtype=torch.float32)
    attention = model.model.layers[1].self_attn
    pair = [attention.q_proj, attention.k_proj]
    siblings = Siblings(pair)
    for place, member in enumerate(pair):
        member.join(siblings, place)
    x = torch.randn(1, 1, attention.q_proj.in_features)
    with torch.inference_mode():
        for _ in range(3):
            pair[0](x)
            x += 1
            wanted = pair[1].weight @ x[0, 0]
            assert torch.allclose(pair[1](x)[0, 0], wanted, atol=0.05 * float(wanted.abs().max()))
        x = torch.randn(1, 1, attention.q_proj.in_features)
        for _ in range(2):
            wanted = [member.weight @ x[0, 0] for member in pair]
            for member, want in zip(pair, wanted, strict=True):
                assert torch.allclose(member(x)[0, 0], want, atol=0.05 * float(want.abs().max()))

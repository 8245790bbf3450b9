"""Tiled experts compute what dense ones with residual plus factors compute (TileQ notes, section 11, T1)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq.arch import hooks
from moeq.errors import PackedError
from moeq.layouts.tiled.serving import TiledExperts
from moeq.layouts.tiled.shape import TileForm, sides_bytes
from moeq.layouts.tiled.stored import TileEntry, build_tile_table, parse_tile_table, read_sides
from tiles import random, sides_of, tiled

HIDDEN, INNER, EXPERTS = 40, 72, 7
SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
FORMS = {
    "tile": TileForm(rank=5, rows=2, columns=4, orders="tile", block=8, plain=8),
    "empty cells": TileForm(rank=3, rows=4, columns=5, orders="expert", block=4, plain=0),
    "one row": TileForm(rank=3, rows=1, columns=7, orders="layer", block=8, plain=24),
    "one column": TileForm(rank=3, rows=7, columns=1),
    "private": TileForm(rank=2, rows=7, columns=7),
    "scales": TileForm(rank=4, rows=2, columns=4, scales="expert"),
    "no factors": TileForm(rank=0, rows=2, columns=4, orders="tile", block=8, plain=8),
    "nothing": TileForm(rank=0, rows=2, columns=4),
}


def pair(form: TileForm, kind: str = "mixtral") -> tuple[nn.Module, nn.Module]:
    """The experts module over packed bytes, and its dense twin."""
    config = AutoConfig.for_model(
        kind, hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=3
    )
    config._experts_implementation = "eager"
    cls = MixtralExperts if kind == "mixtral" else GptOssExperts
    dense = cls(config)
    for name, parameter in dense.named_parameters():
        nn.init.normal_(parameter, std=0.1 if "bias" in name else 1.0)
    handler = tiled(dict.fromkeys(SHAPES, form), SHAPES, EXPERTS)
    layer = handler.layer
    with torch.no_grad():
        for expert in range(EXPERTS):
            gate, up, down = (layer.dense(expert, name) for name in SHAPES)
            both = torch.cat([gate, up]) if dense.is_concatenated else torch.stack([gate, up], 1).flatten(0, 1)
            dense.gate_up_proj[expert] = both.T if dense.is_transposed else both
            dense.down_proj[expert] = down.T if dense.is_transposed else down
    packed = cls(AutoConfig.for_model(kind, **{k: v for k, v in config.to_dict().items() if k != "model_type"}))
    packed.load_state_dict(dense.state_dict())
    hooks.register_experts()
    hooks.attach_handler(hooks.strip_weights(nn.ModuleDict({"experts": packed}), "experts"), handler)
    return packed, dense


def routed(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    index_Tk = torch.stack(
        [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(t))[:3] for t in range(tokens)]
    )
    return random(tokens, HIDDEN, seed=5), index_Tk, random(tokens, 3, seed=6).softmax(-1)


@pytest.mark.parametrize("tokens", [1, 23])
@pytest.mark.parametrize("name", FORMS)
def test_tiled_experts_equal_their_dense_twin(name: str, tokens: int) -> None:
    packed, dense = pair(FORMS[name])
    arguments = routed(tokens)
    with torch.no_grad():
        torch.testing.assert_close(packed(*arguments), dense(*arguments), rtol=1e-4, atol=1e-5)


def test_active_experts_of_one_row_and_of_one_column_do_not_mix() -> None:
    packed, dense = pair(FORMS["tile"])
    handler = packed.get_submodule("moeq")
    assert isinstance(handler, TiledExperts)
    cells = handler.layer.sides["gate"].cells().tolist()
    same = [
        (a, b) for a in range(EXPERTS) for b in range(a) if cells[a][0] == cells[b][0] or cells[a][1] == cells[b][1]
    ]
    assert {cells[a][0] == cells[b][0] for a, b in same} == {True, False}
    index = torch.tensor([(*two, next(e for e in range(EXPERTS) if e not in two)) for two in same])
    x, weights = random(len(same), HIDDEN, seed=1), random(len(same), 3, seed=2).softmax(-1)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, index, weights), dense(x, index, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tile", "scales"])
def test_biases_come_before_the_weights(name: str) -> None:
    packed, dense = pair(FORMS[name], "gpt_oss")
    x, index, weights = routed(9)
    with torch.no_grad():
        torch.testing.assert_close(packed(x, index, weights), dense(x, index, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tile", "scales"])
def test_gradients_reach_the_inputs(name: str) -> None:
    packed, dense = pair(FORMS[name])
    grads = []
    for module in (packed, dense):
        x, index, weights = routed(5)
        x.requires_grad_()
        weights = weights.detach().requires_grad_()
        module(x, index, weights).square().sum().backward()
        grads.append((x.grad, weights.grad))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_no_token_at_all_is_answered() -> None:
    packed, _ = pair(FORMS["tile"])
    index = torch.full((4, 3), EXPERTS)  # only sentinels of expert parallelism
    assert not packed(random(4, HIDDEN, seed=0), index, torch.zeros(4, 3)).any()


@pytest.mark.parametrize("name", FORMS)
def test_sides_have_the_bytes_that_their_form_says(name: str) -> None:
    form = FORMS[name]
    total = sum(sides_of(form, SHAPES[each], EXPERTS, 0).numel() for each in SHAPES)
    assert total == sides_bytes(dict.fromkeys(SHAPES, form), EXPERTS, SHAPES)


def test_tables_that_lie_are_refused() -> None:
    form = FORMS["tile"]
    forms = dict.fromkeys(SHAPES, form)
    size = sides_bytes(forms, EXPERTS, SHAPES)
    table = build_tile_table(forms, EXPERTS, SHAPES)
    assert parse_tile_table(table, EXPERTS, SHAPES, size)["up"].form == form
    for column, value in ((0, 64), (1, 6), (1, -1), (2, 0), (3, 3), (4, 1), (4, 9), (5, 0), (5, -1), (6, 3), (7, 3)):
        broken = table.clone()
        broken[1, column] = value
        with pytest.raises(PackedError):
            parse_tile_table(broken, EXPERTS, SHAPES, size)
    for broken, bytes_ in ((table[:2], size), (table.int(), size), (table, size + 64)):
        with pytest.raises(PackedError):
            parse_tile_table(broken, EXPERTS, SHAPES, bytes_)


def test_cells_and_permutations_are_proven() -> None:
    form = replace(FORMS["tile"], scales="expert")
    data = sides_of(form, SHAPES["gate"], EXPERTS, 0)
    entries = {"gate": TileEntry(offset=0, form=form)}
    sides = read_sides(data, entries, EXPERTS, SHAPES, "layer")["gate"]
    assert sides.cells().shape == (EXPERTS, 2)
    start = data.numel() - 64 * -(-2 * HIDDEN * 2 // 64)
    for at, value, message in (
        (0, 9, "cell"),
        (1, 1, "cell"),
        (start, int(data[start + 2]), "permutation"),
        (start + 1, 255, "permutation"),
    ):
        broken = data.clone()
        broken[at] = value
        with pytest.raises(PackedError, match=message):
            read_sides(broken, entries, EXPERTS, SHAPES, "layer")
    twice = data.clone()
    twice[4:8] = twice[0:4]
    with pytest.raises(PackedError, match="share a cell"):
        read_sides(twice, entries, EXPERTS, SHAPES, "layer")


@pytest.mark.parametrize("name", FORMS)
def test_facts_for_kernels_follow_the_bytes(name: str) -> None:
    handler = tiled(dict.fromkeys(SHAPES, FORMS[name]), SHAPES, EXPERTS)
    assert handler.layer.facts is None  # on a CPU nobody asks for them
    layer = handler.to("meta").layer
    assert layer.facts is not None
    assert layer.residual.facts is not None
    assert layer.facts["up"].row_E.device.type == "meta"
    assert handler.layer is layer

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
)

from moeq.arch.keymap import Route
from moeq.arch.sources import Stack, matrix_sources
from moeq.errors import CheckpointError, MissingTensorError
from moeq.spec import TensorInfo

EXPERTS, ROWS, COLUMNS = 3, 5, 7
KEY = "layers.0.experts.gate_up_proj"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What lies on disk: pattern -> names, each of one shape; and what transformers makes of it."""

    names: dict[str, list[str]]
    shape: tuple[int, ...]
    operations: tuple[ConversionOps, ...]
    transposed: bool = False
    concatenated: bool = True
    targets: tuple[str, ...] = (KEY,)


def each(word: str, count: int = EXPERTS) -> list[str]:
    return [f"layers.0.experts.{expert}.{word}" for expert in range(count)]


MERGE = MergeModulelist(dim=0)
CASES = {
    "renamed": Case(names={"a": ["w13"]}, shape=(EXPERTS, 2 * ROWS, COLUMNS), operations=()),
    "renamed, transposed": Case(
        names={"a": ["w13"]}, shape=(EXPERTS, COLUMNS, 2 * ROWS), operations=(), transposed=True
    ),
    "renamed, transposed, alternating": Case(
        names={"a": ["w13"]}, shape=(EXPERTS, COLUMNS, 2 * ROWS), operations=(), transposed=True, concatenated=False
    ),
    "renamed, alternating": Case(
        names={"a": ["w13"]}, shape=(EXPERTS, 2 * ROWS, COLUMNS), operations=(), concatenated=False
    ),
    "transposed on disk": Case(names={"a": ["w13"]}, shape=(EXPERTS, COLUMNS, 2 * ROWS), operations=(Transpose(1, 2),)),
    "transposed on disk, from a transposed parameter": Case(
        names={"a": ["w13"]}, shape=(EXPERTS, 2 * ROWS, COLUMNS), operations=(Transpose(2, 1),), transposed=True
    ),
    "interleaved on disk": Case(
        names={"a": ["w13"]}, shape=(EXPERTS, 2 * ROWS, COLUMNS), operations=(Interleave(dim=1),)
    ),
    "interleaved on disk, transposed": Case(
        names={"a": ["w13"]}, shape=(EXPERTS, COLUMNS, 2 * ROWS), operations=(Interleave(dim=2),), transposed=True
    ),
    "two stacks": Case(
        names={"a": ["w1"], "b": ["w3"]}, shape=(EXPERTS, ROWS, COLUMNS), operations=(Concatenate(dim=1),)
    ),
    "two stacks, transposed": Case(
        names={"a": ["w1"], "b": ["w3"]},
        shape=(EXPERTS, COLUMNS, ROWS),
        operations=(Concatenate(dim=2),),
        transposed=True,
    ),
    "single experts": Case(
        names={"a": each("w1"), "b": each("w3")}, shape=(ROWS, COLUMNS), operations=(MERGE, Concatenate(dim=1))
    ),
    "single experts, transposed": Case(
        names={"a": each("w1"), "b": each("w3")},
        shape=(COLUMNS, ROWS),
        operations=(MERGE, Concatenate(dim=2)),
        transposed=True,
    ),
    "single fused experts": Case(names={"a": each("w13")}, shape=(2 * ROWS, COLUMNS), operations=(MERGE,)),
    "single fused experts, alternating": Case(
        names={"a": each("w13")}, shape=(2 * ROWS, COLUMNS), operations=(MERGE,), concatenated=False
    ),
    "text and vision experts": Case(
        names={"a": each("w1", 2 * EXPERTS), "b": each("w3", 2 * EXPERTS)},
        shape=(ROWS, COLUMNS),
        operations=(ErnieFuseAndSplitTextVisionExperts(stack_dim=0, concat_dim=1),),
        targets=("layers.0.text.gate_up_proj", KEY),
    ),
}


def stack_of(case: Case) -> Stack:
    return Stack(
        key=KEY,
        model_type="test",
        projections=("gate", "up"),
        num_experts=EXPERTS,
        shape=(ROWS, COLUMNS),
        transposed=case.transposed,
        concatenated=case.concatenated,
    )


def route_of(case: Case) -> Route:
    sources = tuple(tuple(names) for names in case.names.values())
    return Route(targets=case.targets, sources=sources, operations=case.operations)


def headers(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(file="f", dtype="F32", shape=tuple(tensor.shape), start=0, stop=0)
        for name, tensor in tensors.items()
    }


def disk(case: Case) -> dict[str, Tensor]:
    return {name: torch.randn(case.shape) for names in case.names.values() for name in names}


def parameter(case: Case, tensors: dict[str, Tensor]) -> Tensor:
    """What transformers' own operations make of the tensors."""
    collected: dict[str, Any] = {pattern: [tensors[name] for name in names] for pattern, names in case.names.items()}
    if not case.operations:
        return collected["a"][0]
    for operation in case.operations:
        collected = operation.convert(
            collected, source_patterns=list(case.names), target_patterns=list(case.targets), config=None
        )
    return collected[KEY]


@pytest.mark.parametrize("name", CASES)
def test_sources_agree_with_the_operations_themselves(name: str) -> None:
    case = CASES[name]
    tensors = disk(case)
    found = matrix_sources(stack_of(case), route_of(case), headers(tensors))
    fused = parameter(case, tensors)
    fused = fused.transpose(1, 2) if case.transposed else fused
    assert fused.shape == (EXPERTS, 2 * ROWS, COLUMNS)
    for expert in range(EXPERTS):
        if case.concatenated:
            expected = {"gate": fused[expert, :ROWS], "up": fused[expert, ROWS:]}
        else:
            expected = {"gate": fused[expert, 0::2], "up": fused[expert, 1::2]}
        for projection, source in found.items():
            w = tensors[source.tensor(expert)]
            w = w[expert + source.expert_offset] if source.stacked else w
            w = w.T if source.transposed else w
            assert torch.equal(w[source.start :: source.step][:ROWS], expected[projection])


@pytest.mark.parametrize(
    "operations",
    [
        (Chunk(dim=0),),
        (Transpose(0, 1),),
        (Interleave(dim=2),),
        (Interleave(dim=1, inverse=True),),
        (MergeModulelist(dim=1),),
        (MERGE, Concatenate(dim=0)),
        (MERGE, Concatenate(dim=1), Transpose(1, 2)),
        (Transpose(1, 2), Interleave(dim=1)),
    ],
    ids=str,
)
def test_other_operations_are_refused_by_name(operations: tuple[ConversionOps, ...]) -> None:
    case = replace(CASES["single experts"], operations=operations)
    with pytest.raises(CheckpointError, match=type(operations[0]).__name__) as caught:
        matrix_sources(stack_of(case), route_of(case), headers(disk(case)))
    assert "test stores" in str(caught.value)


def test_one_of_two_stacks_is_missing() -> None:
    case = replace(CASES["two stacks"], names={"a": ["w1"], "b": []})
    with pytest.raises(MissingTensorError):
        matrix_sources(stack_of(case), route_of(case), headers(disk(case)))


def test_one_expert_only() -> None:
    """With a single expert no part of the names varies."""
    case = replace(CASES["single experts"], names={"a": each("w1", 1), "b": each("w3", 1)})
    found = matrix_sources(replace(stack_of(case), num_experts=1), route_of(case), headers(disk(case)))
    assert {projection: source.name for projection, source in found.items()} == {
        "gate": "layers.0.experts.{expert}.w1",
        "up": "layers.0.experts.{expert}.w3",
    }

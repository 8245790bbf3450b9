"""The compiled kernels against the torch reference: exactly with exact activations, else within what 8 bits allow."""

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_help import random_record, rounded, worst
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq import native
from moeq.arch import hooks
from moeq.format.records import decode_in_chunks
from moeq.layouts.grouped import cpu, reference, serving
from moeq.layouts.grouped.packed import PackedLayer, PackedMatrix
from moeq.layouts.grouped.serving import LINEAR
from moeq.layouts.grouped.stored import table_of
from moeq.layouts.serving import first
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec, stored_bytes

pytestmark = pytest.mark.skipif(not native.available(), reason="moeq was installed without its compiled kernels")
HIDDEN, INNER, EXPERTS = 200, 136, 5


def layer_of(seed: int = 0, *, exact: bool | None = None, shapes: tuple[int, int] = (HIDDEN, INNER)) -> PackedLayer:
    """Experts of every width, level set and group size, mixed."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = shapes
    names = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    kinds = [QuantSpec(bits=b, levels=v, group_size=g) for b, v, g in product(BITS, SCALAR_LEVELS, GROUP_SIZES)]
    order = torch.randperm(len(kinds), generator=generator).tolist()
    records, entries, offset = [], [], 0
    for expert in range(EXPERTS):
        row = []
        for position, shape in enumerate(names.values()):
            spec = kinds[order[(3 * expert + position) % len(order)]]
            records.append(random_record(spec, shape, generator))
            row.append((offset, spec))
            offset += stored_bytes(spec, shape)
        entries.append(tuple(row))
    return PackedLayer(
        data=torch.cat(records), entries=tuple(entries), shapes=names, table=table_of(tuple(entries)), exact=exact
    )


def mixtral(hidden_act: str = "silu") -> nn.Module:
    config = AutoConfig.for_model(
        "mixtral", hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, hidden_act=hidden_act
    )
    return hooks.strip_weights(nn.ModuleDict({"experts": MixtralExperts(config)}), "experts")


def inputs(tokens: int, top_k: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    index_Tk = torch.randint(0, EXPERTS, (tokens, top_k), generator=generator)  # experts without tokens, and twice
    return (
        torch.randn(tokens, HIDDEN, generator=generator),
        index_Tk,
        torch.rand(tokens, top_k, generator=generator),
    )


@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("bits", BITS)
def test_products_are_those_of_the_decoded_matrix(bits: int, levels: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for group_size, shape in product(GROUP_SIZES, ((35, 300), (16, 128), (3, 5), (2, 1), (40, 1024))):
        spec = QuantSpec(bits=bits, levels=levels, group_size=group_size)
        record = random_record(spec, shape, generator)
        w_NK = decode_in_chunks(record, spec, shape)
        for tokens, isa in product((1, 2, 3, 7), native.isas()):
            x_SK = torch.randn(tokens, shape[1], generator=generator)
            exact = native.linear(record, spec, shape, x_SK, exact=True, isa=isa)
            assert worst(exact, x_SK @ w_NK.T, x_SK, w_NK) < 1e-6
            fast = native.linear(record, spec, shape, x_SK, isa=isa)
            assert worst(fast, rounded(x_SK) @ w_NK.T, x_SK, w_NK) < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    levels=st.sampled_from(SCALAR_LEVELS),
    group_size=st.sampled_from(GROUP_SIZES),
    rows=st.integers(1, 50),
    columns=st.integers(1, 700),
    tokens=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(bits: int, levels: str, group_size: int, rows: int, columns: int, tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits=bits, levels=levels, group_size=group_size)
    record = random_record(spec, (rows, columns), generator)
    w_NK = decode_in_chunks(record, spec, (rows, columns))
    x_SK = torch.randn(tokens, columns, generator=generator)
    found = native.linear(record, spec, (rows, columns), x_SK)
    assert worst(found, rounded(x_SK) @ w_NK.T, x_SK, w_NK) < 1e-6


@pytest.mark.parametrize("top", [1e-35, 1e-20, 1e20])
def test_activations_of_any_size(top: float) -> None:
    spec, shape = QuantSpec(bits=4), (8, 256)
    record = random_record(spec, shape, torch.Generator().manual_seed(0))
    w_NK = decode_in_chunks(record, spec, shape)
    x_SK = torch.zeros(2, 256)
    x_SK[0, 7] = top
    found = native.linear(record, spec, shape, x_SK)
    torch.testing.assert_close(found, x_SK @ w_NK.T, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(value: float) -> None:
    spec, shape = QuantSpec(bits=2, levels="half"), (4, 256)
    record = random_record(spec, shape, torch.Generator().manual_seed(0))
    x_SK = torch.ones(2, 256)
    x_SK[1, 200] = value
    for exact in (False, True):
        found = native.linear(record, spec, shape, x_SK, exact=exact)
        assert found[0].isfinite().all()
        assert not found[1].isfinite().any()


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("dtype", native.DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 70, 300])
def test_experts_are_those_of_the_reference(
    tokens: int, dtype: torch.dtype, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On machines with units for matrices of 16-bit floats and without, where prompts meet integers too."""
    monkeypatch.setattr(cpu, "product_dtype", lambda of: torch.float32 if slow else of)
    monkeypatch.setattr(cpu, "_has_matrix_units", lambda: not slow)
    module = mixtral()
    x_TH, index_Tk, weight_Tk = inputs(tokens)
    x_TH, weight_Tk = x_TH.to(dtype), weight_Tk.to(dtype)
    for seed in range(3):
        wanted = reference.experts(module, layer_of(seed), x_TH.float(), index_Tk, weight_Tk.float())
        scale = wanted.norm(dim=1, keepdim=True) / HIDDEN**0.5
        for exact in (True, None, False):
            found = cpu.experts(module, layer_of(seed, exact=exact), x_TH, index_Tk, weight_Tk)
            assert found is not None
            assert found.dtype == dtype
            error = (found.float() - wanted) / scale
            if exact or (exact is None and tokens > cpu.FEW and not slow):
                assert error.abs().max() < (2e-5 if dtype == torch.float32 else 0.05)
            assert error.square().mean().sqrt() < 0.05, "8 bits"


@pytest.mark.parametrize("isa", native.isas())
def test_fused_experts_on_every_instruction_set(isa: str) -> None:
    x_TH, index_Tk, weight_Tk = inputs(7, top_k=3)
    index_Tk[2] = EXPERTS  # what expert parallelism leaves to others
    layer = layer_of(1, shapes=(HIDDEN, INNER))
    kept = torch.where(index_Tk < EXPERTS, weight_Tk, 0.0)
    wanted = reference.experts(mixtral(), layer, x_TH, index_Tk.clamp(max=EXPERTS - 1), kept)
    found = native.experts(layer.data, layer.table, INNER, x_TH, index_Tk, weight_Tk, exact=True, isa=isa)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not found[2].any()


def test_threads_change_nothing() -> None:
    x_TH, index_Tk, weight_Tk = inputs(3)
    layer = layer_of(2)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native.experts(layer.data, layer.table, INNER, x_TH, index_Tk, weight_Tk))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_other_gates_are_served_too() -> None:
    """A gate with limits and biases, gpt-oss's, and another activation: not fused, but computed from the bytes."""
    config = AutoConfig.for_model("gpt_oss", hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    oss = hooks.strip_weights(nn.ModuleDict({"experts": GptOssExperts(config)}), "experts")
    for name, bias in oss.named_parameters():
        nn.init.normal_(bias, std=0.1)
        assert "bias" in name
    x_TH, index_Tk, weight_Tk = inputs(4)
    for module in (oss, mixtral("gelu")):
        assert not hooks.gates_by_silu(module, INNER)
        layer = layer_of(3, exact=True)
        with torch.no_grad():
            found = cpu.experts(module, layer, x_TH, index_Tk, weight_Tk)
            wanted = reference.experts(module, layer, x_TH, index_Tk, weight_Tk)
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert hooks.gates_by_silu(mixtral(), INNER)


def test_what_is_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    module, layer = mixtral(), layer_of()
    x_TH, index_Tk, weight_Tk = inputs(2)
    matrix = layer.matrix(0, "up")
    assert cpu.linear(x_TH, matrix) is not None
    assert cpu.linear(x_TH.double(), matrix) is None
    assert cpu.linear(x_TH.to("meta"), matrix) is None
    assert cpu.linear(x_TH.clone().requires_grad_(), matrix) is None
    assert cpu.experts(module, layer, x_TH, index_Tk, weight_Tk.clone().requires_grad_()) is None
    with torch.no_grad():
        assert cpu.linear(x_TH.clone().requires_grad_(), matrix) is not None
    monkeypatch.setattr(native, "_module", None)
    monkeypatch.setattr(native, "_unsaid", ["no kernels"])
    with pytest.warns(UserWarning, match="no kernels"):
        first(LINEAR, x_TH, matrix)
    torch.testing.assert_close(
        first(serving.EXPERTS, module, layer, x_TH, index_Tk, weight_Tk).isfinite().all(), torch.tensor(True)
    )


def test_tables_and_buffers_that_do_not_fit_are_refused() -> None:
    layer = layer_of()
    x_TH, index_Tk, weight_Tk = inputs(2)

    def call(**changed: Any) -> Tensor:
        given = {"data": layer.data, "table": layer.table, "inner": INNER, "x": x_TH, "index": index_Tk}
        given |= changed
        return native.experts(given["data"], given["table"], given["inner"], given["x"], given["index"], weight_Tk)

    call()
    for column, value in ((0, layer.data.numel() - 64), (0, -64), (0, 1), (1, 7), (2, 48), (3, 5)):
        table = layer.table.clone()
        table[:, :, column] = value
        with pytest.raises(ValueError, match=r"blob|no such"):
            call(table=table)
    with pytest.raises(ValueError, match="blob"):
        call(data=layer.data[:1000])
    with pytest.raises(ValueError, match="negative"):
        call(index=torch.full_like(index_Tk, -1))
    with pytest.raises(ValueError, match="a row of experts"):
        call(index=index_Tk[:1])
    with pytest.raises(ValueError, match="blob"):
        call(inner=10**6)


def test_compiled_models_see_operators() -> None:
    layer, module = layer_of(4), mixtral()
    x_TH, index_Tk, weight_Tk = inputs(3)
    matrix: PackedMatrix = layer.matrix(1, "down")
    torch.library.opcheck(
        torch.ops.moeq.packed_experts.default, (x_TH, index_Tk, weight_Tk, layer.data, layer.table, INNER, False)
    )

    def step(x: Tensor) -> Tensor:
        answer = first(serving.EXPERTS, module, layer, x, index_Tk, weight_Tk)
        return first(LINEAR, answer[:, :INNER].contiguous(), matrix) + 1

    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(x_TH), step(x_TH))

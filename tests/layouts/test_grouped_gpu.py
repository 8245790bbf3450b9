"""The Triton kernels compute what the torch reference computes."""

import pytest
import torch
from packing_help import mixtral, packed_layer, packed_matrix, relative_error
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from moeq.arch import hooks
from moeq.layouts.grouped import gpu, reference
from moeq.spec import BITS, GROUP_SIZES, SCALAR_LEVELS, QuantSpec

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Against the reference in float32. The interpreter cuts bfloat16 off where a GPU rounds."""


def mixed(expert: int, position: int) -> QuantSpec:
    """Every width, level set and group size somewhere in one layer."""
    cycle = 3 * expert + position
    return QuantSpec(
        bits=BITS[cycle % 7], group_size=GROUP_SIZES[cycle % 4], levels=SCALAR_LEVELS[(cycle + expert) % 4]
    )


def uniform(bits: int, group_size: int, levels: str = "asym") -> QuantSpec:
    return QuantSpec(bits=bits, group_size=group_size, levels=levels)


def decode_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode experts before they are multiplied, as with many rows: five in three rounds, the last of one."""
    for module in ("triton_launch", "triton_rows_launch"):
        monkeypatch.setattr(f"moeq.kernels.{module}.DECODE_FROM", 1)
        monkeypatch.setattr(f"moeq.kernels.{module}.experts_at_once", lambda *_: 2)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_linear_of_every_width(bits: int, group_size: int, triton_device: torch.device) -> None:
    torch.manual_seed(bits)
    levels = SCALAR_LEVELS[(BITS.index(bits) + GROUP_SIZES.index(group_size)) % 4]
    matrix = packed_matrix((40, 200), uniform(bits, group_size, levels), triton_device)
    x_RK = torch.randn(3, 200, device=triton_device)
    assert relative_error(gpu.run_linear(x_RK, matrix), reference.linear(x_RK, matrix)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("levels", SCALAR_LEVELS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_linear_of_every_dtype(levels: str, dtype: torch.dtype, triton_device: torch.device) -> None:
    torch.manual_seed(1)
    for bits in (3, 8):
        matrix = packed_matrix((16, 256), uniform(bits, 128, levels), triton_device)
        x_RK = torch.randn(2, 256, device=triton_device).to(dtype)
        answer = gpu.run_linear(x_RK, matrix)
        assert answer.dtype == dtype
        assert relative_error(answer, reference.linear(x_RK.float(), matrix)) < TOLERANCE[dtype]


@pytest.mark.parametrize("columns", [1, 7, 24, 127, 129])
def test_linear_of_ragged_shapes(columns: int, triton_device: torch.device) -> None:
    torch.manual_seed(columns)
    matrix = packed_matrix((5, columns), uniform(6, 32), triton_device)
    x_RK = torch.randn(17, columns, device=triton_device)
    assert relative_error(gpu.run_linear(x_RK, matrix), reference.linear(x_RK, matrix)) < TOLERANCE[torch.float32]
    assert gpu.run_linear(x_RK[:0], matrix).shape == (0, 5)


@pytest.mark.parametrize("num_tokens", [1, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_of_mixed_widths(num_tokens: int, dtype: torch.dtype, triton_device: torch.device) -> None:
    torch.manual_seed(num_tokens)
    layer = packed_layer(5, 136, 72, mixed, triton_device)
    module = mixtral(136, 72, 5)
    x_TH = torch.randn(num_tokens, 136, device=triton_device).to(dtype)
    index_Tk = torch.randint(0, 4, (num_tokens, 2), device=triton_device)  # the last expert has no token
    index_Tk[0] = 2  # the same expert twice
    weights_Tk = torch.rand(num_tokens, 2, device=triton_device)
    wanted = reference.experts(module, layer, x_TH.float(), index_Tk, weights_Tk)
    answer = gpu.run_experts(module, layer, x_TH, index_Tk, weights_Tk)
    assert answer.dtype == dtype
    assert relative_error(answer, wanted) < TOLERANCE[dtype]


def test_sums_for_down_come_with_gate_and_up(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    layer = packed_layer(2, 128, 256, lambda expert, position: uniform((4, 3, 2)[position], 128), triton_device)
    module = mixtral(128, 256, 2)
    x_TH = torch.randn(2, 128, device=triton_device)
    arguments = module, layer, x_TH, torch.tensor([[0, 1], [1, 0]], device=triton_device), torch.rand(2, 2).to(x_TH)
    assert relative_error(gpu.run_experts(*arguments), reference.experts(*arguments)) < TOLERANCE[torch.float32]


def test_sentinels_add_nothing(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    layer = packed_layer(3, 40, 24, mixed, triton_device)
    module = mixtral(40, 24, 3)
    x_TH, weights_Tk = torch.randn(2, 40, device=triton_device), torch.rand(2, 2, device=triton_device)
    index_Tk = torch.tensor([[1, 3], [3, 3]], device=triton_device)
    answer = gpu.run_experts(module, layer, x_TH, index_Tk, weights_Tk)
    assert relative_error(answer, reference.experts(module, layer, x_TH, index_Tk, weights_Tk)) < 1e-5
    assert not answer[1].any()


def test_experts_with_many_tokens_are_decoded_once(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = packed_layer(5, 136, 40, mixed, triton_device)
    module = mixtral(136, 40, 5)
    x_TH = torch.randn(6, 136, device=triton_device)
    index_Tk = torch.randint(0, 6, (6, 2), device=triton_device)
    arguments = module, layer, x_TH, index_Tk, torch.rand(6, 2, device=triton_device)
    decode_first(monkeypatch)
    assert relative_error(gpu.run_experts(*arguments), reference.experts(*arguments)) < TOLERANCE[torch.float32]
    wanted = gpu.product(layer, x_TH, index_Tk, "up")
    monkeypatch.undo()
    assert relative_error(gpu.product(layer, x_TH, index_Tk, "up"), wanted) < TOLERANCE[torch.float32]


def test_a_family_with_biases_and_a_gate_of_its_own(triton_device: torch.device) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss", hidden_size=40, intermediate_size=24, num_local_experts=3, num_experts_per_tok=2
    )
    module = GptOssExperts(config).to(triton_device)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    layer = packed_layer(3, 40, 24, mixed, triton_device)
    x_TH = torch.randn(4, 40, device=triton_device)
    index_Tk = torch.tensor([[0, 1], [2, 2], [1, 3], [0, 2]], device=triton_device)
    arguments = module, layer, x_TH, index_Tk, torch.rand(4, 2, device=triton_device)
    with torch.no_grad():
        assert relative_error(gpu.run_experts(*arguments), reference.experts(*arguments)) < TOLERANCE[torch.float32]


def test_one_graph_serves_any_number_of_tokens(triton_device: torch.device) -> None:
    layer = packed_layer(2, 40, 24, lambda *_: uniform(4, 32), triton_device)
    matrix = packed_matrix((8, 40), uniform(4, 32), triton_device)
    module = mixtral(40, 24, 2)
    assert hooks.gates_by_silu(module, 24)  # asked with numbers, once

    def run(x_TH: Tensor, index_Tk: Tensor, weights_Tk: Tensor) -> tuple[Tensor, ...]:
        whole = gpu.run_experts(module, layer, x_TH, index_Tk, weights_Tk)
        return whole, gpu.product(layer, x_TH, index_Tk, "up"), gpu.run_linear(x_TH, matrix)

    x_TH, index_Tk = torch.randn(3, 40, device=triton_device), torch.zeros(3, 2, dtype=torch.int64).to(triton_device)
    trace = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph = trace(x_TH, index_Tk, torch.rand(3, 2).to(x_TH)).graph
    for answer in graph.output_node().args[0]:
        assert not isinstance(answer.meta["val"].shape[0], int)


def test_operators_obey_their_schemas(triton_device: torch.device) -> None:
    layer = packed_layer(2, 40, 24, lambda *_: uniform(4, 32), triton_device)
    facts = layer.facts
    assert facts is not None
    x_TH, index_Tk = torch.randn(1, 40, device=triton_device), torch.tensor([[1, 0]], device=triton_device)
    tables = layer.data, facts.table, list(facts.widths), list(facts.spans)
    checks = "test_schema", "test_faketensor"
    weights_Tk = torch.rand(1, 2, device=triton_device)
    torch.library.opcheck(gpu.experts_op, (x_TH, index_Tk, weights_Tk, *tables, 24), test_utils=checks)
    torch.library.opcheck(gpu.product_op, (x_TH, index_Tk, *tables, 1, 24), test_utils=checks)
    torch.library.opcheck(gpu.linear_op, (x_TH, *tables, 24), test_utils=checks)

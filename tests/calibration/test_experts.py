"""Rounding the experts of a layer from captured inputs: nobody starves, and replay answers the same."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeq.calibration import experts as module
from moeq.calibration.moments import second_moment
from moeq.calibration.stream import Capture
from moeq.format.records import dequantize
from moeq.model_parts import MatrixSource, MoeLayer
from moeq.quantizers.base import QuantizedMatrix
from moeq.quantizers.registry import make_quantizer
from moeq.spec import QuantSpec

HIDDEN, INNER, EXPERTS = 32, 48, 4
SHAPES = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
SPECS = [
    [QuantSpec(bits=bits, group_size=32) for bits in widths] for widths in ((3, 3, 4), (2, 4, 3), (8, 8, 8), (3, 3, 3))
]


def make_layer() -> MoeLayer:
    source = MatrixSource(name="w{expert}", stacked=False)
    return MoeLayer(
        path="experts", block="", num_experts=EXPERTS, top_k=2, shapes=SHAPES, sources=dict.fromkeys(SHAPES, source)
    )


def make_experts() -> MixtralExperts:
    config = AutoConfig.for_model(
        "mixtral", hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=2
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2)
    return experts


def make_capture(num_tokens: int = 300, routing: str = "natural", seed: int = 1) -> Capture:
    """Expert 2 gets a single token, expert 3 none."""
    x_TH = torch.randn(num_tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))
    index_Tk = torch.tensor([[0, 1]]).repeat(num_tokens, 1)
    index_Tk[7] = torch.tensor([2, 0])
    weights_Tk = torch.rand(num_tokens, 2, generator=torch.Generator().manual_seed(2))
    return Capture(
        x_TH=x_TH, index_Tk=index_Tk, weights_Tk=weights_Tk, stats_Tk=index_Tk if routing == "natural" else None
    )


class Sink:
    def __init__(self) -> None:
        self.rounded: dict[tuple[int, str], QuantizedMatrix] = {}

    def __call__(self, expert: int, projection: str, rounded: QuantizedMatrix) -> None:
        self.rounded[expert, projection] = rounded

    def weights(self, expert: int, projection: str, spec: QuantSpec | None = None) -> Tensor:
        rounded = self.rounded[expert, projection]
        spec = spec or SPECS[expert][list(SHAPES).index(projection)]
        return dequantize(rounded.codes_NK, rounded.scale_NG, rounded.zero_NG, spec)


def read(experts: MixtralExperts, expert: int, projection: str) -> Tensor:
    if projection == "down":
        return experts.down_proj.data[expert]
    fused = experts.gate_up_proj.data[expert]
    return fused[:INNER] if projection == "gate" else fused[INNER:]


def run(capture: Capture, quantizer: str = "gptq") -> tuple[MixtralExperts, Sink, Tensor, list[int]]:
    experts, sink = make_experts(), Sink()
    task = module.ExpertsTask(
        layer=make_layer(),
        read=lambda expert, projection: read(experts, expert, projection),
        round=module.grouped(make_layer(), SPECS, make_quantizer(quantizer)),
        sink=sink,
        device=torch.device("cpu"),
    )
    with torch.inference_mode():
        y_TH, counts = module.quantize_experts(task, experts, capture)
    return experts, sink, y_TH, counts


@pytest.mark.parametrize("routing", ["natural", "all"])
def test_the_answer_is_that_of_the_rounded_weights(routing: str) -> None:
    capture = make_capture(routing=routing)
    experts, sink, y_TH, counts = run(capture)
    assert counts == [300, 299, 1, 0]
    with torch.no_grad():
        for expert in range(EXPERTS):
            gate_up = torch.cat([sink.weights(expert, "gate"), sink.weights(expert, "up")])
            experts.gate_up_proj[expert] = gate_up
            experts.down_proj[expert] = sink.weights(expert, "down")
        wanted = experts(capture.x_TH, capture.index_Tk, capture.weights_Tk)
    torch.testing.assert_close(y_TH, wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("routing", ["natural", "all"])
def test_replay_gives_the_same_bits(routing: str) -> None:
    capture = make_capture(routing=routing)
    experts, sink, y_TH, counts = run(capture)
    with torch.inference_mode():
        again_TH, again = module.replay_experts(make_layer(), sink.weights, experts, capture, torch.device("cpu"))
    assert torch.equal(again_TH, y_TH)
    assert again == counts


def test_workers_do_not_change_the_bits() -> None:
    capture = make_capture(routing="all")
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(capture))
    finally:
        torch.set_num_threads(before)
    for _, sink, y_TH, _ in results[1:]:
        assert torch.equal(y_TH, results[0][2])
        assert list(sink.rounded) == list(results[0][1].rounded) == [(e, p) for e in range(EXPERTS) for p in SHAPES]
        for place, matrix in sink.rounded.items():
            assert torch.equal(matrix.codes_NK, results[0][1].rounded[place].codes_NK), place


@pytest.mark.parametrize("routing", ["natural", "all"])
def test_chunks_do_not_change_the_outcome(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = make_capture(700, routing=routing)
    _, sink, y_TH, _ = run(capture)
    for chunk in (32, 100, 699, 10_000):
        monkeypatch.setattr(module, "CHUNK_TOKENS", chunk)
        _, other, again_TH, _ = run(capture)
        # Sums in another order may flip a code in a hundred.
        assert float((again_TH - y_TH).norm() / y_TH.norm()) < 0.05, chunk
        for place, matrix in other.rounded.items():
            assert float((matrix.codes_NK != sink.rounded[place].codes_NK).float().mean()) < 0.02, (chunk, place)


def test_products_come_in_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tokens of the experts: each new shape leaves compiled code among the tensors."""
    rows = set()
    plain = module.hooks.activation

    def spy(experts: nn.Module, expert: int, gate_SI: Tensor, up_SI: Tensor) -> Tensor:
        rows.add(len(up_SI))
        return plain(experts, expert, gate_SI, up_SI)

    monkeypatch.setattr(module.hooks, "activation", spy)
    experts, x_TH = make_experts(), torch.randn(5000, HIDDEN)
    weights = {name: read(experts, 0, name) for name in SHAPES}
    for count in range(1, 5000, 37):
        chunks = list(module._inner(experts, 0, x_TH, torch.arange(count), weights, torch.device("cpu")))
        assert sum(real for _, real in chunks) == count
        assert all(real <= len(z_SI) <= max(2 * real, real + module.STEP_TOKENS) for z_SI, real in chunks)
    assert len(rows) <= 16


@pytest.mark.parametrize("width", [1, 5, 512, 1030])
def test_second_moments_are_whole(width: int) -> None:
    """Multiplied out on one side of the diagonal only; rows that only pad a chunk do not count."""
    chunks = [torch.randn(40, width) for _ in range(3)]
    counts = [40, 17, 0]
    total = second_moment(zip(chunks, counts, strict=True), torch.device("cpu"))
    real = torch.cat([chunk[:count] for chunk, count in zip(chunks, counts, strict=True)])
    torch.testing.assert_close(total, real.T @ real, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, total.T)


def test_experts_without_tokens_are_rounded_from_the_layers() -> None:
    """Not zero, not NaN, and with statistics: better on the layer's inputs than rounding without any."""
    capture = make_capture()
    experts, sink, _, _ = run(capture)
    _, blind, _, _ = run(capture, "rtn")
    for expert in (2, 3):
        for projection in ("gate", "up"):
            source = read(experts, expert, projection)
            rounded, plain = sink.weights(expert, projection), blind.weights(expert, projection)
            assert bool(rounded.isfinite().all())
            relative = (rounded - source).norm() / source.norm()
            assert relative < 0.5
            error, plain_error = (((w - source) @ capture.x_TH.T).norm() for w in (rounded, plain))
            assert error < plain_error


def test_no_token_at_all_falls_back_to_rounding() -> None:
    capture = Capture(
        x_TH=torch.empty(0, HIDDEN),
        index_Tk=torch.empty(0, 2, dtype=torch.int64),
        weights_Tk=torch.empty(0, 2),
        stats_Tk=torch.empty(0, 2, dtype=torch.int64),
    )
    experts, sink, y_TH, counts = run(capture)
    assert y_TH.shape == (0, HIDDEN)
    assert counts == [0] * EXPERTS
    for expert in range(EXPERTS):
        source = read(experts, expert, "down")
        assert (sink.weights(expert, "down") - source).norm() < 0.6 * source.norm()


def test_gate_and_up_share_one_rounding_when_their_specs_agree() -> None:
    """Stacked or one by one, rows come out the same."""
    capture = make_capture()
    _, sink, _, _ = run(capture)
    seen = capture.x_TH[(capture.index_Tk == 0).any(1)]
    gate = make_quantizer("gptq").quantize(read(make_experts(), 0, "gate"), SPECS[0][0], seen.T @ seen)
    assert torch.equal(gate.codes_NK, sink.rounded[0, "gate"].codes_NK)


def test_down_makes_up_for_gate_and_up() -> None:
    """With down hardly rounded, what rounded gate and up lose comes back in part; on other tokens too."""
    capture, other = make_capture(3000, "all"), make_capture(3000, seed=7)
    specs = [[QuantSpec(bits=2, group_size=32, levels="half")] * 2 + [QuantSpec(bits=8, group_size=32, levels="sym")]]
    left = {}
    for compensate in (False, True):
        experts, sink = make_experts(), Sink()
        task = module.ExpertsTask(
            layer=make_layer(),
            read=lambda expert, projection, experts=experts: read(experts, expert, projection),  # type: ignore[misc]
            round=module.grouped(make_layer(), specs * EXPERTS, make_quantizer("gptq")),
            sink=sink,
            device=torch.device("cpu"),
            compensate=compensate,
        )
        with torch.inference_mode():
            module.quantize_experts(task, experts, capture)
            wanted = experts(other.x_TH, other.index_Tk, other.weights_Tk)
            for expert in range(EXPERTS):
                parts = [sink.weights(expert, name, spec) for name, spec in zip(SHAPES, specs[0], strict=True)]
                experts.gate_up_proj[expert], experts.down_proj[expert] = torch.cat(parts[:2]), parts[2]
            left[compensate] = float((experts(other.x_TH, other.index_Tk, other.weights_Tk) - wanted).square().mean())
    assert left[True] < 0.97 * left[False], left


def test_down_stays_where_there_is_nothing_to_fit() -> None:
    down = torch.randn(4, 8)
    nothing, infinite = torch.zeros(8, 8), torch.full((8, 8), math.inf)
    assert module._compensated(down, iter(()), nothing) is down
    assert module._compensated(down, iter(()), infinite) is down

"""What streaming hears of linears is what autograd through the whole model says."""

from pathlib import Path

import pytest
import torch
from test_backprop import IDS, gradients, make, relative, whole_model
from torch import Tensor, nn

from moeq.calibration.tap import Heard, hear_calls
from moeq.errors import CalibrationError

# A shared expert added in place; a dense first block and latent attention; biases; blocks of one mixer each.
FAMILIES = ("qwen2_moe", "deepseek_v2", "gpt_oss", "nemotron_h")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_calls_equal_autograd_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    stream = make(model_type, tmp_path, micro_batch_tokens=24)
    paths = [
        path
        for path, module in stream.driver.named_modules()
        if type(module) is nn.Linear and path.startswith(stream.blocks) and "gate" not in path.rpartition(".")[2][:5]
    ]
    assert len(paths) > 4
    inputs: dict[str, Tensor] = {}
    handles = [
        stream.driver.get_submodule(path).register_forward_hook(
            lambda _, args, __, path=path: inputs.__setitem__(path, args[0].detach().flatten(0, -2).clone())
        )
        for path in paths
    ]
    wanted = dict(zip(paths, whole_model(stream.driver, paths, IDS), strict=True))
    for handle in handles:
        handle.remove()
    calls: dict[str, list[Heard]] = {path: [] for path in paths}
    seen: list[int] = []
    stream.run(
        IDS,
        lambda layer, *_: seen.append(layer),
        gradients=True,
        linears={path: calls[path].append for path in paths},
    )
    assert sorted(seen) == list(range(len(stream.layers)))
    for path in paths:
        assert len(calls[path]) == 3, "one call for each micro-batch"  # of 2, 2 and 1 sequences
        # Micro-batches of one backward pass come in order.
        assert relative(torch.cat([heard.x_TK for heard in calls[path]]), inputs[path]) < 1e-5
        assert relative(torch.cat([heard.grad_TN for heard in calls[path]]), wanted[path]) < 1e-5
        assert not stream.driver.get_submodule(path)._forward_hooks


def test_listening_changes_no_gradient_of_the_experts(tmp_path: Path) -> None:
    stream = make("qwen2_moe", tmp_path)
    paths = [path for path, module in stream.driver.named_modules() if type(module) is nn.Linear]
    plain = gradients(stream)
    listened = gradients(stream, linears={path: lambda heard: None for path in paths})
    for found, value in zip(listened, plain, strict=True):
        assert relative(found, value) < 1e-6


def test_every_call_is_heard_with_the_inputs_it_had() -> None:
    linear = nn.Linear(4, 3, bias=False).requires_grad_(False)
    heard: list[Heard] = []
    handle = hear_calls(linear, heard.append)
    x_TK = torch.ones(2, 4)
    first = linear(x_TK)
    x_TK.mul_(2)  # families may: nothing of a frozen linear needs its inputs
    (3 * first + linear(input=x_TK)).sum().backward()
    found = sorted((float(each.x_TK[0, 0]), float(each.grad_TN[0, 0])) for each in heard)
    assert found == [(1.0, 3.0), (2.0, 1.0)]
    handle.remove()
    assert not linear(x_TK).requires_grad


def test_gradients_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    stream = make("qwen2_moe", tmp_path)
    path = next(name for name, module in stream.driver.named_modules() if name.endswith("o_proj"))
    stream.driver.get_submodule(stream.driver.base_model_prefix + ".norm").weight.data.fill_(float("nan"))
    with pytest.raises(CalibrationError) as caught:
        stream.run(IDS, lambda *_: None, gradients=True, linears={path: lambda heard: None})
    assert caught.value.fix

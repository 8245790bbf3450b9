"""Where on disk the matrices of a layer's experts lie, derived from transformers' conversion operations.

Legend: E experts, N output rows, K input columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    ErnieFuseAndSplitTextVisionExperts,
    Interleave,
    MergeModulelist,
    Transpose,
)

from moeq.arch.keymap import Route
from moeq.errors import AlreadyQuantizedError, CheckpointError, MissingTensorError, TensorError
from moeq.model_parts import MatrixSource
from moeq.spec import TensorInfo

WEIGHT_DTYPES = ("BF16", "F16", "F32")
QUANTIZED_PREFIXES = ("F8_", "F6_", "F4", "I", "U")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One stacked parameter of an experts module.

    Attributes:
        key: its key in the model's state dict.
        model_type: the family, for messages.
        projections: what it holds, fused: ("gate", "up"), ("up",) or ("down",).
        num_experts: E.
        shape: (N, K) of each projection.
        transposed: the parameter is (E, K, fused N) instead of (E, fused N, K).
        concatenated: fused rows are gate then up; else they alternate.
    """

    key: str
    model_type: str
    projections: tuple[str, ...]
    num_experts: int
    shape: tuple[int, int]
    transposed: bool
    concatenated: bool

    @property
    def fused_dim(self) -> int:
        """The dimension of the parameter along which projections are fused."""
        return 2 if self.transposed else 1

    def stored_shape(self, fused: int, transposed: bool) -> tuple[int, int]:
        """Shape on disk of a matrix that fuses `fused` projections."""
        rows, columns = fused * self.shape[0], self.shape[1]
        return (columns, rows) if transposed else (rows, columns)


def matrix_sources(stack: Stack, route: Route | None, tensors: Mapping[str, TensorInfo]) -> dict[str, MatrixSource]:
    """Where each projection of a stacked parameter lies; every tensor involved is checked.

    Args:
        stack: the parameter.
        route: how transformers makes it, None when nothing feeds it.
        tensors: the checkpoint's headers.

    Raises:
        MissingTensorError: an expert's tensor is absent.
        TensorError: a tensor has the wrong shape or dtype, or there are more experts than configured.
        AlreadyQuantizedError: a tensor is in an integer or 8-bit float format.
        CheckpointError: the family's conversion is one that moeq cannot follow.
    """
    if route is None:
        raise MissingTensorError(
            f"no tensor of the checkpoint feeds the {' and '.join(stack.projections)} matrices of these experts",
            tensor=stack.key,
            fix="download the checkpoint again",
        )
    if any(
        isinstance(operation, MergeModulelist | ErnieFuseAndSplitTextVisionExperts) for operation in route.operations
    ):
        return _from_single_experts(stack, route, tensors)
    return _from_stacked(stack, route, tensors)


def _from_stacked(stack: Stack, route: Route, tensors: Mapping[str, TensorInfo]) -> dict[str, MatrixSource]:
    name = route.sources[0][0] if route.sources[0] else ""
    rows = stack.shape[0]
    fused = len(stack.projections)
    if stack.concatenated:
        spans = [(part * rows, 1) for part in range(fused)]
    else:
        spans = [(part, fused) for part in range(fused)]
    transposed = stack.transposed
    names = [name] * fused
    match route.operations:
        case ():
            pass
        case (Transpose() as operation,) if {operation.dim0 % 3, operation.dim1 % 3} == {1, 2}:
            as_model = (stack.num_experts, *stack.stored_shape(fused, transposed))
            if not (operation.check_dims and tensors[name].shape == as_model):
                transposed = not transposed
        case (Interleave() as operation,) if (
            operation.dim % 3 == stack.fused_dim and not operation.inverse and stack.concatenated and fused == 2
        ):
            spans = [(0, 2), (1, 2)]
        case (Concatenate() as operation,) if operation.dim % 3 == stack.fused_dim and stack.concatenated:
            names = _one_each(stack, route)
            spans, fused = [(0, 1)] * fused, 1
        case _:
            raise _unknown(stack, route.operations)
    wanted = (stack.num_experts, *stack.stored_shape(fused, transposed))
    for each in names:
        _check(each, tensors[each], wanted)
    return {
        projection: MatrixSource(name=each, stacked=True, transposed=transposed, start=start, step=step)
        for projection, each, (start, step) in zip(stack.projections, names, spans, strict=True)
    }


def _from_single_experts(stack: Stack, route: Route, tensors: Mapping[str, TensorInfo]) -> dict[str, MatrixSource]:
    fused = len(stack.projections)
    offset, total = 0, stack.num_experts
    match route.operations:
        case (MergeModulelist(dim=0),) if len(route.sources) == 1:
            pass
        case (MergeModulelist(dim=0), Concatenate() as operation) if (
            operation.dim % 3 == stack.fused_dim and len(route.sources) == fused and (stack.concatenated or fused == 1)
        ):
            fused = 1
        case (ErnieFuseAndSplitTextVisionExperts(stack_dim=0) as operation,) if (
            operation.concat_dim % 3 == stack.fused_dim and len(route.sources) == fused and stack.concatenated
        ):
            fused = 1
            total *= len(route.targets)
            offset = route.targets.index(stack.key) * stack.num_experts
        case _:
            raise _unknown(stack, route.operations)
    templates = _templates(stack, route, total)
    rows = stack.shape[0]
    sources = {}
    for part, projection in enumerate(stack.projections):
        source = MatrixSource(
            name=templates[part if fused == 1 else 0],
            stacked=False,
            expert_offset=offset,
            transposed=stack.transposed,
        )
        if fused > 1:
            source = replace(
                source, start=part * rows if stack.concatenated else part, step=1 if stack.concatenated else fused
            )
        sources[projection] = source
        for expert in range(stack.num_experts):
            name = source.tensor(expert)
            _check(name, tensors[name], stack.stored_shape(fused, stack.transposed))
    return sources


def _one_each(stack: Stack, route: Route) -> list[str]:
    if len(route.sources) != len(stack.projections) or any(len(group) != 1 for group in route.sources):
        raise MissingTensorError(
            f"the {' and '.join(stack.projections)} matrices of these experts are incomplete",
            tensor=stack.key,
            fix="download the checkpoint again",
        )
    return [group[0] for group in route.sources]


def _templates(stack: Stack, route: Route, total: int) -> list[str]:
    """One name with "{expert}" for each source pattern, complete from expert 0 to `total` - 1."""
    templates = []
    for projection, group in zip(stack.projections, route.sources, strict=False):
        if not group:
            raise MissingTensorError(
                f"the {projection} matrices of all these experts are absent",
                tensor=stack.key,
                fix="download the checkpoint again",
            )
        parts = [name.split(".") for name in group]
        varying = [place for place, values in enumerate(zip(*parts, strict=True)) if len(set(values)) > 1]
        if not varying:  # a single expert: its number is the last one in the name
            varying = [place for place, value in enumerate(parts[0]) if value.isdigit()][-1:]
        if len(varying) != 1:
            raise CheckpointError(
                f"{stack.model_type}: the names of its experts' tensors cannot be understood",
                tensor=group[0],
                fix="report the model to moeq",
            )
        template = list(parts[0])
        template[varying[0]] = "{expert}"
        name = ".".join(template)
        present = set(group)
        for expert in range(total):
            wanted = name.replace("{expert}", str(expert))
            if wanted not in present:
                raise MissingTensorError(
                    f"the config asks for {total} experts, this one's tensor is absent",
                    tensor=wanted,
                    fix="download the checkpoint again",
                )
        if len(group) != total:
            raise TensorError(
                f"{len(group)} experts are stored, unlike the config's {total}",
                tensor=group[-1],
                fix="check that config.json belongs to these weights",
            )
        templates.append(name)
    return templates


def _check(name: str, info: TensorInfo, wanted: Sequence[int]) -> None:
    if info.dtype not in WEIGHT_DTYPES:
        if info.dtype.startswith(QUANTIZED_PREFIXES):
            raise AlreadyQuantizedError(
                f"an expert weight has dtype {info.dtype}: it was rounded before",
                file=info.file,
                tensor=name,
                fix="download config.json again: its quantization_config says how the weights are to be decoded",
            )
        raise TensorError(
            f"an expert weight has dtype {info.dtype}, not one of {', '.join(WEIGHT_DTYPES)}",
            file=info.file,
            tensor=name,
            fix="convert the checkpoint to bfloat16",
        )
    if tuple(info.shape) == tuple(wanted):
        return
    codes = "" if info.rounded is None else f"its {info.rounded.form} codes dequantize to "
    message = f"{codes}shape {list(info.shape)}, wanted {list(wanted)}"
    if len(wanted) == 3 and info.shape[1:] == tuple(wanted[1:]):
        message = f"{info.shape[0]} experts are stored, unlike the config's {wanted[0]}"
    raise TensorError(message, file=info.file, tensor=name, fix="check that config.json belongs to these weights")


def _unknown(stack: Stack, operations: Sequence[ConversionOps]) -> CheckpointError:
    steps = ", ".join(repr(operation) for operation in operations)
    return CheckpointError(
        f"moeq cannot follow how {stack.model_type} stores its experts ({steps})",
        tensor=stack.key,
        fix="save the model with transformers' save_pretrained(..., save_original_format=False), or report the family",
    )

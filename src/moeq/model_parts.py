"""What a model is made of, as far as moeq needs to know: layers of experts, other linears, and where they lie."""

from dataclasses import dataclass, field

PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSource:
    """Where in the source checkpoint the matrices of one projection of one layer lie.

    Expert e's matrix (N, K) is tensor `name` with "{expert}" replaced by e + expert_offset, or, when
    `stacked`, slice e + expert_offset of the 3-D tensor `name`; then transposed if `transposed`;
    then rows start, start + step, start + 2 * step, ... N of them.
    """

    name: str
    stacked: bool
    expert_offset: int = 0
    transposed: bool = False
    start: int = 0
    step: int = 1

    def tensor(self, expert: int) -> str:
        """The name of the tensor that holds expert `expert`."""
        return self.name if self.stacked else self.name.replace("{expert}", str(expert + self.expert_offset))


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeLayer:
    """One layer of routed experts.

    Attributes:
        path: module path of the stacked experts in the transformers model.
        block: module path of the decoder layer around it.
        num_experts: routed experts.
        top_k: experts per token.
        shapes: projection -> (N, K), output rows and input columns. No "gate" for plain experts.
        sources: projection -> where its matrices lie.
        concatenated: gate rows precede up rows in the model's fused output; else they alternate.
        transposed: the model's own stacked parameters are (E, K, N).
        attached: transformers' model has a module for it; not so for layers that predict further tokens.
        members: projection -> path of an expert's linear below `path`, "{expert}" for its number, where experts are
            modules of their own; empty where they are stacked.
    """

    path: str
    block: str
    num_experts: int
    top_k: int
    shapes: dict[str, tuple[int, int]]
    sources: dict[str, MatrixSource]
    concatenated: bool = True
    transposed: bool = False
    attached: bool = True
    members: dict[str, str] = field(default_factory=dict)

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections this layer has, in storage order."""
        return tuple(name for name in PROJECTIONS if name in self.shapes)

    @property
    def parameters(self) -> int:
        """Weights of all experts of the layer."""
        return self.num_experts * sum(rows * columns for rows, columns in self.shapes.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLinear:
    """A linear layer outside the routed experts that may be quantized too.

    Attributes:
        path: module path in the transformers model.
        kind: "attention", "shared", "dense" or "lm_head".
        source: name of its weight in the source checkpoint.
        shape: (N, K).
        block: path of the decoder layer it belongs to, "" when none.
    """

    path: str
    kind: str
    source: str
    shape: tuple[int, int]
    block: str = ""

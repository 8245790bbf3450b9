"""The tiled layout in numbers: what a projection's shared low-rank factors take in bytes. No torch here.

A tiled layer (TileQ) is a grouped layer whose matrices are residuals, and sides: for each projection a grid of M x N
cells, the cell of every expert, an input factor for each grid row, an output factor for each grid column, and what the
residual's inputs are rotated by. Sizes follow from shapes and a handful of choices, so they are known before a weight
is read.

Legend: E experts, M x N grid, I inputs, O outputs, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final

from moeq.errors import OptionError
from moeq.layouts.base import LayerChoice, LayerPlan, OutTensor, data_tensor, table_tensor
from moeq.layouts.grouped import shape as grouped
from moeq.layouts.grouped.shape import GroupedPlan
from moeq.spec import SCALE_BYTES, WHOLE_ROW, QuantSpec, align, stored_bytes

SIDES_SUFFIX: Final = ".moeq_sides"
TILES_SUFFIX: Final = ".moeq_tiles"
SHARING: Final = ("none", "layer", "tile", "expert")
"""Who has a vector of its own (a scale, a permutation); the position in this tuple is the number on disk."""
TILE_COLUMNS: Final = ("offset", "rank", "rows", "columns", "scales", "orders", "block", "plain")
"""Columns of the table of a layer's sides: one int64 row for each projection."""
FACTOR: Final = QuantSpec(bits=8, group_size=WHOLE_ROW, levels="sym")
"""How factors are stored: a scale for each component and tile."""
INDEX_BYTES: Final = 2
MAX_INPUTS: Final = 1 << 16
MAX_RANK: Final = 1 << 12
PLACEMENTS: Final = ("matched", "literal", "random", "order")
FITS: Final = ("svd", "deflation")
RECORDS: Final = "grouped"
"""The layout of the specs that its residuals get."""
OPTIONS: Final = ("rank", "allocation", "tile_options")
"""Options of a recipe that mean something for this layout alone."""
RESIDUALS: Final = (RECORDS,)
"""Layouts of methods that can choose the residuals' widths."""
GRIDS: Final = ("auto", "paper", "inputs", "outputs", "hidden", "private")


@dataclass(frozen=True, slots=True, kw_only=True)
class TileForm:
    """How one projection of a tiled layer is stored.

    Attributes:
        rank: R; 0 stores no factors.
        rows: M.
        columns: N.
        scales: "none", or "expert": a scale of every input for each expert, which divides the inputs of the factors.
        orders: who has a permutation of its own, one of `SHARING`; "none" does not rotate.
        block: inputs that are mixed together, a power of two; 0 where nothing is rotated.
        plain: inputs that the rotation leaves unmixed.
    """

    rank: int
    rows: int
    columns: int
    scales: str = "none"
    orders: str = "none"
    block: int = 0
    plain: int = 0

    @property
    def has_cells(self) -> bool:
        """Whether it matters where an expert sits."""
        return self.rank > 0 or self.orders == "tile"

    def order_owners(self, num_experts: int) -> int:
        """Permutations that are stored."""
        return {"none": 0, "layer": 1, "tile": self.rows, "expert": num_experts}[self.orders]

    def problem(self, num_experts: int, shape: tuple[int, int]) -> str | None:
        """What is wrong with it for E experts of shape (O, I), or None."""
        inputs = shape[1]
        if not 0 <= self.rank <= MAX_RANK:
            return f"rank {self.rank}"
        if not (1 <= self.rows <= num_experts and 1 <= self.columns <= num_experts):
            return f"a grid of {self.rows} x {self.columns} cells"
        if self.rows * self.columns < num_experts:
            return f"{num_experts} experts in {self.rows} x {self.columns} cells"
        if self.scales not in ("none", "expert") or (self.scales == "expert" and not self.rank):
            return f"scales {self.scales!r}"
        if self.orders == "none":
            return None if (self.block, self.plain) == (0, 0) else "a rotation without a permutation"
        if self.orders not in SHARING or inputs > MAX_INPUTS:
            return f"permutations {self.orders!r} of {inputs} inputs"
        if self.block < 1 or self.block & (self.block - 1) or not 0 <= self.plain <= inputs:
            return f"blocks of {self.block} inputs, {self.plain} unmixed"
        return None if (inputs - self.plain) % self.block == 0 else f"blocks of {self.block} in {inputs} inputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class SideSections:
    """Byte ranges of the parts of one projection's sides, (offset, bytes), relative to their start.

    Attributes:
        cells: uint16 (E, 2), row and column of each expert.
        inputs: matrix record of the input factors, (M R, I).
        outputs: matrix record of the output factors, (N R, O).
        scales: float16 (E, I).
        orders: uint16 (owners, I).
        total: bytes, a multiple of 64.
    """

    cells: tuple[int, int]
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    scales: tuple[int, int]
    orders: tuple[int, int]
    total: int


def side_sections(form: TileForm, num_experts: int, shape: tuple[int, int]) -> SideSections:
    """Where the parts of a projection's sides lie (docs/format.md, "Tiled layers").

    Args:
        form: how the projection is stored.
        num_experts: E.
        shape: (O, I).
    """
    outputs, inputs = shape
    sizes = (
        num_experts * 2 * INDEX_BYTES if form.has_cells else 0,
        stored_bytes(FACTOR, (form.rows * form.rank, inputs)) if form.rank else 0,
        stored_bytes(FACTOR, (form.columns * form.rank, outputs)) if form.rank else 0,
        num_experts * inputs * SCALE_BYTES if form.scales == "expert" else 0,
        form.order_owners(num_experts) * inputs * INDEX_BYTES,
    )
    ranges, offset = [], 0
    for size in sizes:
        ranges.append((offset, size))
        offset += align(size)
    return SideSections(
        cells=ranges[0], inputs=ranges[1], outputs=ranges[2], scales=ranges[3], orders=ranges[4], total=offset
    )


def tile_table_bytes(projections: int) -> int:
    """Bytes of the int64 table stored beside a layer's sides."""
    return projections * len(TILE_COLUMNS) * 8


def fits(forms: Mapping[str, TileForm], num_experts: int, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether there is a form for every projection, and nothing wrong with it."""
    return set(forms) == set(shapes) and not any(form.problem(num_experts, shapes[n]) for n, form in forms.items())


def sides_bytes(forms: Mapping[str, TileForm], num_experts: int, shapes: Mapping[str, tuple[int, int]]) -> int:
    """Stored bytes of a layer's sides without their table."""
    return sum(side_sections(form, num_experts, shapes[name]).total for name, form in forms.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledPlan(LayerPlan):
    """Which spec every residual gets, and how the sides are stored.

    Attributes:
        residuals: the specs.
        forms: projection -> form of its sides.
        shapes: projection -> (O, I).
    """

    layout: ClassVar[str] = "tiled"

    residuals: GroupedPlan
    forms: Mapping[str, TileForm]
    shapes: Mapping[str, tuple[int, int]]

    def tensors(self, path: str) -> tuple[tuple[OutTensor, OutTensor], ...]:
        """Blob and table of the residuals, then of the sides."""
        size = sides_bytes(self.forms, len(self.residuals.specs), self.shapes)
        table = table_tensor(path + TILES_SUFFIX, (len(self.forms), len(TILE_COLUMNS)))
        return (*self.residuals.tensors(path), (data_tensor(path + SIDES_SUFFIX, size), table))

    def widths_count(self) -> dict[int, int]:
        """Code bits -> residuals."""
        return self.residuals.widths_count()

    @property
    def fixed_bytes(self) -> int:
        """Tables and sides."""
        *_, (sides, table) = self.tensors("")
        return self.residuals.fixed_bytes + sides.size + table.size

    @property
    def scratch_bytes(self) -> int:
        """All experts of the largest projection in float32, twice while they are fitted."""
        return 8 * len(self.residuals.specs) * max(rows * columns for rows, columns in self.shapes.values())


def planned(choice: LayerChoice) -> TiledPlan:
    """What a plan decides about a layer; `details` are the forms."""
    return TiledPlan(residuals=grouped.planned(choice), forms=choice.details, shapes=choice.shapes)


def problem(shapes: Mapping[str, tuple[int, int]]) -> str | None:
    """Why experts of these shapes cannot have this layout, or None."""
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class TileOptions:
    """What `--tile-options` may say; the first five decide sizes.

    Attributes:
        grid: "auto" takes the grid of fewest bytes, "paper" 8 x ceil(E / 8); "inputs" and "outputs" share one factor of
            that side among all experts, "hidden" that of the hidden side; "private" shares nothing; or "MxN".
        down: whether down has low-rank factors.
        scales: "expert" stores every expert's own scale of its inputs, as the released code does; "none" folds them.
        rotation: who has a permutation of its own: "none" (no rotation), "layer", "tile" or "expert".
        block: most inputs that are mixed together.
        alpha: exponent of the inputs' sizes in the weights of the fit; 0 fits the weights alone.
        placement: "matched" by subspaces, "literal" as the released code, "random" or in "order".
        swaps: pairs of experts that are tried in each other's cell.
        factors: "svd", or "deflation" as in the paper.
        refits: rounds of least squares after it.
        frequency: experts count by the tokens that they see.
    """

    grid: str = "auto"
    down: bool = False
    scales: str = "none"
    rotation: str = "none"
    block: int = 256
    alpha: float = 1.0
    placement: str = "matched"
    swaps: int = 0
    factors: str = "svd"
    refits: int = 2
    frequency: bool = True

    def __post_init__(self) -> None:
        for name, choices in (
            ("scales", ("none", "expert")),
            ("rotation", SHARING),
            ("placement", PLACEMENTS),
            ("factors", FITS),
        ):
            if getattr(self, name) not in choices:
                _refuse(name, getattr(self, name), f"choose one of {', '.join(choices)}")
        for name in ("down", "frequency"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "choose true or false")
        for name in ("swaps", "refits", "block"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= 1 << 20:
                _refuse(name, value, "choose a whole number")
        if self.block < 1 or self.block & (self.block - 1):
            _refuse("block", self.block, "choose a power of two")
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, int | float) or not 0 <= self.alpha <= 4:
            _refuse("alpha", self.alpha, "choose a number from 0 to 4")
        if self.grid not in GRIDS and parse_grid(self.grid) is None:
            _refuse("grid", self.grid, f"choose one of {', '.join(GRIDS)}, or MxN as 8x16")
        if self.scales == "expert" and self.refits:
            _refuse("refits", self.refits, "scales=expert goes with refits=0: nothing is folded")


def _refuse(name: str, value: object, fix: str) -> None:
    raise OptionError(f"{name}={value!r} cannot be used", option="tile-options", fix=fix)


def tile_options(given: Mapping[str, Any]) -> TileOptions:
    """The options that a mapping names.

    Raises:
        OptionError: an unknown name, or a value that its option does not have.
    """
    known = [field.name for field in fields(TileOptions)]
    for name in given:
        if name not in known:
            raise OptionError(f"unknown {name!r}", option="tile-options", fix=f"its names are {', '.join(known)}")
    return TileOptions(**given)


def parse_grid(text: object) -> tuple[int, int] | None:
    """(M, N) of "MxN", or None."""
    rows, x, columns = str(text).partition("x")
    if not x or not rows.isdecimal() or not columns.isdecimal() or not int(rows) or not int(columns):
        return None
    return int(rows), int(columns)


def grid_shape(grid: str, num_experts: int, shape: tuple[int, int], projection: str) -> tuple[int, int]:
    """(M, N) for E experts of shape (O, I).

    "auto" minimizes M I + N O, to which the factors' bytes are proportional, under M N >= E (notes, section 7).

    Raises:
        OptionError: the grid has too few cells, or more rows or columns than experts.
    """
    outputs, inputs = shape
    if grid == "hidden":
        grid = "outputs" if projection == "down" else "inputs"
    if grid == "auto":
        pairs = [(rows, -(-num_experts // rows)) for rows in range(1, num_experts + 1)]
        return min(pairs, key=lambda pair: (pair[0] * inputs + pair[1] * outputs, abs(pair[0] - pair[1])))
    named = {
        "paper": (min(8, -(-num_experts // 2)), -(-num_experts // min(8, -(-num_experts // 2)))),
        "inputs": (1, num_experts),
        "outputs": (num_experts, 1),
        "private": (num_experts, num_experts),
    }
    found = named.get(grid) or parse_grid(grid)
    assert found is not None
    if found[0] * found[1] < num_experts or max(found) > num_experts:
        raise OptionError(
            f"{num_experts} experts do not fit a grid of {grid}",
            option="tile-options",
            fix="choose grid=auto, or a grid with a cell for each expert and no more rows or columns than experts",
        )
    return found


def mixed_block(inputs: int, most: int) -> int:
    """The largest power of two up to `most` and half the inputs that divides them."""
    block = 1
    while 2 * block <= min(most, inputs // 2) and inputs % (2 * block) == 0:
        block *= 2
    return block


def tile_form(options: TileOptions, rank: int, projection: str, num_experts: int, shape: tuple[int, int]) -> TileForm:
    """How a projection of a layer is stored.

    Raises:
        OptionError: the model cannot be stored so.
    """
    if projection == "down" and not options.down:
        rank = 0
    rows, columns = grid_shape(options.grid, num_experts, shape, projection)
    block = 0 if options.rotation == "none" else mixed_block(shape[1], options.block)
    form = TileForm(
        rank=rank,
        rows=rows,
        columns=columns,
        scales=options.scales if rank else "none",
        orders=options.rotation,
        block=block,
        plain=block,
    )
    problem = form.problem(num_experts, shape)
    if problem is not None:
        raise OptionError(f"{projection} cannot have {problem}", option="rank", fix="choose --method uniform")
    return form

"""The vocabulary: units, bit-widths and what they cost in bytes. No torch here.

`stored_bytes` is the only source of sizes: budgets, reports and the writer call it,
and `docs/format.md` is its prose. Symbols: N output rows, K input columns, G groups
of inputs per row, b bits per code.
"""

from dataclasses import dataclass

from moeq.errors import OptionError

BITS = (1, 2, 3, 4, 5, 6, 8)
"""Code widths that layouts can store."""

WHOLE_ROW = -1
GROUP_SIZES = (32, 64, 128, WHOLE_ROW)
"""Inputs that share one scale; `WHOLE_ROW` means one scale for each output row."""

SCALAR_LEVELS = ("asym", "asym16", "sym", "half")
"""Level sets of single weights, w = scale * (code - zero).

asym    zero is stored per group in 8 bits, in units of (2^b - 1) / 255 codes
asym16  zero is stored per group as float16 (what the papers' code does)
sym     zero = 2^(b-1): integers -2^(b-1) .. 2^(b-1) - 1 times a signed scale
half    zero = (2^b - 1) / 2: half-integers -(2^b - 1)/2 .. (2^b - 1)/2 times the scale
"""
LEVELS = (*SCALAR_LEVELS, "vector", "trellis", "ggml")
"""All level sets; the position in this tuple is the id on disk.

vector  a code names an entry of a codebook, and an entry is several neighbouring weights of a row (`VECTORS`)
trellis a code and the codes above it in its column name an entry of a fixed table (`TRELLISES`)
ggml    blocks of llama.cpp, as they lie in GGUF files (`BLOCK_TYPES`)
"""

ZERO_BYTES = {"asym": 1, "asym16": 2, "sym": 0, "half": 0, "trellis": 0}
SCALE_BYTES = 2
BLOCK = 128
"""Codes of one row that are interleaved together in a plane."""
ALIGN = 64
"""Every section of a matrix record starts at a multiple of this many bytes."""

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Code width -> widths of the planes that store it, most significant plane first."""

LAYOUTS = ("grouped", "spectral", "tiled")

EXPERT = "expert"
"""Stands for all projections of an expert where units are whole experts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codebooks:
    """How the level set "vector" stores weights at a width (TileQ and GPTVQ).

    Attributes:
        dim: neighbouring weights of a row that share a code.
        code_bits: width of a code.
        rows: rows of the blocks that have a codebook of their own.
        columns: columns of these blocks.
    """

    dim: int
    code_bits: int
    rows: int
    columns: int

    @property
    def entries(self) -> int:
        """Entries of a codebook."""
        return 1 << self.code_bits

    def grid(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Blocks of a matrix (N, K) down and across; the last ones may be ragged."""
        return -(-shape[0] // self.rows), -(-shape[1] // self.columns)


VECTORS = {
    2: Codebooks(dim=4, code_bits=8, rows=256, columns=256),
    3: Codebooks(dim=2, code_bits=6, rows=256, columns=128),
}
"""Code width per weight -> codebooks; the level set "vector" has no other widths."""


TRELLISES = {1: 5, 2: 6, 3: 5, 4: 5}
"""Code width -> codes above a weight whose lowest bits choose its levels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """A type of ggml: how neighbouring weights of a row are stored (the level set "ggml").

    Attributes:
        name: its name there.
        number: its number there.
        bits: width of a code.
        weights: weights of a block; rows are whole blocks.
        size: bytes of a block.
        group: weights that share a scale.
    """

    name: str
    number: int
    bits: int
    weights: int
    size: int
    group: int


BLOCK_TYPES = (
    BlockType(name="Q2_K", number=10, bits=2, weights=256, size=84, group=16),
    BlockType(name="Q3_K", number=11, bits=3, weights=256, size=110, group=16),
    BlockType(name="Q4_K", number=12, bits=4, weights=256, size=144, group=32),
    BlockType(name="IQ4_NL", number=20, bits=4, weights=32, size=18, group=32),
    BlockType(name="Q5_K", number=13, bits=5, weights=256, size=176, group=32),
    BlockType(name="Q5_0", number=6, bits=5, weights=32, size=22, group=32),
    BlockType(name="Q6_K", number=14, bits=6, weights=256, size=210, group=16),
    BlockType(name="Q8_0", number=8, bits=8, weights=32, size=34, group=32),
)
"""By rising width; of one width the one that is taken first comes first."""


def block_type(bits: int, columns: int) -> BlockType:
    """The narrowest type of at least `bits` whose blocks fill rows of so many weights.

    Raises:
        OptionError: there is none.
    """
    for kind in BLOCK_TYPES:
        if kind.bits >= bits and columns % kind.weights == 0:
            return kind
    raise OptionError(f"{columns} inputs are no whole blocks of 32", option="serve", fix="drop --serve gguf")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class QuantSpec:
    """How one matrix is stored.

    Attributes:
        bits: width of a code (per weight), one of `BITS`; for the level set "ggml" the least that is wanted.
        group_size: inputs that share a scale, one of `GROUP_SIZES`; `WHOLE_ROW` for the level sets "vector" and "ggml".
        levels: the level set, one of `LEVELS`.
        layout: the storage layout, one of `LAYOUTS`.
    """

    bits: int
    group_size: int = 128
    levels: str = "asym"
    layout: str = "grouped"

    def __post_init__(self) -> None:
        for option, value, legal in (
            ("bits", self.bits, BITS),
            ("group-size", self.group_size, GROUP_SIZES),
            ("levels", self.levels, LEVELS),
            ("layout", self.layout, LAYOUTS),
        ):
            if value not in legal:
                choices = ", ".join(str(choice) for choice in legal)
                raise OptionError(f"{value!r} is not supported", option=option, fix=f"choose one of {choices}")
        if self.levels == "vector":
            if self.bits not in VECTORS:
                raise OptionError(f"there are no codebooks of {self.bits} bits", option="bits", fix="choose 2 or 3")
            if self.group_size != WHOLE_ROW or self.layout != "grouped":
                raise OptionError("codebooks go with scales of rows", option="group-size", fix="give -1")
        if self.levels == "ggml" and (self.group_size != WHOLE_ROW or self.layout != "grouped"):
            raise OptionError("types of ggml have groups of their own", option="group-size", fix="give -1")
        if self.levels == "trellis" and (self.bits not in TRELLISES or self.layout != "grouped"):
            choices = ", ".join(str(bits) for bits in TRELLISES)
            message = f"there is no trellis of {self.bits} bits in the layout {self.layout}"
            raise OptionError(message, option="bits", fix=f"choose one of {choices}, in grouped layers")

    @property
    def history(self) -> int:
        """Bits of the history of the level set "trellis", 0 for all others."""
        return TRELLISES[self.bits] if self.levels == "trellis" else 0

    @property
    def codebooks(self) -> Codebooks | None:
        """The codebooks of the level set "vector", None for all others."""
        return VECTORS[self.bits] if self.levels == "vector" else None

    @property
    def in_blocks(self) -> bool:
        """Whether records are blocks of ggml, which no kernel of ours reads."""
        return self.levels == "ggml"

    def to_dict(self) -> dict[str, int | str]:
        """The spec as plain JSON values."""
        return {"bits": self.bits, "group_size": self.group_size, "levels": self.levels, "layout": self.layout}


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Unit:
    """The smallest thing that gets its own width: one matrix of one expert, or one expert.

    Attributes:
        layer: index of the MoE layer in the Inventory, not of the decoder layer.
        expert: index of the expert inside the layer.
        projection: "gate", "up" or "down"; `EXPERT` for the whole expert.
    """

    layer: int
    expert: int
    projection: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}.{self.projection}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sections:
    """Byte ranges of one matrix record, relative to its start.

    Attributes:
        planes: (width, offset, bytes) of each code plane.
        scales: (offset, bytes) of the float16 scales, N x G.
        zeros: (offset, bytes) of the zeros, N x G; the codebooks of "vector"; zero bytes when there are none.
        total: bytes of the record, a multiple of `ALIGN`.
    """

    planes: tuple[tuple[int, int, int], ...]
    scales: tuple[int, int]
    zeros: tuple[int, int]
    total: int


def align(size: int) -> int:
    """`size` rounded up to a multiple of `ALIGN`."""
    return -(-size // ALIGN) * ALIGN


def num_groups(columns: int, group_size: int) -> int:
    """Groups per row; the last one may be ragged."""
    return 1 if group_size == WHOLE_ROW else -(-columns // group_size)


def plane_row_bytes(columns: int, width: int) -> int:
    """Bytes one row takes in a plane of `width` bits: full blocks, then a tail padded to 8 codes."""
    full, tail = divmod(columns, BLOCK)
    return full * (BLOCK * width // 8) + -(-tail // 8) * width


def sections(spec: QuantSpec, shape: tuple[int, int]) -> Sections:
    """Where the parts of a matrix record lie (docs/format.md, "Matrix record").

    Args:
        spec: how the matrix is stored.
        shape: (N, K), output rows and input columns.

    Raises:
        OptionError: K is no multiple of the weights that share a code or a block.
    """
    rows, columns = shape
    if spec.in_blocks:
        kind = block_type(spec.bits, columns)
        size = rows * (columns // kind.weights) * kind.size
        end = align(size)
        return Sections(planes=((8, 0, size),), scales=(end, 0), zeros=(end, 0), total=end)
    books = spec.codebooks
    if books is not None and columns % books.dim:
        raise OptionError(
            f"{columns} inputs cannot be cut into vectors of {books.dim}",
            option="quantizer",
            fix="use gptq for this model",
        )
    planes = []
    offset = 0
    for width in PLANES[spec.bits if books is None else books.code_bits]:
        size = rows * plane_row_bytes(columns if books is None else columns // books.dim, width)
        planes.append((width, offset, size))
        offset += align(size)
    if books is None:
        groups = rows * num_groups(columns, spec.group_size)
        second = groups * ZERO_BYTES[spec.levels]
    else:
        down, across = books.grid(shape)
        groups = rows
        second = down * across * books.entries * books.dim
    scales = (offset, groups * SCALE_BYTES)
    offset += align(scales[1])
    zeros = (offset, second)
    offset += align(zeros[1])
    return Sections(planes=tuple(planes), scales=scales, zeros=zeros, total=offset)


def stored_bytes(spec: QuantSpec, shape: tuple[int, int]) -> int:
    """Bytes that a matrix of `shape` (N, K) takes on disk under `spec`: codes, scales, zeros, padding."""
    return sections(spec, shape).total


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """What stands behind a tensor that was rounded before moeq saw it (`moeq.checkpoint.rounded`).

    Attributes:
        form: name of the format.
        parts: (role, stored tensor): codes, scales, zeros.
        options: (name, number) that decoding needs beside them.
    """

    form: str
    parts: tuple[tuple[str, "TensorInfo"], ...]
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        file: file name inside the checkpoint directory.
        dtype: safetensors' name of the element type ("BF16", "F32", "U8", ...).
        shape: dimensions.
        start: first byte of the data, counted from the start of the file.
        stop: one past the last byte.
        rounded: set for a tensor that lies in parts and is decoded when it is read; `dtype` and bytes are then those
            of the decoded one.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    rounded: Rounded | None = None

    @property
    def stored(self) -> "tuple[TensorInfo, ...]":
        """What lies in files: the parts, or the tensor itself."""
        return (self,) if self.rounded is None else tuple(part for _, part in self.rounded.parts)


TABLE_COLUMNS = ("offset", "bits", "group_size", "levels")
"""Columns of the table that describes a layer's blob: one int64 row for each matrix."""


def table_bytes(num_experts: int, num_projections: int) -> int:
    """Bytes of the int64 table stored beside a layer's blob."""
    return num_experts * num_projections * len(TABLE_COLUMNS) * 8

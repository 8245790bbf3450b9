"""The operations of Triton's modules (TTIR) on CPU tensors, for `ttir`.

It knows what our kernels use. Anything else raises `UnknownError`, which names the line: add it to `OPERATIONS`.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

TYPES = {
    "i1": torch.bool, "i8": torch.int8, "i16": torch.int16, "i32": torch.int32, "i64": torch.int64,
    "f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64,
}  # fmt: skip
BITS = {torch.bool: 1, torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


class UnknownError(Exception):
    """An operation or type that is not known here."""


class FaultError(Exception):
    """What a GPU would not tell: a wrong address, a broken promise, programs in each other's way."""


class Buffer:
    """The bytes of one argument, and which program wrote each of them in this launch."""

    def __init__(self, name: str, tensor: Tensor) -> None:
        assert tensor.is_contiguous(), f"{name} is not contiguous"
        self.name = name
        self.bytes = tensor.view(-1).view(torch.uint8)
        self.align = tensor.data_ptr()
        self.writer = torch.full((self.bytes.numel(),), -1, dtype=torch.int32)
        self._views: dict[torch.dtype, Tensor] = {}

    def view(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._views:
            self._views[dtype] = self.bytes[: self.bytes.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return self._views[dtype]


@dataclass(frozen=True, eq=False)
class Pointer:
    """Addresses in one buffer, in bytes from its start."""

    buffer: Buffer
    offset: Tensor
    dtype: torch.dtype

    def map(self, function: Callable[[Tensor], Tensor]) -> "Pointer":
        return replace(self, offset=function(self.offset))


Value = Any  # a Tensor (numbers of any rank, scalars have none) or a Pointer
Environment = dict[str, Value]


@dataclass
class Op:
    """One operation: results, name, operands, what else its line says, regions."""

    results: list[str]
    name: str
    operands: list[str]
    rest: str
    regions: list[list["Op"]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)


def type_of(text: str) -> tuple[torch.dtype, tuple[int, ...]]:
    """dtype and shape of `f32`, `tensor<4x8xf32>` or of what a pointer points to."""
    shape: tuple[int, ...] = ()
    inner = text.strip()
    if inner.startswith("tensor<"):
        *sides, inner = inner[len("tensor<") : -1].split("x", inner.count("x"))
        while not sides[-1].isdigit() if sides else False:
            inner = sides.pop() + "x" + inner
        shape = tuple(map(int, sides))
    inner = inner.removeprefix("!tt.ptr<").removesuffix(">") if inner.startswith("!tt.ptr<") else inner
    if inner not in TYPES:
        raise UnknownError(f"type {text}")
    return TYPES[inner], shape


def _unsigned(value: Tensor) -> Tensor:
    """The bits of integers as numbers that are not negative, int64."""
    bits = BITS[value.dtype]
    if bits == 64:
        if bool((value < 0).any()):
            raise UnknownError("unsigned numbers of 64 bits beyond 2^63")
        return value
    return value.to(torch.int64) & ((1 << bits) - 1)


def _narrow(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value & 1).bool() if dtype == torch.bool else value.to(dtype)


def _shift_left(a: Tensor, b: Tensor) -> Tensor:
    return a << b


COMPARE = {
    "eq": torch.eq, "ne": torch.ne, "slt": torch.lt, "sle": torch.le, "sgt": torch.gt, "sge": torch.ge,
    "ult": torch.lt, "ule": torch.le, "ugt": torch.gt, "uge": torch.ge,
    "oeq": torch.eq, "olt": torch.lt, "ole": torch.le, "ogt": torch.gt, "oge": torch.ge, "une": torch.ne,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "arith.addi": lambda a, b: a + b if a.dtype != torch.bool else a ^ b,
    "arith.addf": torch.add,
    "arith.subi": lambda a, b: a - b,
    "arith.subf": torch.sub,
    "arith.muli": torch.mul,
    "arith.mulf": torch.mul,
    "arith.divf": torch.div,
    "arith.divsi": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "arith.remsi": torch.fmod,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.minsi": torch.minimum,
    "arith.maxsi": torch.maximum,
    "arith.maxnumf": torch.fmax,
    "arith.minnumf": torch.fmin,
    "arith.shli": _shift_left,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: _narrow(_unsigned(a) >> _unsigned(b), a.dtype),
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "arith.negf": torch.neg,
    "math.exp": torch.exp,
    "math.exp2": torch.exp2,
    "math.rsqrt": torch.rsqrt,
    "math.sqrt": torch.sqrt,
    "math.absf": torch.abs,
    "math.floor": torch.floor,
}
CASTS: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "arith.extsi": lambda a, dtype: a.to(dtype) if a.dtype != torch.bool else -a.to(dtype),
    "arith.extui": lambda a, dtype: _unsigned(a).to(dtype),
    "arith.trunci": _narrow,
    "arith.extf": lambda a, dtype: a.to(dtype),
    "arith.truncf": lambda a, dtype: a.to(dtype),
    "arith.sitofp": lambda a, dtype: a.to(dtype),
    "arith.uitofp": lambda a, dtype: _unsigned(a).to(dtype),
    "arith.fptosi": lambda a, dtype: a.to(dtype),
    "tt.fp_to_fp": lambda a, dtype: a.to(dtype),
    "arith.bitcast": lambda a, dtype: a.view(dtype),
}


class Program:
    """One program of a launch."""

    def __init__(self, place: tuple[int, int, int], number: int, grid: tuple[int, int, int]) -> None:
        self.place, self.number, self.grid = place, number, grid

    def block(self, ops: Sequence[Op], env: Environment) -> list[Value]:
        """Run a block; what it yields."""
        for op in ops:
            if op.name in ("scf.yield", "tt.return"):
                return [env[name] for name in op.operands]
            handler = OPERATIONS.get(op.name)
            if handler is not None:
                results = handler(self, op, env)
            elif op.name in BINARY:
                results = (BINARY[op.name](env[op.operands[0]], env[op.operands[1]]),)
            elif op.name in UNARY:
                results = (UNARY[op.name](env[op.operands[0]]),)
            elif op.name in CASTS:
                results = (CASTS[op.name](env[op.operands[0]], type_of(op.rest.rpartition(" to ")[2])[0]),)
            else:
                raise UnknownError(f"{op.name} {op.rest}")
            if op.results:
                if "tt.divisibility" in op.rest:
                    _check_promise(op, results[0])
                env.update(zip(op.results, results, strict=True))
        return []


def _check_promise(op: Op, value: Value) -> None:
    """`tl.multiple_of` told the compiler something; on a GPU nobody checks it."""
    given = int(re.search(r"tt\.divisibility = (?:dense<)?(\d+)", op.rest)[1])  # type: ignore[index]
    number = value.offset + value.buffer.align if isinstance(value, Pointer) else value
    if bool((number.reshape(-1)[:1] % given != 0).any()):
        raise FaultError(f"{op.results[0]} is not a multiple of {given}: {op.rest}")


def _constant(_: Program, op: Op, env: Environment) -> tuple[Value]:
    text, _, kind = op.rest.rpartition(" : ")
    if not kind or text == "":  # `true` and `false` need no type
        text, kind = op.rest, "i1"
    dtype, shape = type_of(kind)
    text = re.sub(r"^\{.*?\}\s*", "", text.strip()).removeprefix("dense<").removesuffix(">")
    if text in ("true", "false"):
        return (torch.full(shape, text == "true", dtype=dtype),)
    if text.startswith("0x"):
        bits = int(text, 16)
        as_int = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
        top = 1 << (8 * dtype.itemsize - 1)
        return (torch.full(shape, (bits ^ top) - top, dtype=as_int).view(dtype) if dtype.is_floating_point else
                torch.full(shape, (bits ^ top) - top, dtype=dtype),)  # fmt: skip
    return (torch.full(shape, float(text) if dtype.is_floating_point else int(text), dtype=dtype),)


def _shaped(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    return value.map(function) if isinstance(value, Pointer) else function(value)


def _axis(op: Op) -> int:
    return int(re.search(r"axis = (\d+)", op.rest)[1])  # type: ignore[index]


def _result_shape(op: Op) -> tuple[int, ...]:
    return _shape(op.rest.rpartition(" -> ")[2])


def _shape(text: str) -> tuple[int, ...]:
    found = re.match(r"tensor<((?:\d+x)+)", text.strip())
    return tuple(int(side) for side in found[1].split("x")[:-1]) if found else ()


def _addptr(_: Program, op: Op, env: Environment) -> tuple[Value]:
    pointer, steps = env[op.operands[0]], env[op.operands[1]]
    return (replace(pointer, offset=pointer.offset + steps.to(torch.int64) * pointer.dtype.itemsize),)


def _bitcast(_: Program, op: Op, env: Environment) -> tuple[Value]:
    value, dtype = env[op.operands[0]], type_of(op.rest.rpartition(" -> ")[2])[0]
    if isinstance(value, Pointer):
        return (replace(value, dtype=dtype),)
    return (value.view(dtype) if value.dtype != torch.bool else value.to(dtype),)


def _lanes(pointer: Pointer, mask: Tensor | None, op: Op) -> tuple[Tensor, Tensor]:
    """Which lanes are asked for, and their positions in the buffer's view; checked."""
    wanted = torch.ones_like(pointer.offset, dtype=torch.bool) if mask is None else mask.expand(pointer.offset.shape)
    offset = pointer.offset[wanted]
    size, buffer = pointer.dtype.itemsize, pointer.buffer
    if offset.numel():
        low, high = int(offset.min()), int(offset.max())
        if low < 0 or high + size > buffer.bytes.numel():
            raise FaultError(
                f"{op.name} of bytes {low} to {high + size} of {buffer.name}, which has {buffer.bytes.numel()}: "
                f"{op.operands[0]}"
            )
        if bool(((offset + buffer.align) % size != 0).any()):
            raise FaultError(f"{op.name} of {size} bytes at an odd address of {buffer.name}: {op.operands[0]}")
    return wanted, offset


def _load(program: Program, op: Op, env: Environment) -> tuple[Value]:
    pointer, *more = (env[name] for name in op.operands)
    mask = more[0] if more else None
    wanted, offset = _lanes(pointer, mask, op)
    buffer, dtype = pointer.buffer, pointer.dtype
    writers = buffer.writer[offset]
    if bool(((writers >= 0) & (writers != program.number)).any()):
        raise FaultError(f"{op.operands[0]} reads what another program of the launch wrote to {buffer.name}")
    if dtype == torch.bool:
        raise UnknownError("loads of single bits")
    # What nobody asked for is not zero on a GPU either.
    junk = float("nan") if dtype.is_floating_point else 85
    value = torch.full(pointer.offset.shape, junk, dtype=dtype) if len(more) < 2 else more[1].expand(
        pointer.offset.shape).clone()  # fmt: skip
    if buffer.align % dtype.itemsize == 0:
        value[wanted] = buffer.view(dtype)[offset // dtype.itemsize]
    return (value,)


def _store(program: Program, op: Op, env: Environment) -> tuple[Value, ...]:
    pointer, value, *more = (env[name] for name in op.operands)
    wanted, offset = _lanes(pointer, more[0] if more else None, op)
    buffer, size = pointer.buffer, pointer.dtype.itemsize
    for byte in range(size):
        writers = buffer.writer[offset + byte]
        if bool(((writers >= 0) & (writers != program.number)).any()):
            raise FaultError(f"{op.operands[0]}: two programs write to the same bytes of {buffer.name}")
        buffer.writer[offset + byte] = program.number
    if len(torch.unique(offset)) != offset.numel():
        raise FaultError(f"{op.operands[0]}: one program writes to the same bytes of {buffer.name} twice at once")
    buffer.view(pointer.dtype)[offset // size] = value.expand(pointer.offset.shape)[wanted]
    return ()


def _dot(_: Program, op: Op, env: Environment) -> tuple[Value]:
    a, b, c = (env[name] for name in op.operands[:3])
    return (a.float() @ b.float() + c.float(),)


def _combiner(op: Op) -> str:
    names = [inner.name for inner in op.regions[0] if inner.name not in ("block", "tt.reduce.return", "tt.scan.return")]
    if len(names) != 1:
        raise UnknownError(f"{op.name} by {names}")
    return names[0]


def _reduce(_: Program, op: Op, env: Environment) -> tuple[Value]:
    value, name = env[op.operands[0]], _combiner(op)
    if name in ("arith.addi", "arith.addf"):
        return (value.sum(_axis(op), dtype=value.dtype),)
    if name in ("arith.maxsi", "arith.maxnumf"):
        return (value.amax(_axis(op)),)
    raise UnknownError(f"reduction by {name}")


def _scan(_: Program, op: Op, env: Environment) -> tuple[Value]:
    if _combiner(op) not in ("arith.addi", "arith.addf") or "reverse = true" in op.rest:
        raise UnknownError(f"scan by {_combiner(op)}")
    value = env[op.operands[0]]
    return (value.cumsum(_axis(op), dtype=value.dtype),)


def _for(program: Program, op: Op, env: Environment) -> tuple[Value, ...]:
    head = op.rest
    variable, first, last, step = op.operands[:4]
    pairs = re.findall(r"(%[\w$.\-]+) = (%[\w$.\-]+(?:#\d+)?)", head.partition("iter_args(")[2].partition(") ->")[0])
    carried = [env[start] for _, start in pairs]
    kind = env[first].dtype
    for index in range(int(env[first]), int(env[last]), int(env[step])):
        inner = dict(env)  # names of the body end with it
        inner[variable] = torch.tensor(index, dtype=kind)
        inner.update(zip((name for name, _ in pairs), carried, strict=True))
        carried = program.block(op.regions[0], inner)
    return tuple(carried)


def _if(program: Program, op: Op, env: Environment) -> tuple[Value, ...]:
    if bool(env[op.operands[0]]):
        return tuple(program.block(op.regions[0], dict(env)))
    return tuple(program.block(op.regions[1], dict(env))) if len(op.regions) > 1 else ()


def _range(_: Program, op: Op, env: Environment) -> tuple[Value]:
    first, last = (int(re.search(rf"{word} = (\d+)", op.rest)[1]) for word in ("start", "end"))  # type: ignore[index]
    return (torch.arange(first, last, dtype=torch.int32),)


def _select(_: Program, op: Op, env: Environment) -> tuple[Value]:
    chosen, a, b = (env[name] for name in op.operands)
    if isinstance(a, Pointer):
        return (a if bool(chosen) else b,)
    return (torch.where(chosen, a, b),)


OPERATIONS: dict[str, Callable[[Program, Op, Environment], tuple[Value, ...]]] = {
    "arith.constant": _constant,
    "arith.cmpi": lambda _, op, env: (_compare(op, env),),
    "arith.cmpf": lambda _, op, env: (_compare(op, env),),
    "arith.select": _select,
    "scf.for": _for,
    "scf.if": _if,
    "tt.addptr": _addptr,
    "tt.bitcast": _bitcast,
    "tt.broadcast": lambda _, op, env: (_shaped(env[op.operands[0]], lambda a: a.expand(_result_shape(op))),),
    "tt.dot": _dot,
    "tt.expand_dims": lambda _, op, env: (_shaped(env[op.operands[0]], lambda a: a.unsqueeze(_axis(op))),),
    "tt.get_program_id": lambda program, op, _: (torch.tensor(program.place["xyz".index(op.rest.strip()[0])]).int(),),
    "tt.get_num_programs": lambda program, op, _: (torch.tensor(program.grid["xyz".index(op.rest.strip()[0])]).int(),),
    "tt.load": _load,
    "tt.make_range": _range,
    "tt.reduce": _reduce,
    "tt.reshape": lambda _, op, env: (_shaped(env[op.operands[0]], lambda a: a.reshape(_result_shape(op))),),
    "tt.scan": _scan,
    "tt.splat": lambda _, op, env: (_shaped(env[op.operands[0]], lambda a: a.expand(_result_shape(op))),),
    "tt.store": _store,
    "tt.trans": lambda _, op, env: (env[op.operands[0]].permute(_order(op)),),
}


def _order(op: Op) -> list[int]:
    return [int(side) for side in re.search(r"order = array<i32: ([\d, ]+)>", op.rest)[1].split(",")]  # type: ignore[index]


def _compare(op: Op, env: Environment) -> Tensor:
    predicate = op.rest.split(",")[0].strip()
    a, b = (env[name] for name in op.operands)
    if predicate[0] == "u" and predicate != "une":
        a, b = _unsigned(a), _unsigned(b)
    return COMPARE[predicate](a, b)

"""Runs Triton kernels without a GPU, from what Triton's compiler made of them.

Triton's interpreter runs the Python of a kernel; what the compiler's front end makes of that Python may mean something
else, and did. Here a launch goes through Triton's own specialization and front end for an H100, and the module that
comes out (TTIR, after inlining and folding) is run on the bytes of CPU tensors, one program after another:

    with ttir.running() as launches: ...

It is stricter than a GPU. A read or write outside of the tensor that was passed, a masked read without `other` whose
number is used, an address or number that is not as divisible as was promised, and two programs that meet at the same
bytes are errors or NaN, not luck.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttir_ops import Buffer, Environment, FaultError, Op, Pointer, Program, UnknownError, type_of


@dataclass
class Launch:
    """A launch that was run: the kernel's name and its module."""

    name: str
    module: str
    key: str


_LINE = re.compile(r'^(?:(?P<out>%[^=]*?)\s*=\s*)?"?(?P<name>[a-z]+\.[a-z_.0-9]+)"?\s*(?P<rest>.*)$')
_NAME = re.compile(r"%[A-Za-z0-9_$.\-]+(?:#\d+)?")


def parse(module: str) -> tuple[str, list[tuple[str, str]], list[Op]]:
    """Name, arguments (name, attributes) and body of the only function of a module without locations."""
    lines = [line.strip() for line in module.splitlines()]
    start = next(number for number, line in enumerate(lines) if line.startswith("tt.func"))
    head = lines[start]
    name = re.search(r"@([\w.$]+)\(", head)[1]  # type: ignore[index]
    arguments = re.findall(r"(%\w+): ([^%]*?)(?=, %|\) attributes|\) \{|$)", head)
    body, _ = _block(lines, start + 1)
    return name, arguments, body


def _block(lines: Sequence[str], at: int) -> tuple[list[Op], int]:
    """The operations from line `at` to the one that closes the block, and that line's number."""
    ops: list[Op] = []
    while not lines[at].startswith("}"):
        line = lines[at]
        at += 1
        if not line or line.startswith("^"):
            if line.startswith("^"):
                ops.append(Op([], "block", _NAME.findall(line), line))
            continue
        found = _LINE.match(line)
        if found is None:
            raise UnknownError(line)
        op = _op(found)
        while line.endswith("{"):
            region, at = _block(lines, at)
            op.regions.append(region)
            line = lines[at]
            at += 1
        op.rest += " " + line if op.regions else ""
        ops.append(op)
    return ops, at


def _op(found: re.Match[str]) -> Op:
    results: list[str] = []
    for out in re.findall(r"(%[\w$.\-]+)(?::(\d+))?", found["out"] or ""):
        results += [out[0]] if not out[1] else [f"{out[0]}#{number}" for number in range(int(out[1]))]
    rest = found["rest"]
    return Op(results, found["name"], _NAME.findall(rest.split(" : ")[0] if found["name"] != "scf.for" else rest), rest)


class Kernel:
    """What `triton.compile` returns, as far as a launch asks: it runs the module on CPU tensors."""

    function = packed_metadata = None

    def __init__(self, source: Any, module: str, launches: list[Launch]) -> None:
        self.module = module
        self.name, self.arguments, self.body = parse(module)
        constant = {path[0] for path in source.constants}
        self._parameters = source.fn.arg_names
        self._places = [place for place in range(len(self._parameters)) if place not in constant]
        assert len(self._places) == len(self.arguments), self.arguments
        self._launches = launches
        self._key = f"{source.signature} {source.constants} {source.attrs}"

    def launch_metadata(self, *_: Any) -> None:
        """Nobody profiles it."""

    def run(self, x: int, y: int, z: int, *given: Any) -> None:
        """Run all programs; `given` are stream, function, metadata and hooks, then the arguments."""
        self._launches.append(Launch(self.name, self.module, self._key))
        values = given[-len(self._parameters) :]
        env: Environment = {}
        for (name, described), place in zip(self.arguments, self._places, strict=True):
            value = values[place]
            if isinstance(value, Tensor):
                dtype = torch.int8 if value.dtype == torch.uint8 else value.dtype
                env[name] = Pointer(Buffer(self._parameters[place], value), torch.tensor(0), dtype)
            else:
                env[name] = torch.tensor(value, dtype=type_of(described.split(" ")[0])[0])
            promised = re.search(r"tt\.divisibility = (\d+)", described)
            number = value.data_ptr() if isinstance(value, Tensor) else value
            if promised and number % int(promised[1]):
                raise FaultError(f"{self.name}: {name} is not a multiple of {promised[1]}")
        places = [(a, b, c) for c in range(z) for b in range(y) for a in range(x)]
        for number, place in enumerate(places):
            Program(place, number, (x, y, z)).block(self.body, dict(env))


class Driver:
    """A driver of an H100 that is not there."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


_FRONT_END = threading.Lock()
"""Triton's front end was seen to fail when several threads were in it at once."""


def module_of(source: Any, target: Any, options: Any) -> str:
    """What Triton's front end and its first passes make of a kernel, without locations."""
    from triton._C.libtriton import ir
    from triton.compiler.compiler import make_backend

    backend = make_backend(target)
    parsed = backend.parse_options(dict(options or {}, **source.parse_options()))
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    generators = backend.get_codegen_implementation(parsed), backend.get_module_map()
    with _FRONT_END:
        made = source.make_ir(target, parsed, *generators, context)
    return str(stages["ttir"](made, {}).str_nodebug())


@contextmanager
def running() -> Iterator[list[Launch]]:
    """Launches of Triton kernels on CPU tensors run here; yields those that were made."""
    import triton.compiler
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []

    def compile(src: Any, target: Any = None, options: Any = None, **_: Any) -> Kernel:
        return Kernel(src, module_of(src, target, options), launches)

    before, compiler = driver._active, triton.compiler.compile
    caches: list[tuple[Any, Any]] = []
    from moeq.kernels import triton_kernels, triton_rows

    try:
        driver.set_active(Driver())
        triton.compiler.compile = compile
        for module in (triton_kernels, triton_rows):
            for kernel in vars(module).values():
                if isinstance(kernel, JITFunction):
                    caches.append((kernel, dict(kernel.device_caches)))
                    kernel.device_caches.clear()
        yield launches
    finally:
        driver._active, triton.compiler.compile = before, compiler
        for kernel, cache in caches:
            kernel.device_caches.clear()
            kernel.device_caches.update(cache)

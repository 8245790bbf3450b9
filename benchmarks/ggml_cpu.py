"""ggml's matrix-vector products on the CPU, called through ctypes; for benchmarks/cpu.py.

The libraries come from a build of ggml (`cmake -B out -DBUILD_SHARED_LIBS=ON && cmake --build out`), which is not part
of this repository.
"""

import ctypes
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"f32": 0, "q2_K": 10, "q3_K": 11, "q4_K": 12, "iq2_xs": 17, "bf16": 30}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class Ggml:
    """Products of several matrices of one shape and type with one vector."""

    def __init__(self, directory: Path) -> None:
        self.base = ctypes.CDLL(str(directory / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self.cpu = ctypes.CDLL(str(directory / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64
        for library, name, result, arguments in (
            (self.base, "ggml_init", pointer, [_InitParams]),
            (self.base, "ggml_free", None, [pointer]),
            (self.base, "ggml_row_size", size, [ctypes.c_int, number]),
            (self.base, "ggml_new_tensor_2d", pointer, [pointer, ctypes.c_int, number, number]),
            (self.base, "ggml_mul_mat", pointer, [pointer, pointer, pointer]),
            (self.base, "ggml_get_data", pointer, [pointer]),
            (self.base, "ggml_new_graph", pointer, [pointer]),
            (self.base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (self.base, "ggml_quantize_chunk", size, [ctypes.c_int, pointer, pointer, number, number, number, pointer]),
            (self.cpu, "ggml_cpu_init", None, []),
            (self.cpu, "ggml_graph_compute_with_ctx", ctypes.c_int, [pointer, pointer, ctypes.c_int]),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
        self.cpu.ggml_cpu_init()
        self.context: int | None = None

    def prepare(self, kind: str, rows: int, columns: int, copies: int) -> int:
        """Make `copies` matrices; returns the bytes of one."""
        self.close()
        row_bytes = self.base.ggml_row_size(TYPES[kind], columns)
        size = row_bytes * rows
        room = copies * (size + 4 * rows + 4096) + (64 << 20)
        self.context = self.base.ggml_init(_InitParams(room, None, False))
        sample = self._sample(kind, columns, row_bytes)
        x = self.base.ggml_new_tensor_2d(self.context, TYPES["f32"], columns, 1)
        vector = torch.randn(columns)
        ctypes.memmove(self.base.ggml_get_data(x), vector.data_ptr(), columns * 4)
        self.graph = self.base.ggml_new_graph(self.context)
        whole = sample.repeat(-(-size // sample.numel()))[:size].contiguous()
        for _ in range(copies):
            w = self.base.ggml_new_tensor_2d(self.context, TYPES[kind], columns, rows)
            ctypes.memmove(self.base.ggml_get_data(w), whole.data_ptr(), size)
            self.base.ggml_build_forward_expand(self.graph, self.base.ggml_mul_mat(self.context, w, x))
        return size

    def _sample(self, kind: str, columns: int, row_bytes: int) -> Tensor:
        """64 rows of random weights."""
        weights = torch.randn(64, columns) * 0.02
        out = torch.empty(64 * row_bytes, dtype=torch.uint8)
        importance = torch.ones(columns)
        if kind == "bf16":
            return weights.bfloat16().view(torch.uint8).reshape(-1)
        self.base.ggml_quantize_chunk(
            TYPES[kind], weights.data_ptr(), out.data_ptr(), 0, 64, columns, importance.data_ptr()
        )
        return out

    def run(self, threads: int) -> None:
        """All products, once."""
        status = self.cpu.ggml_graph_compute_with_ctx(self.context, self.graph, threads)
        assert status == 0

    def close(self) -> None:
        if self.context is not None:
            self.base.ggml_free(self.context)
            self.context = None

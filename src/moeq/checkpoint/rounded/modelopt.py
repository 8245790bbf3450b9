"""TensorRT Model Optimizer: NVFP4 with scales for 16 inputs and for the tensor, and FP8 with one for the tensor."""

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor

from moeq.checkpoint.rounded.base import Format, Headers, Read, decoded, expect, fp4, nibbles, part
from moeq.checkpoint.rounded.fp8 import BlockFp8, scaled
from moeq.spec import TensorInfo

GROUP: Final = 16
FP8: Final = BlockFp8()


class ModelOpt(Format):
    """`weight` in pairs of E2M1 codes with `weight_scale` and `weight_scale_2`, or in FP8 with `weight_scale`."""

    title = "NVFP4 and FP8 of ModelOpt"

    def weights(self, facts: Mapping[str, Any], headers: Headers, read: Read) -> dict[str, TensorInfo]:
        """Every tensor of bytes that has two scales, and every one of 8-bit floats."""
        found, rest = {}, dict(headers)
        for name, info in headers.items():
            if info.dtype != "U8" or f"{name}_scale" not in headers:
                continue
            scale, overall = headers[f"{name}_scale"], part(headers, f"{name}_scale_2", name)
            shape = (*info.shape[:-1], 2 * info.shape[-1])
            expect(scale, f"{name}_scale", dtypes=("F8_E4M3",), shape=(*shape[:-1], shape[-1] // GROUP))
            found[name] = decoded("modelopt", shape, {"codes": info, "scale": scale, "global": overall})
            for taken in (name, f"{name}_scale", f"{name}_scale_2"):
                del rest[taken]
        return found | FP8.weights(facts, rest, read)

    def decode(self, parts: Mapping[str, Tensor], shape: tuple[int, ...], options: Mapping[str, int]) -> Tensor:
        """code * scale of 16 inputs * scale of the tensor."""
        overall = parts["global"].float()
        if overall.numel() > 1:
            overall = overall.reshape(-1, *[1] * (len(shape) - 1))
        return scaled(fp4(nibbles(parts["codes"])), parts["scale"].float() * overall, (1, GROUP))

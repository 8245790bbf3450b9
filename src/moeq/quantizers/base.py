"""The seam of all quantizers: weights (and a Hessian) in, codes, scales and zeros out.

Legend: N output rows, K input columns, G groups per row.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from moeq.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedMatrix:
    """What a quantizer decided; exactly what `moeq.format.records.pack_matrix` stores.

    Attributes:
        codes_NK: uint8 codes below 2^bits.
        scale_NG: float16 scales, finite.
        zero_NG: uint8 (`asym`), float16 (`asym16`) or None (`sym`, `half`).
    """

    codes_NK: Tensor
    scale_NG: Tensor
    zero_NG: Tensor | None


class Quantizer(Protocol):
    """Rounds one matrix.

    Attributes:
        needs_hessian: whether `quantize` wants the inputs' second moments.
        options: options of a recipe that its constructor takes.
        weights_per_second: roughly, on two CPU cores; for estimates of time alone.
    """

    needs_hessian: ClassVar[bool]
    options: ClassVar[tuple[str, ...]]
    weights_per_second: ClassVar[float]

    def quantize(self, w_NK: Tensor, spec: QuantSpec, hessian_KK: Tensor | None) -> QuantizedMatrix:
        """Round `w_NK` to `spec`.

        Args:
            w_NK: weights, any float dtype, any device.
            spec: levels, bits and group size to round to.
            hessian_KK: sum over tokens of x x^T, float32, for quantizers that need it. The same
                tensor object may come several times in a row (gate and up share their inputs).

        Returns:
            codes, scales and zeros on the CPU.

        Raises:
            TensorError: the weights hold NaN or infinity.
        """
        ...

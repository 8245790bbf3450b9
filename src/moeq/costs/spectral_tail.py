"""AlphaQ's cost: rounding noise, weighted by how heavy the tail of the matrix's spectrum is (section 4). No data.

    cost(b) = s * eta(b)      s = (alpha_0 / alpha)^gamma      eta(b) = size * Var(W) * q(b)

A heavy tail (small alpha) is taken for a sign of a well trained, hence sensitive matrix. alpha_0, the median, scales
all costs alike and so decides nothing. q(b) is the mean squared error per weight of unit variance: 4^-b in the paper.
The paper's program counts matrices; here eta has the factor size = weights of the matrix / mean weights per matrix,
which is 1 where all matrices are alike. Elsewhere it makes eta the matrix's total squared error, as a limit in bytes
needs it: a matrix of twice the weights also takes twice the bytes.

gamma decides what alpha is worth: two matrices of equal variance get widths one bit apart only where
(alpha_1 / alpha_2)^gamma reaches 4. Good values lie between 10 and 200 depending on the model, so the default sets the
spread of the widths instead: gamma such that gamma * ln(alpha_0 / alpha) / ln 4 has a standard deviation of 0.7 bits.

Legend: U units, C candidates, M matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moeq.costs import spectra
from moeq.costs.base import Asked, LayerCosts, LayerView
from moeq.costs.matrices import dataless_quantizer, each_matrix, energy, gaussian_error, rounding_error
from moeq.costs.options import check_choice, check_number, check_switch
from moeq.errors import OptionError
from moeq.spec import QuantSpec

Array = NDArray[np.float64]

AUTO: Final = "auto"
SPREAD: Final = 0.7
"""Standard deviation of the wanted widths, in bits, where gamma is "auto" (AlphaQ, section 5: 0.6 to 0.8)."""
NOISES: Final = ("paper", "measured", "weights")
"""4^-b; the quantizer's error on Gaussian weights; its error on these very weights."""
ALPHAS: Final = ("scores", "shuffled", "reversed", "none")
"""As measured; dealt out at random; the smallest to whom the largest belongs; ignored. The last three are falsifiers:
what they achieve too is not alpha's merit."""
_VARIANCE_FLOOR: Final = 1e-12
"""Of the mean square: a matrix of equal entries has no variance, but may have a rounding error to express by it."""


def gamma_for_spread(alpha_U: Array, spread: float) -> float:
    """The gamma at which the bits that alpha adds to units' widths have standard deviation `spread`.

    gamma * sd(ln alpha) / ln 4 = spread, over the units whose alpha is defined; 0 where alphas do not differ.
    """
    known_U = alpha_U[defined(alpha_U)]
    deviation = float(np.log(known_U).std()) if known_U.size else 0.0
    return spread * math.log(4) / deviation if deviation > 1e-9 else 0.0


def defined(alpha_U: Array) -> NDArray[np.bool_]:
    """Which alphas are real ones: neither NaN nor 0, which stands for NaN in stored tables."""
    return np.nan_to_num(alpha_U, nan=0.0) > 0


def tail_scores(alpha_U: Array, gamma: float) -> Array:
    """s = (alpha_0 / alpha)^gamma with alpha_0 the median; 1 where alpha is not defined.

    Raises:
        OptionError: gamma is so large that scores overflow.
    """
    scores_U = np.ones_like(alpha_U)
    known_U = defined(alpha_U)
    if gamma and known_U.any():
        logs_U = np.log(np.maximum(alpha_U[known_U], 1e-8))
        exponents_U = gamma * (np.log(np.median(alpha_U[known_U])) - logs_U)
        if exponents_U.max() > math.log(1e300):
            raise OptionError(f"gamma {gamma:g} overflows", option="gamma", fix="choose a smaller one, or auto")
        scores_U[known_U] = np.exp(exponents_U)
    return scores_U


def rescore(
    alpha_U: Array, variance_U: Array, distortion_UC: Array, *, gamma: float, size_U: Array | None = None
) -> Array:
    """The costs of units from their statistics, so that another gamma needs no other look at the weights.

    To give a stored table another gamma whatever its noise, multiply its costs by
    tail_scores(alpha, gamma) / score, both statistics of the table.

    Args:
        alpha_U: tail exponents; NaN or 0 where undefined.
        variance_U: variances; ones for "alpha only".
        distortion_UC: mean squared error per weight of unit variance, (U, C) or (C,), for example `paper_distortion`.
        gamma: what alpha is worth, not negative.
        size_U: weights of the units relative to their mean; ones by default.

    Returns:
        costs_UC.

    Raises:
        OptionError: gamma is so large that scores overflow.
    """
    factor_U = tail_scores(alpha_U, gamma) * variance_U
    if size_U is not None:
        factor_U = factor_U * size_U
    return factor_U[:, np.newaxis] * distortion_UC


def paper_distortion(candidates: Sequence[QuantSpec]) -> Array:
    """4^-b of each candidate, (C,)."""
    return np.array([4.0**-spec.bits for spec in candidates])


def rearrange(alpha_U: Array, how: str, seed: int) -> Array:
    """alphas dealt out anew among the units that have one, as `ALPHAS` says."""
    if how == "scores":
        return alpha_U
    if how == "none":
        return np.full_like(alpha_U, np.nan)
    result_U = alpha_U.copy()
    (known,) = np.nonzero(defined(alpha_U))
    if how == "shuffled":
        result_U[known] = np.random.default_rng(seed).permutation(alpha_U[known])
    else:
        order = known[np.argsort(alpha_U[known], kind="stable")]
        result_U[order] = alpha_U[order[::-1]]
    return result_U


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Matrices:
    """What was measured of the matrices of one layer, in storage order; NaN where there is no alpha."""

    units: int
    alpha_M: Array
    weights_M: Array
    variance_M: Array
    distortion_MC: Array


class SpectralTail:
    """AlphaQ's cost; see the module's docstring.

    An expert's alpha is the mean of its matrices' alphas, and its noise the sum of theirs. A matrix without an alpha
    (a vector, or zeros) has no part in the median and gets s = 1.

    Args:
        gamma: what alpha is worth, not negative, or "auto".
        spread: what "auto" aims at, in bits.
        windows: tiles of a matrix that are looked at; all by default.
        seed: draws the tiles, and deals out shuffled alphas.
        tail: one of `spectra.TAILS`.
        noise: one of `NOISES`.
        quantizer: whose noise, by name, unless noise is "paper"; it must need no data.
        variance: False leaves out Var(W): "alpha only".
        alpha: one of `ALPHAS`.

    Raises:
        OptionError: an option has a value that cannot be used.
    """

    __slots__ = (
        "_gaussian", "_layers", "_quantizer", "alpha", "gamma", "needs", "noise", "seed", "spread", "tail", "variance",
        "windows",
    )  # fmt: skip

    def __init__(
        self,
        *,
        gamma: float | str = AUTO,
        spread: float = SPREAD,
        windows: int | None = None,
        seed: int = 0,
        tail: str = "decile",
        noise: str = "paper",
        quantizer: str = "rtn",
        variance: bool = True,
        alpha: str = "scores",
    ) -> None:
        if gamma != AUTO:
            check_number("gamma", gamma)
        check_number("spread", spread)
        check_number("seed", seed, whole=True)
        if windows is not None:
            check_number("windows", windows, 1, whole=True)
        for option, value, choices in (
            ("tail", tail, spectra.TAILS),
            ("noise", noise, NOISES),
            ("alpha", alpha, ALPHAS),
        ):
            check_choice(option, value, choices)
        check_switch("variance", variance)
        self.needs = "weights"
        self.gamma = None if gamma == AUTO else float(gamma)
        self.spread = spread
        self.windows = windows
        self.seed = seed
        self.tail = tail
        self.noise = noise
        self.variance = variance
        self.alpha = alpha
        self._quantizer = dataless_quantizer(quantizer)
        self._gaussian: dict[tuple[QuantSpec, int], float] = {}
        self._layers: dict[int, _Matrices] = {}

    def visit(self, view: LayerView, asked: Asked | None) -> None:
        """Measure every matrix; see `moeq.costs.base.Cost`."""
        del asked
        expected = {name: self._expected(view.candidates, shape[1]) for name, shape in view.layer.shapes.items()}

        def measure(expert: int, projection: str, w_NK: Tensor) -> tuple[float, ...]:
            place = (self.seed, view.index, expert, view.layer.projections.index(projection))
            alpha = spectra.tail_exponent(w_NK, tail=self.tail, cap=self.windows, rng=np.random.default_rng(place))
            weights, variance = w_NK.numel(), spectra.variance(w_NK)
            if self.noise != "weights":
                return alpha, weights, variance, *expected[projection]
            errors = [rounding_error(w_NK, self._quantizer, spec) / weights for spec in view.candidates]
            variance = max(variance, _VARIANCE_FLOOR * energy(w_NK) / weights)
            return alpha, weights, variance, *(error / variance if variance else 0.0 for error in errors)

        rows_MV = np.array(each_matrix(view, measure), dtype=np.float64)
        self._layers[view.index] = _Matrices(
            units=view.num_units,
            alpha_M=rows_MV[:, 0],
            weights_M=rows_MV[:, 1],
            variance_M=rows_MV[:, 2],
            distortion_MC=rows_MV[:, 3:],
        )

    def _expected(self, candidates: Sequence[QuantSpec], columns: int) -> list[float]:
        """q(b) of each candidate for rows of `columns` weights, where it does not depend on the weights."""
        if self.noise != "measured":
            return paper_distortion(candidates).tolist()
        for spec in candidates:
            if (spec, columns) not in self._gaussian:
                self._gaussian[spec, columns] = gaussian_error(self._quantizer, spec, columns)
        return [self._gaussian[spec, columns] for spec in candidates]

    def take(self, other: "SpectralTail") -> None:
        """See `moeq.costs.base.WeightsCost`."""
        self._layers.update(other._layers)

    def result(self) -> list[LayerCosts]:
        """Costs and statistics of every unit.

        Statistics: `alpha` (0 where undefined), `scored` (share of the unit's matrices that have one), `variance`,
        `size` and `score` (s); what `rescore` takes.

        Raises:
            OptionError: gamma is so large that scores overflow.
        """
        layers = [self._layers[index] for index in sorted(self._layers)]
        if not layers:
            return []
        mean_weights = float(np.concatenate([layer.weights_M for layer in layers]).mean())
        parts = [_join(layer, mean_weights, self.variance) for layer in layers]
        alpha_U, scored_U, variance_U, power_U, size_U = np.concatenate([part[:, :5] for part in parts]).T
        distortion_UC = np.concatenate([part[:, 5:] for part in parts])
        gamma = gamma_for_spread(alpha_U, self.spread) if self.gamma is None else self.gamma
        used_U = rearrange(alpha_U, self.alpha, self.seed)
        costs_UC = rescore(used_U, power_U, distortion_UC, gamma=gamma, size_U=size_U)
        statistics = {
            "alpha": np.nan_to_num(alpha_U, nan=0.0),
            "scored": scored_U,
            "variance": variance_U,
            "size": size_U,
            "score": tail_scores(used_U, gamma),
        }
        ends = np.cumsum([layer.units for layer in layers])
        return [
            LayerCosts(
                costs_UC=costs_UC[end - layer.units : end],
                statistics={name: values_U[end - layer.units : end] for name, values_U in statistics.items()},
            )
            for layer, end in zip(layers, ends, strict=True)
        ]


def _join(layer: _Matrices, mean_weights: float, with_variance: bool) -> Array:
    """Matrices to units: columns alpha, scored, variance, power (what stands in for the variance), size, q(b) ..."""
    shape = (layer.units, -1)
    known_UM = defined(layer.alpha_M).reshape(shape)
    sums_U = np.where(known_UM, layer.alpha_M.reshape(shape), 0).sum(1)
    counts_U = known_UM.sum(1)
    alpha_U = np.divide(sums_U, counts_U, out=np.full(layer.units, np.nan), where=counts_U > 0)
    weights_UM = layer.weights_M.reshape(shape)
    weights_U = weights_UM.sum(1)
    variance_UM = layer.variance_M.reshape(shape)
    power_UM = variance_UM if with_variance else np.ones_like(variance_UM)
    power_U = (weights_UM * power_UM).sum(1) / weights_U
    # Where nothing has a variance any q(b) will do.
    mix_UM = weights_UM * np.where(power_U[:, np.newaxis] > 0, power_UM, 1)
    distortion_UMC = layer.distortion_MC.reshape(*weights_UM.shape, -1)
    distortion_UC = (mix_UM[..., np.newaxis] * distortion_UMC).sum(1) / mix_UM.sum(1)[:, np.newaxis]
    variance_U = (weights_UM * variance_UM).sum(1) / weights_U
    columns_UV = (alpha_U, known_UM.mean(1), variance_U, power_U, weights_U / mean_weights)
    return np.column_stack([*columns_UV, distortion_UC])

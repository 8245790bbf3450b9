"""How much worse dropping components is than their costs, added up, say.

Costs of components are added up, as if what is lost of one had nothing to do with what is lost of another. Rounding is
like that. What is dropped is not: it is the components themselves, and these were trained to act together. The whole
projection says how much: with all of its components taken away at once, the loss changes by c . dz to first order, and

    coherence = E (c . dz)^2 / sum of the costs of all components

(BitsMoE, section 3, has D(0) = 1 instead.) It is 1 for components that have nothing to do with each other. Measured:
1.3 to 3.7 in most layers of trained models, but 26 to 40 in the first layer of one, where a token's embedding is all
that the experts see (benchmarks/spectral_stages.md).

Legend: S tokens of one expert, H hidden, I expert width.
"""

from typing import Final

from torch import Tensor

LEAST: Final = 1.0
"""Coherence is not below that of independent components: less is the luck of the text."""


def whole_harms(
    rho2_S: Tensor, z_SI: Tensor, products: dict[str, Tensor], slopes: dict[str, Tensor], back_SI: Tensor
) -> dict[str, float]:
    """Sum over tokens of (c . dz)^2, dz being what an answer loses with all of a projection, to first order.

    Args:
        rho2_S: squared routing weights.
        z_SI: inputs of the down projection.
        products: "gate", "up" -> their products with the tokens, (S, I).
        slopes: the same -> derivative of z by them, (S, I).
        back_SI: gradients with respect to z, before routing weights.
    """
    lost = {"down": z_SI} | {name: slopes[name] * products[name] for name in products}
    return {
        name: float(((back_SI * lost_SI).sum(1).square() * rho2_S).double().sum()) for name, lost_SI in lost.items()
    }


def whole_answers(
    rho2_S: Tensor, z_SI: Tensor, products: dict[str, Tensor], slopes: dict[str, Tensor], down_HI: Tensor
) -> dict[str, float]:
    """The same where the layer's answer is what counts: sum over tokens of |dz|^2."""
    lost = {"down": z_SI} | {name: slopes[name] * products[name] for name in products}
    return {
        name: float(((lost_SI @ down_HI.T).square().sum(1) * rho2_S).double().sum()) for name, lost_SI in lost.items()
    }


def coherence(whole: float, apart: float) -> float:
    """Harm of all components together / sum of their harms apart; `LEAST` at least, and where there is no harm."""
    return max(LEAST, whole / apart) if apart > 0 else LEAST


def add(total: dict[str, float], harms: dict[str, float]) -> None:
    """Add what a batch has."""
    for name, harm in harms.items():
        total[name] += harm

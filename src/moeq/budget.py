"""Budgets: how large the result may be, and in what units."""

import re
from dataclasses import dataclass
from fractions import Fraction

from moeq.errors import BudgetError

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """One limit, in exactly one of three units.

    Attributes:
        bits: mean stored bits per routed-expert weight, everything included (scales, zeros, padding).
        code_bits: mean code bits per routed-expert weight, the papers' accounting.
        size: bytes of the whole checkpoint directory.
    """

    bits: float | None = None
    code_bits: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.bits, self.code_bits, self.size) if value is not None]
        if len(given) != 1:
            raise BudgetError("give exactly one of a width and a size", option="bits, size", fix="drop one of them")
        if not given[0] > 0:
            option = "bits" if self.size is None else "size"
            raise BudgetError(f"a budget of {given[0]} is not positive", option=option, fix="give a positive number")
        for bits in (self.bits, self.code_bits):
            if bits is not None and bits > 16:
                raise BudgetError(
                    f"{bits:g} bits per weight is above the original's 16",
                    option="bits",
                    fix="give at most 16, or --size for bytes",
                )


def parse_size(text: str | int) -> int:
    """Bytes of "8GB" (10^9), "7.5 GiB" (2^30), "900MB" or a plain number.

    Raises:
        BudgetError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match.group(2).upper() not in UNITS:
        raise BudgetError(f"{text!r} is not a size", option="size", fix="write for example 8GB, 7.5GiB or 900MB")
    return int(Fraction(match.group(1)) * UNITS[match.group(2).upper()])

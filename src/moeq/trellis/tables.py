"""Tables of the level set "trellis", made by scripts/trellis_tables.py."""

from typing import Final

# fmt: off
TABLES: Final[dict[int, tuple[int, ...]]] = {
    1: (
        -25, -29, -19, -13, -8, -8, -7, -5, 6, 5, 8, 10, 18, 17, 21, 31,
    ),
    2: (
        -31, -20, -17, -11, -10, -6, -4, -1, 1, 4, 6, 10, 12, 17, 20, 31,
    ),
    3: (
        -63, -48, -39, -33, -29, -25, -23, -19, -17, -14, -12, -9, -8, -5, -3, -1,
        1, 4, 5, 8, 10, 12, 14, 17, 20, 23, 26, 29, 33, 39, 48, 63,
    ),
    4: (
        -127, -98, -80, -67, -56, -48, -42, -35, -31, -26, -22, -17, -14, -9, -7, -2,
        1, 6, 9, 13, 17, 21, 25, 31, 36, 41, 48, 56, 67, 81, 99, 127,
    ),
}
# fmt: on
"""Code width -> entries."""

TAPS: Final[dict[int, tuple[int, ...]]] = {1: (10, 4, 6, 41), 2: (36, 10, 81), 3: (4, 18, 35), 4: (18, 37)}
"""Code width -> parities, from the lowest bit of an index on: bit k for the code k rows above."""

UNITS: Final = {1: 18.71, 2: 14.56, 3: 23.54, 4: 45.00}
"""Code width -> what a standard deviation is in entries."""

ERRORS: Final = {1: 0.2894, 2: 0.0764, 3: 0.0205, 4: 0.0064}
"""Code width -> mean squared error on Gaussian numbers of variance 1."""

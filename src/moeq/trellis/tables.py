"""Tables of the level set "trellis", made by scripts/trellis_tables.py."""

from typing import Final

# fmt: off
TABLES: Final[dict[int, tuple[int, ...]]] = {
    1: (
        -18, -31, -18, -17, -8, -9, -8, -4, 10, 4, 7, 8, 19, 16, 18, 31,
    ),
    2: (
        -30, -20, -17, -12, -10, -6, -4, -1, 1, 4, 7, 10, 14, 16, 21, 31,
    ),
    3: (
        -62, -47, -40, -33, -31, -25, -24, -19, -18, -14, -13, -9, -8, -5, -4, -1,
        1, 4, 5, 8, 10, 13, 14, 17, 20, 23, 26, 30, 35, 39, 48, 63,
    ),
    4: (
        -126, -98, -80, -67, -56, -48, -42, -36, -31, -26, -22, -18, -14, -10, -6, -2,
        1, 6, 9, 13, 17, 22, 26, 31, 36, 42, 49, 57, 68, 82, 100, 127,
    ),
}
# fmt: on
"""Code width -> entries."""

TAPS: Final[dict[int, tuple[int, ...]]] = {1: (10, 4, 6, 41), 2: (36, 10, 81), 3: (4, 18, 35), 4: (18, 37)}
"""Code width -> parities, from the lowest bit of an index on: bit k for the code k rows above."""

UNITS: Final = {1: 18.39, 2: 14.41, 3: 23.49, 4: 44.92}
"""Code width -> what a standard deviation is in entries."""

ERRORS: Final = {1: 0.3000, 2: 0.0811, 3: 0.0217, 4: 0.0066}
"""Code width -> mean squared error on Gaussian numbers of variance 1, restarts included."""

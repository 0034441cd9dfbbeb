"""Numbers: values passed on as float32 or as 64-bit integers must fit."""

from __future__ import annotations

import math

#: Range of the floats that kernels take.
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38
#: Classes, identities and other sizes: kernels keep positions in 32 bits.
LARGEST_SIZE = 2**31 - 1


def _shown(value: float) -> str:
    """A number as text, without the thousands of digits of a large integer."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)


def number(
    name: str,
    value: object,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    kind: str = "a float",
) -> None:
    """A finite number that float32 can hold, larger than ``above``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be {kind}, got {type(value).__name__}")
    if not abs(value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    if abs(value) > FLOAT32_MAX:
        raise ValueError(
            f"{name} must be at most {FLOAT32_MAX:.2g} in magnitude, the largest float32 number, "
            f"got {_shown(value)}"
        )
    if above is not None and value <= above:
        raise ValueError(f"{name} must be > {above:g}, got {value}")
    if above == 0.0 and value < FLOAT32_TINY:
        raise ValueError(
            f"{name} must be > 0, at least {FLOAT32_TINY:.2g}, the smallest float32 number, "
            f"got {value}"
        )
    if at_least is not None and value < at_least:
        raise ValueError(f"{name} must be >= {at_least:g}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be <= {at_most:g}, got {value}")


def integer(name: str, value: object) -> int:
    """A 64-bit integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be in [-2^63, 2^63), got {_shown(value)}")
    return value


def positive_int(name: str, value: object) -> None:
    size = integer(name, value)
    if size < 1:
        raise ValueError(f"{name} must be >= 1, got {size}")
    at_most(name, size, LARGEST_SIZE)


def at_most(name: str, value: int, largest: int) -> None:
    if value > largest:
        raise ValueError(f"{name} must be <= {largest}, got {value}")

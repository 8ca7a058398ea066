"""From factors and shifts in floats to the integers by which a layer stores its sums."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.integers.program import Store
from dacnn.quantization import VALUE_LIMIT, Quantity, exponent

# C channels

Floats = NDArray[np.float64]
_INT32 = 2**31 - 1
_INT16 = 2**15 - 1
# sums have 31 bits: behind so many, a factor's rounding cannot be seen
_LARGEST_SHIFT = 46
# b << b_shift stays below 2 ** 61, a * m below 2 ** 62, what is added for a residual below 2 ** 40: their sum fits into int64
_ADDEND_BITS = 61
# logits have so many bits: float32 holds them exactly
_LOGIT_BITS = 24


@dataclass(frozen=True)
class Affine:
    """What sums mean and what becomes of them, in floats.

    Attributes:
        scale: Of a sum, shape (C,) or (1,), in the unit of what comes out.
        shift: What is added, shape (C,) or (1,).
        residual: Quantity of a value that is added.
        low: Smallest value that is stored.
        high: Largest one.
        largest_sum: What the sums cannot exceed.
    """

    scale: Floats
    shift: Floats
    residual: Quantity | None
    low: float
    high: float
    largest_sum: int


def make_store(affine: Affine, residual: str | None, out: Quantity) -> Store:
    """Store in eight bits.

    Args:
        affine: What becomes of the sums.
        residual: Name of the value that is added.
        out: What is stored.

    Returns:
        The integers.
    """
    low, high = (round(min(max(end / out.scale, -VALUE_LIMIT), VALUE_LIMIT)) for end in (affine.low, affine.high))
    return _store(affine, residual, out, max(out.zero + low, 0), min(out.zero + high, VALUE_LIMIT))


def make_wide_store(affine: Affine, residual: str | None) -> tuple[Store, Quantity]:
    """Store in int32: logits.

    Args:
        affine: What becomes of the sums.
        residual: Name of the value that is added.

    Returns:
        The integers, and what the stored numbers mean: their scale is a power of two.
    """
    bound = float((np.abs(affine.scale) * affine.largest_sum + np.abs(affine.shift)).max())
    if affine.residual is not None:
        bound += VALUE_LIMIT * affine.residual.scale
    out = Quantity(2.0 ** (exponent(bound) - _LOGIT_BITS), 0)
    low, high = (round(min(max(end / out.scale, -_INT32), _INT32)) for end in (affine.low, affine.high))
    return _store(affine, residual, out, low, high), out


def _store(affine: Affine, residual: str | None, out: Quantity, low: int, high: int) -> Store:
    factor, addend = np.broadcast_arrays(affine.scale / out.scale, affine.shift / out.scale)
    residual_factor = 0.0 if affine.residual is None else affine.residual.scale / out.scale
    shift = _shift(max(float(np.abs(factor).max()), residual_factor))
    m = np.clip(np.rint(np.ldexp(factor, shift)), -_INT32, _INT32).astype(np.int32)
    # what is added can be far outside of what can be stored: then only its sign matters
    most = 2.0**_ADDEND_BITS - 2.0 ** (_ADDEND_BITS - 15)
    wanted = np.clip(np.ldexp(addend, shift), -most, most)
    b_shift = max(exponent(float(np.abs(wanted).max()) / _INT16), 0)
    b = np.clip(np.rint(np.ldexp(wanted, -b_shift)), -_INT16, _INT16).astype(np.int16)
    residual_zero = 0 if affine.residual is None else affine.residual.zero
    residual_m = min(round(math.ldexp(residual_factor, shift)), _INT32)
    return Store(m, b, b_shift, shift, out.zero, low, high, residual, residual_zero, residual_m)


def _shift(largest: float) -> int:
    """The shift at which the largest factor has 31 bits."""
    if largest == 0:
        return _LARGEST_SHIFT // 2
    shift = 31 - exponent(largest)
    if round(math.ldexp(largest, shift)) > _INT32:
        shift -= 1
    return min(max(shift, 1), _LARGEST_SHIFT)

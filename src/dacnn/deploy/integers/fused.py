"""Steps of a flat program joined to what is done to their sums before they are stored: the points where integers are rounded.

What sums up (a convolution, a mean, a sum, ...) takes along the scale and shift behind it, the addition of a value that is
there already, and a ReLU or clip, as far as nobody else reads what lies between.
"""

import math
from collections import Counter
from dataclasses import dataclass

from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    Convolve,
    GlobalAverage,
    Linear,
    Multiply,
    Normalize,
    Operation,
    Program,
    ScaleShift,
    operands,
)
from dacnn.deploy.shapes import flat_steps

Summing = Normalize | Convolve | Linear | ScaleShift | AveragePool | GlobalAverage | Add | Multiply


@dataclass(frozen=True)
class Fused:
    """A step and what is done before its values are stored.

    Attributes:
        out: Name of what it gives: that of the last step taken along.
        step: What sums up.
        affine: Scale and shift behind it.
        residual: Name of a value that is added.
        low: Smallest value that is stored, -inf without a ReLU or clip.
        high: Largest one.
    """

    out: str
    step: Summing
    affine: ScaleShift | None = None
    residual: str | None = None
    low: float = -math.inf
    high: float = math.inf

    @property
    def values(self) -> tuple[str, ...]:
        """The values that it takes."""
        return operands(self.step) + ((self.residual,) if self.residual is not None else ())


def fused(program: Program) -> tuple[Fused | Operation, ...]:
    """Join the steps of a program.

    Args:
        program: A flat one.

    Returns:
        Every step that sums up as a `Fused`; the others, which round nothing or look up a table, as they are.

    Raises:
        DeployError: The program has loops.
    """
    flat = flat_steps(program)
    reads = Counter([program.result, *(value for step in flat for value in operands(step))])
    reader = {value: step for step in flat for value in operands(step) if reads[value] == 1}
    known, taken, joined = {IMAGES}, set[str](), list[Fused | Operation]()
    for step in flat:
        if step.out in taken:
            continue
        one = _with_what_follows(step, reader, known) if isinstance(step, Summing) else step
        if isinstance(one, Fused):
            taken |= _passed(step.out, one.out, reader)
        known.add(one.out)
        joined.append(one)
    return tuple(joined)


def values_of(step: Fused | Operation) -> tuple[str, ...]:
    """The values that a step takes."""
    return step.values if isinstance(step, Fused) else operands(step)


def _passed(first: str, last: str, reader: dict[str, Operation]) -> set[str]:
    """Names behind `first` up to `last`."""
    names: set[str] = set()
    while first != last:
        first = reader[first].out
        names.add(first)
    return names


def _with_what_follows(step: Summing, reader: dict[str, Operation], known: set[str]) -> Fused:
    out, affine, residual, low, high = step.out, None, None, -math.inf, math.inf
    behind = reader.get(out)
    if isinstance(behind, ScaleShift) and not isinstance(step, ScaleShift | Normalize | Add):
        out, affine, behind = behind.out, behind, reader.get(behind.out)
    if isinstance(behind, Add) and not isinstance(step, Add):
        other = behind.y if behind.x == out else behind.x
        if other in known:
            out, residual, behind = behind.out, other, reader.get(behind.out)
    if isinstance(behind, Activate) and behind.kind in ("relu", "clip"):
        out = behind.out
        low, high = (0.0, math.inf) if behind.kind == "relu" else (behind.low, behind.high)
    return Fused(out, step, affine, residual, low, high)

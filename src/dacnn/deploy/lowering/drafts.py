"""Steps in the making: scales and shifts in float64, merged where one follows the other and rounded once."""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.fx import Node

from dacnn.deploy.program import Add, Multiply, Operation, operands

# N images, C channels, F features

D = TypeVar("D", bound="Draft")


@dataclass(frozen=True)
class Affine:
    """Channel by channel: x * scale + shift, in float64, either of them left out.

    Attributes:
        out: Name of what it gives.
        x: Name of what it takes.
        scale: Shape (C,).
        shift: Shape (C,).
        base: What its tensors are named after: a layer.
        is_norm: Whether that is a norm.
        scale_name: Name of the stored tensor that the scale is, as it is.
        shift_name: Likewise of the shift.
    """

    out: str
    x: str
    scale: Tensor | None
    shift: Tensor | None
    base: str
    is_norm: bool = False
    scale_name: str | None = None
    shift_name: str | None = None

    @property
    def names(self) -> tuple[str, str]:
        """Names of its tensors."""
        before = f"{self.base}." if self.base else ""
        return self.scale_name or f"{before}scale", self.shift_name or f"{before}shift"


@dataclass(frozen=True)
class Unflatten:
    """N x F -> N x F x 1 x 1, which is no step: what gives such a value is changed, see `dacnn.deploy.lowering.pixels`.

    Attributes:
        out: Name of what it gives.
        x: Name of what it takes.
        node: Who wants it.
    """

    out: str
    x: str
    node: Node


Draft = Operation | Affine | Unflatten


def taken(step: Draft) -> tuple[str, ...]:
    """The values that a step takes."""
    return (step.x,) if isinstance(step, Affine | Unflatten) else operands(step)


def renamed(step: D, names: Mapping[str, str]) -> D:
    """A step that takes and gives values of other names, where there are any."""
    changes = {field: names.get(getattr(step, field), getattr(step, field)) for field in ("out", "x")}
    if isinstance(step, Add | Multiply):
        changes["y"] = names.get(step.y, step.y)
    return dataclasses.replace(step, **changes)


def living(steps: Sequence[Draft], result: str) -> list[Draft]:
    """The steps that a result needs, in their order."""
    needed, kept = {result}, []
    for step in reversed(steps):
        if step.out in needed:
            needed.update(taken(step))
            kept.append(step)
    return kept[::-1]


def _then(first: Affine, second: Affine) -> Affine:
    """One for two: (x * a + b) * c + d = x * (a * c) + (b * c + d)."""
    scale = first.scale if second.scale is None else second.scale
    if first.scale is not None and second.scale is not None:
        scale = first.scale * second.scale
    moved = first.shift if first.shift is None or second.scale is None else first.shift * second.scale
    shift = moved if second.shift is None else second.shift
    if moved is not None and second.shift is not None:
        shift = moved + second.shift
    named = first if first.is_norm and not second.is_norm else second
    # a stored tensor's name is for that tensor alone
    scale_name = named.scale_name if scale is named.scale else None
    shift_name = named.shift_name if shift is named.shift else None
    return Affine(second.out, first.x, scale, shift, named.base, named.is_norm, scale_name, shift_name)


def merged(steps: Sequence[Draft], result: str) -> list[Draft]:
    """The steps with one scale and shift for each row of them that nobody else reads from.

    Args:
        steps: Each behind those that it takes from.
        result: Name of the value that is read at the end.
    """
    readers = Counter([result, *(name for step in steps for name in taken(step))])
    made: dict[str, Draft] = {}
    for step in steps:
        before = made.get(step.x)
        if isinstance(step, Affine) and isinstance(before, Affine) and readers[before.out] == 1:
            del made[before.out]
            step = _then(before, step)
        made[step.out] = step
    return list(made.values())

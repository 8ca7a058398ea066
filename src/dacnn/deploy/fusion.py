"""Steps of a program, each with those behind it that can be done while its values are stored.

A convolution or a linear step takes along the scales and shifts that alone read it, and a ReLU behind them. What the steps
give is the same; there are fewer values.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.program import (
    Activate,
    Flatten,
    KernelStep,
    Normalize,
    Operation,
    Program,
    ScaleShift,
    Tensors,
    operands,
)
from dacnn.errors import ConfigError

# C channels

Factors = NDArray[np.float64]


@dataclass(frozen=True)
class Stored:
    """A step that reads a kernel, and what is done to its values before they are stored.

    Attributes:
        out: Name of what it gives.
        step: The convolution or linear step.
        affine: Scales and shifts of it, the first one first.
        relu: Whether a ReLU ends it.
    """

    out: str
    step: KernelStep
    affine: tuple[ScaleShift, ...] = ()
    relu: bool = False

    def __str__(self) -> str:
        return " ".join([str(self.step), *(str(one).removeprefix(one.x).strip() for one in self.affine), "relu" * self.relu])


def scale_and_shift(affine: tuple[ScaleShift, ...], tensors: Tensors) -> tuple[Factors | None, Factors | None]:
    """Scales and shifts as one: (x * s + t) * u + v = x * (s * u) + (t * u + v), in float64.

    Args:
        affine: The steps, the first one first.
        tensors: The program's.

    Returns:
        Scale and shift, each of shape (C,), or None where there is none.
    """
    scale: Factors | None = None
    shift: Factors | None = None
    for one in affine:
        if one.scale is not None:
            factor = _tensor(tensors, one.scale)
            scale = factor if scale is None else scale * factor
            shift = None if shift is None else shift * factor
        if one.shift is not None:
            term = _tensor(tensors, one.shift)
            shift = term if shift is None else shift + term
    return scale, shift


def _tensor(tensors: Tensors, reference: object) -> Factors:
    assert isinstance(reference, str), "a row of a table in a program without loops"
    return tensors[reference].astype(np.float64)


@dataclass(frozen=True)
class Task:
    """A step as it is run.

    Attributes:
        step: What is done.
        values: The values that it takes.
        spent: Those that nobody reads afterwards.
        owned: Whether its first value is spent, and shares its memory with nothing else, so that it may be overwritten.
    """

    step: Operation | Stored
    values: tuple[str, ...]
    spent: tuple[str, ...]
    owned: bool


def tasks(program: Program) -> tuple[Task, ...]:
    """What is to be run, in order.

    Args:
        program: A program without loops.

    Returns:
        Its steps, each once, alone or taken along by another.

    Raises:
        ConfigError: The program has loops.
    """
    steps = _merged(program)
    last = {value: index for index, step in enumerate(steps) for value in _taken(step)}
    own: set[str] = set()
    found = []
    for index, step in enumerate(steps):
        values = _taken(step)
        spent = tuple(value for value in dict.fromkeys(values) if last[value] == index and value != program.result)
        owned = values[0] in spent and values[0] in own and values.count(values[0]) == 1
        found.append(Task(step, values, spent, owned))
        # the others may give a view, or the very tensor that they were given
        if not isinstance(step, Normalize | Flatten | ScaleShift):
            own.add(step.out)
    return tuple(found)


def _taken(step: Operation | Stored) -> tuple[str, ...]:
    return operands(step.step if isinstance(step, Stored) else step)


def _merged(program: Program) -> list[Operation | Stored]:
    flat = list(program.operations())
    if len(flat) != len(program.steps):
        raise ConfigError(f"program '{program.name}' has loops or branches: pack it as it was before they were rolled")
    reads = Counter(value for step in flat for value in operands(step))
    reads[program.result] += 1
    only_reader = {value: step for step in flat for value in operands(step) if reads[value] == 1}
    merged: list[Operation | Stored] = []
    along: set[str] = set()
    for step in flat:
        if step.out in along:
            continue
        if not isinstance(step, KernelStep):
            merged.append(step)
            continue
        out, affine, relu = step.out, [], False
        while isinstance(behind := only_reader.get(out), ScaleShift):
            affine.append(behind)
            out = behind.out
        if isinstance(behind, Activate) and behind.kind == "relu":
            out, relu = behind.out, True
        along |= {one.out for one in affine} | ({out} if relu else set())
        merged.append(Stored(out, step, tuple(affine), relu))
    return merged

"""Steps of a program, each with those behind it that can be done while its values are stored.

A convolution or a linear step takes along the scale and shift that alone reads it, and a ReLU behind that. What the steps
give is the same; there are fewer values.
"""

from collections import Counter
from dataclasses import dataclass

from dacnn.deploy.program import (
    Activate,
    Flatten,
    GlobalAverage,
    KernelStep,
    Normalize,
    Operation,
    Program,
    ScaleShift,
    operands,
)
from dacnn.deploy.shapes import flat_steps


@dataclass(frozen=True)
class Stored:
    """A step that reads a kernel, and what is done to its values before they are stored.

    Attributes:
        out: Name of what it gives.
        step: The convolution or linear step.
        affine: Scale and shift of it.
        relu: Whether a ReLU ends it.
    """

    out: str
    step: KernelStep
    affine: ScaleShift | None = None
    relu: bool = False

    def __str__(self) -> str:
        return f"{self.step}{f', {self.affine}' if self.affine else ''}{', relu' * self.relu}"


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
        program: A flat program.

    Returns:
        Its steps, each once, alone or taken along by another.

    Raises:
        DeployError: The program has loops.
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
        # these may give a view, or the very tensor that they were given
        if not isinstance(step, Normalize | Flatten | ScaleShift | GlobalAverage):
            own.add(step.out)
    return tuple(found)


def _taken(step: Operation | Stored) -> tuple[str, ...]:
    return operands(step.step if isinstance(step, Stored) else step)


def _merged(program: Program) -> list[Operation | Stored]:
    flat = flat_steps(program)
    reads = Counter(value for step in flat for value in operands(step))
    reads[program.result] += 1
    only_reader = {value: step for step in flat for value in operands(step) if reads[value] == 1}
    merged: list[Operation | Stored] = []
    along: set[str] = set()
    for step in flat:
        if isinstance(step, KernelStep):
            stored = _with_what_follows(step, only_reader)
            # the value that it gives has the name of the last step that it takes along
            along |= {stored.affine.out} if stored.affine else set()
            along |= {stored.out} - {step.out}
            merged.append(stored)
        elif step.out not in along:
            merged.append(step)
    return merged


def _with_what_follows(step: KernelStep, only_reader: dict[str, Operation]) -> Stored:
    out, affine, relu = step.out, None, False
    behind = only_reader.get(out)
    if isinstance(behind, ScaleShift):
        out, affine, behind = behind.out, behind, only_reader.get(behind.out)
    if isinstance(behind, Activate) and behind.kind == "relu":
        out, relu = behind.out, True
    return Stored(out, step, affine, relu)

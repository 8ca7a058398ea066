"""Steps of a program, each with those behind it that can be done while its values are stored.

A convolution or a linear step takes along the scale and shift that alone reads it, and a ReLU behind that; where the back
end can, also the addition of a value that is there already, and a 2x2 pooling at the end. What the steps give is the same;
there are fewer values.
"""

from collections import Counter
from dataclasses import dataclass

from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    Convolve,
    Flatten,
    GlobalAverage,
    KernelStep,
    MaxPool,
    Normalize,
    Operation,
    Program,
    ScaleShift,
    operands,
)
from dacnn.deploy.shapes import flat_steps


@dataclass(frozen=True)
class Stored:
    """A step that reads a kernel, and what is done to its values before they are stored, in the order of the attributes.

    Attributes:
        out: Name of what it gives.
        step: The convolution or linear step.
        affine: Scale and shift of it.
        added: The value that is added.
        relu: Whether a ReLU follows.
        pool: Whether the largest of every 2x2 is what is stored.
    """

    out: str
    step: KernelStep
    affine: ScaleShift | None = None
    added: str | None = None
    relu: bool = False
    pool: bool = False

    def __str__(self) -> str:
        words = (f", {self.affine}" if self.affine else "", f", + {self.added}" if self.added else "")
        return f"{self.step}{''.join(words)}{', relu' * self.relu}{', max-pool' * self.pool}"


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


def tasks(program: Program, *, sums: bool = False, pools: bool = False) -> tuple[Task, ...]:
    """What is to be run, in order.

    Args:
        program: A flat program.
        sums: Whether a convolution takes along the addition of a value that is there before it.
        pools: Whether a convolution takes along a max-pooling of 2x2.

    Returns:
        Its steps, each once, alone or taken along by another.

    Raises:
        DeployError: The program has loops.
    """
    steps = _merged(program, sums, pools)
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
    if isinstance(step, Stored):
        return operands(step.step) + ((step.added,) if step.added else ())
    return operands(step)


def _merged(program: Program, sums: bool, pools: bool) -> list[Operation | Stored]:
    flat = flat_steps(program)
    reads = Counter(value for step in flat for value in operands(step))
    reads[program.result] += 1
    only_reader = {value: step for step in flat for value in operands(step) if reads[value] == 1}
    merged: list[Operation | Stored] = []
    along: set[str] = set()
    ready = {IMAGES}
    for step in flat:
        if step.out in along:
            continue
        if isinstance(step, KernelStep):
            stored, taken = _with_what_follows(step, only_reader, ready if sums else set(), pools)
            along |= taken
            merged.append(stored)
        else:
            merged.append(step)
        ready.add(merged[-1].out)
    return merged


def _with_what_follows(
    step: KernelStep, only_reader: dict[str, Operation], addable: set[str], pools: bool
) -> tuple[Stored, set[str]]:
    """The step with what it takes along, and the names of what that would give by itself."""
    names = [step.out]
    affine, added, relu, pool = None, None, False, False
    behind = only_reader.get(step.out)
    if isinstance(behind, ScaleShift):
        affine = behind
        names.append(behind.out)
        behind = only_reader.get(behind.out)
    if isinstance(behind, Add) and (behind.x if behind.y == names[-1] else behind.y) in addable:
        added = behind.x if behind.y == names[-1] else behind.y
        names.append(behind.out)
        behind = only_reader.get(behind.out)
    if isinstance(behind, Activate) and behind.kind == "relu":
        relu = True
        names.append(behind.out)
        behind = only_reader.get(behind.out)
    if pools and isinstance(step, Convolve) and isinstance(behind, MaxPool) and behind == MaxPool(behind.out, behind.x):
        pool = True
        names.append(behind.out)
    # the value that it gives has the name of the last step that it takes along
    return Stored(names[-1], step, affine, added, relu, pool), set(names[1:])

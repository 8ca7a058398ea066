"""Steps of a program, each with those behind it that can be done while its values are stored.

What sums up takes along the scale and shift that alone reads it and a ReLU behind that; where the back end can, also the
addition of a value that is there already, a clip, and a 2x2 pooling at the end. What the steps give is the same; there are
fewer values.
"""

import math
from collections import Counter
from dataclasses import dataclass
from types import UnionType

from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    Convolve,
    Flatten,
    GlobalAverage,
    KernelStep,
    Linear,
    MaxPool,
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
class Stored:
    """A step that sums up, and what is done to its sums before they are stored, in the order of the attributes.

    Attributes:
        out: Name of what it gives: that of the last step taken along.
        step: What sums up.
        affine: Scale and shift of it.
        added: Name of the value that is added.
        low: Smallest value that is stored, -inf without a ReLU or clip.
        high: Largest one.
        pool: Whether the largest of every 2x2 is what is stored.
    """

    out: str
    step: Summing
    affine: ScaleShift | None = None
    added: str | None = None
    low: float = -math.inf
    high: float = math.inf
    pool: bool = False

    @property
    def relu(self) -> bool:
        """Whether what is stored went through a ReLU."""
        return (self.low, self.high) == (0, math.inf)

    def __str__(self) -> str:
        bounds = ", relu" if self.relu else f", clip {self.low:g} {self.high:g}" * (self.high < math.inf)
        words = (f", {self.affine}" if self.affine else "", f", + {self.added}" if self.added else "", bounds)
        return f"{self.step}{''.join(words)}{', max-pool' * self.pool}"


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
    steps = stored(program, KernelStep, sums=sums, pools=pools)
    last = {value: index for index, step in enumerate(steps) for value in values_of(step)}
    own: set[str] = set()
    found = []
    for index, step in enumerate(steps):
        values = values_of(step)
        spent = tuple(value for value in dict.fromkeys(values) if last[value] == index and value != program.result)
        owned = values[0] in spent and values[0] in own and values.count(values[0]) == 1
        found.append(Task(step, values, spent, owned))
        # these may give a view, or the very tensor that they were given
        if not isinstance(step, Normalize | Flatten | ScaleShift | GlobalAverage):
            own.add(step.out)
    return tuple(found)


def stored(
    program: Program, takers: UnionType, *, sums: bool = False, clips: bool = False, pools: bool = False
) -> tuple[Stored | Operation, ...]:
    """Join steps to those whose sums they change before these are stored.

    Args:
        program: A flat program.
        takers: Kinds of steps that take others along, among those that sum up.
        sums: Whether they take along the addition of a value that is there before.
        clips: Whether they take along a clip as they do a ReLU.
        pools: Whether a convolution takes along a max-pooling of 2x2.

    Returns:
        Every taker as a `Stored`, the others as they are, in order.

    Raises:
        DeployError: The program has loops.
    """
    flat = flat_steps(program)
    reads = Counter([program.result, *(value for step in flat for value in operands(step))])
    only_reader = {value: step for step in flat for value in operands(step) if reads[value] == 1}
    joined: list[Stored | Operation] = []
    along: set[str] = set()
    ready = {IMAGES}
    for step in flat:
        if step.out in along:
            continue
        if isinstance(step, takers):
            one, taken = _with_what_follows(step, only_reader, ready if sums else set(), clips, pools)
            along |= taken
            joined.append(one)
        else:
            joined.append(step)
        ready.add(joined[-1].out)
    return tuple(joined)


def summed(program: Program) -> tuple[Stored | Operation, ...]:
    """Join the steps of a program at the points where integers are rounded.

    Args:
        program: A flat program.

    Returns:
        Every step that sums up as a `Stored`; the others, which round nothing or look up a table, as they are.

    Raises:
        DeployError: The program has loops.
    """
    return stored(program, Summing, sums=True, clips=True)


def values_of(step: Stored | Operation) -> tuple[str, ...]:
    """Names of the values that a step takes."""
    if isinstance(step, Stored):
        return operands(step.step) + ((step.added,) if step.added is not None else ())
    return operands(step)


def _with_what_follows(
    step: Summing, only_reader: dict[str, Operation], addable: set[str], clips: bool, pools: bool
) -> tuple[Stored, set[str]]:
    """The step with what it takes along, and the names of what that would give by itself."""
    names = [step.out]
    affine, added, low, high, pool = None, None, -math.inf, math.inf, False
    behind = only_reader.get(step.out)
    # what scales, or adds, by itself has no second scale or addend
    if isinstance(behind, ScaleShift) and not isinstance(step, ScaleShift | Normalize | Add):
        affine = behind
        names.append(behind.out)
        behind = only_reader.get(behind.out)
    if isinstance(behind, Add) and not isinstance(step, Add):
        other = behind.x if behind.y == names[-1] else behind.y
        if other in addable:
            added = other
            names.append(behind.out)
            behind = only_reader.get(behind.out)
    if isinstance(behind, Activate) and (behind.kind == "relu" or (clips and behind.kind == "clip")):
        low, high = (0.0, math.inf) if behind.kind == "relu" else (behind.low, behind.high)
        names.append(behind.out)
        behind = only_reader.get(behind.out)
    if pools and isinstance(step, Convolve) and isinstance(behind, MaxPool) and behind == MaxPool(behind.out, behind.x):
        pool = True
        names.append(behind.out)
    # the value that it gives has the name of the last step that it takes along
    return Stored(names[-1], step, affine, added, low, high, pool), set(names[1:])

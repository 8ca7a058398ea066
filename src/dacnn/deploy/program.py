"""The Program: a trained network as a flat, printable list of steps and the tensors that they name. Pure data.

Every back end reads this and nothing else. A step takes values and gives one value; values are named once. The tensors are
those that the network stores: a kernel that several layers read is one tensor that several steps name, and is never scaled:
what batch norm does stands behind the convolution, as a scale and a shift. A kernel that is an expression stays one.

Equal runs of steps may stand in a `Loop`. Inside it, tensors that differ from turn to turn are rows of tables, and values
that go from one turn to the next are carried. What only some turns do stands in a `Branch`.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dacnn.networks.plan import Input

# N images, C channels, H rows, W columns, O output channels, I input channels, T templates, R x S tiles, F features

Tensors = Mapping[str, NDArray[np.float32]]
ActivationKind = Literal["relu", "clip", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "tanh"]
# name of the value that every program begins with: uint8 images, N x H x W x C
IMAGES = "images"


@dataclass(frozen=True)
class Row:
    """A row of a table: that of the current turn.

    Turns of a loop are numbered from its first one to its last, through all times that it is entered. Within a branch,
    the turns in which it runs are numbered.

    Attributes:
        table: Name of a tensor whose first dimension counts the turns.
    """

    table: str

    def __str__(self) -> str:
        return f"{self.table}[turn]"


# a tensor, or the row of one that belongs to the current turn
Reference = str | Row


@dataclass(frozen=True)
class StoredKernel:
    """A tensor as it is stored: (O, I, H, W) of a convolution, (O, I) of a linear step."""

    tensor: Reference

    def __str__(self) -> str:
        return str(self.tensor)


@dataclass(frozen=True)
class CombinedKernel:
    """The templates of the bank `tensor`, shape (T, O, I, ...), each times its coefficient, shape (T,), added up."""

    tensor: Reference
    coefficients: Reference

    def __str__(self) -> str:
        return f"combine({self.tensor}, {self.coefficients})"


@dataclass(frozen=True)
class RepeatedKernel:
    """The small kernel `tensor`, w, tiled: tile (r, s) is gain * w / (1 + exp(steepness * w)); both are of shape (R, S)."""

    tensor: Reference
    gain: Reference
    steepness: Reference

    def __str__(self) -> str:
        return f"repeat({self.tensor}, {self.gain}, {self.steepness})"


# in each, `tensor` is what other steps may read too
Kernel = StoredKernel | CombinedKernel | RepeatedKernel


@dataclass(frozen=True)
class Normalize:
    """uint8 images, N x H x W x C -> floats, N x C x H x W: x / (255 * std) - mean / std, as the program's input says."""

    out: str
    x: str

    def __str__(self) -> str:
        return f"normalize {self.x}"


@dataclass(frozen=True)
class Convolve:
    """Convolution without bias. Padding is of zeros: above, left, below, right."""

    out: str
    x: str
    kernel: Kernel
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        return f"convolve {self.x} with {self.kernel}{_attributes(self)}"


@dataclass(frozen=True)
class Linear:
    """Matrix product without bias: N x I -> N x O."""

    out: str
    x: str
    kernel: Kernel

    def __str__(self) -> str:
        return f"multiply {self.x} by {self.kernel}"


@dataclass(frozen=True)
class ScaleShift:
    """Channel by channel: x * scale + shift, each of shape (C,) and either of them left out."""

    out: str
    x: str
    scale: Reference | None
    shift: Reference | None

    def __str__(self) -> str:
        return f"{self.x}{f' * {self.scale}' * (self.scale is not None)}{f' + {self.shift}' * (self.shift is not None)}"


@dataclass(frozen=True)
class Activate:
    """A function of every value by itself; `clip` keeps it between `low` and `high`."""

    out: str
    x: str
    kind: ActivationKind = "relu"
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.kind} {self.x}{_attributes(self)}"


@dataclass(frozen=True)
class MaxPool:
    """The largest of each window. What is padded, above, left, below and right, is never the largest."""

    out: str
    x: str
    size: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def __str__(self) -> str:
        return f"max-pool {self.x}{_attributes(self)}"


@dataclass(frozen=True)
class AveragePool:
    """The mean of each window, without padding."""

    out: str
    x: str
    size: tuple[int, int] = (2, 2)
    stride: tuple[int, int] = (2, 2)

    def __str__(self) -> str:
        return f"average-pool {self.x}{_attributes(self)}"


@dataclass(frozen=True)
class GlobalAverage:
    """The mean over all pixels: N x C x H x W -> N x C x 1 x 1."""

    out: str
    x: str

    def __str__(self) -> str:
        return f"average of {self.x}"


@dataclass(frozen=True)
class Flatten:
    """N x C x H x W -> N x F, in that order."""

    out: str
    x: str

    def __str__(self) -> str:
        return f"flatten {self.x}"


@dataclass(frozen=True)
class Rotate:
    """Channel c becomes what channel c + `by` was, around the end."""

    out: str
    x: str
    by: int

    def __str__(self) -> str:
        return f"rotate the channels of {self.x} by {self.by}"


@dataclass(frozen=True)
class Add:
    """Sum of two values of one shape."""

    out: str
    x: str
    y: str

    def __str__(self) -> str:
        return f"{self.x} + {self.y}"


@dataclass(frozen=True)
class Multiply:
    """Product of two values of one shape, or of N x C x H x W and N x C x 1 x 1."""

    out: str
    x: str
    y: str

    def __str__(self) -> str:
        return f"{self.x} * {self.y}"


@dataclass(frozen=True)
class Carried:
    """A value that goes from one turn of a loop to the next.

    Attributes:
        name: What it is called inside the loop, and behind it, where it is what the last turn made of it.
        start: The value that it is in the first turn, of outside the loop.
        next: The value, of the body, that it is in the next turn.
    """

    name: str
    start: str
    next: str


@dataclass(frozen=True)
class Loop:
    """Steps that run several times.

    Attributes:
        counts: How many turns it makes, for each time that it is entered. A loop that stands in none is entered once.
        carried: What goes from turn to turn. Only these are known behind the loop.
        steps: The body.
    """

    counts: tuple[int, ...]
    carried: tuple[Carried, ...]
    steps: tuple["Step", ...]

    def __str__(self) -> str:
        return f"loop {', '.join(map(str, self.counts))} times"


@dataclass(frozen=True)
class Branch:
    """Steps of a loop's body that run in some turns only.

    Attributes:
        out: Name of what it gives.
        runs: For every turn of the loop that it stands in, whether the steps run.
        value: What it gives where they do: a value of its steps, or of before.
        otherwise: What it gives where they do not.
        steps: The steps; there may be none.
    """

    out: str
    runs: tuple[bool, ...]
    value: str
    otherwise: str
    steps: tuple["Step", ...]

    def __str__(self) -> str:
        return f"in turns {', '.join(str(turn) for turn, runs in enumerate(self.runs) if runs)}"


# what gives one value from others
Operation = (
    Normalize
    | Convolve
    | Linear
    | ScaleShift
    | Activate
    | MaxPool
    | AveragePool
    | GlobalAverage
    | Flatten
    | Rotate
    | Add
    | Multiply
)
Step = Operation | Loop | Branch
# those that read a kernel
KernelStep = Convolve | Linear


def _attributes(step: object) -> str:
    """Fields of numbers that are not at their defaults."""
    words = []
    for item in dataclasses.fields(step):  # type: ignore[arg-type]
        value = getattr(step, item.name)
        if isinstance(value, int | float | tuple) and value != item.default:
            words.append(f", {item.name} {'x'.join(map(str, value)) if isinstance(value, tuple) else value}")
    return "".join(words)


def operands(step: Operation) -> tuple[str, ...]:
    """The values that an operation takes."""
    return (step.x, step.y) if isinstance(step, Add | Multiply) else (step.x,)


def references(step: Operation) -> tuple[Reference, ...]:
    """The tensors that an operation reads."""
    if isinstance(step, KernelStep):
        kernel = step.kernel
        return tuple(getattr(kernel, item.name) for item in dataclasses.fields(kernel))
    if isinstance(step, ScaleShift):
        return tuple(tensor for tensor in (step.scale, step.shift) if tensor is not None)
    return ()


@dataclass(frozen=True, eq=False)
class Program:
    """A network as steps.

    Attributes:
        name: What the network is called.
        input: What the images are.
        classes: Names of the classes, one for each logit.
        steps: What is done, beginning with `Normalize` of the value `images`.
        result: Name of the value that holds the logits, N x K.
        tensors: What the steps name, float32, each stored once.
        any_size: Whether the steps hold for images of other sizes too, as far as they take them; a foreign network may have
            computed from the size how it pads and pools.
    """

    name: str
    input: Input
    classes: tuple[str, ...]
    steps: tuple[Step, ...]
    result: str
    tensors: Tensors
    any_size: bool = True

    def operations(self) -> Iterator[Operation]:
        """Every operation, those in loops and branches once."""
        return _operations(self.steps)

    def readers(self) -> dict[str, int]:
        """How many operations name each tensor that is stored for kernels, tables aside."""
        stored = (step.kernel.tensor for step in self.operations() if isinstance(step, KernelStep))
        return dict(Counter(tensor for tensor in stored if isinstance(tensor, str)))

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __str__(self) -> str:
        of = self.input
        head = (
            f"{self.name}: uint8 images of {of.height}x{of.width}x{of.channels} (fit: {of.fit}"
            f"{', no other size' * (not self.any_size)}) -> "
            f"{len(self.classes)} classes; {self.stored_bytes:,} bytes in {len(self.tensors)} tensors"
        )
        return "\n".join([head, *_lines(self.steps, 1), f"  -> {self.result}"])


def metadata(of: Input, classes: tuple[str, ...], **more: str) -> str:
    """What an exported file says of the images that it takes and of its classes.

    Args:
        of: The images: size, channels, mean, standard deviation, fit.
        classes: Names of the classes.
        **more: Further words, by name.

    Returns:
        JSON; sorted, so that the same network gives the same bytes.
    """
    described = {"classes": list(classes), "input": dataclasses.asdict(of), **more}
    return json.dumps(described, sort_keys=True, ensure_ascii=False)


def _operations(steps: tuple[Step, ...]) -> Iterator[Operation]:
    for step in steps:
        if isinstance(step, Loop | Branch):
            yield from _operations(step.steps)
        else:
            yield step


def _lines(steps: tuple[Step, ...], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for step in steps:
        if isinstance(step, Loop):
            yield f"{indent}{step}, {', '.join(f'{one.name} from {one.start}' for one in step.carried)}:"
            yield from _lines(step.steps, depth + 1)
            yield f"{indent}  next {', '.join(f'{one.name} = {one.next}' for one in step.carried)}"
        elif isinstance(step, Branch):
            yield f"{indent}{step.out} = {step.otherwise}, but {step}:"
            yield from _lines(step.steps, depth + 1)
            yield f"{indent}  {step.out} = {step.value}"
        else:
            yield f"{indent}{step.out} = {step}"

"""Sizes of what a flat Program computes: the shape of every value, the memory that they take, the multiply-adds."""

import math
from collections.abc import Sequence

from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    Branch,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Kernel,
    Linear,
    Loop,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Program,
    Reference,
    RepeatedKernel,
    Row,
    ScaleShift,
    Tensors,
    operands,
)
from dacnn.errors import DeployError

# N images, C channels, H rows, W columns, O output channels, I input channels, F features

Shape = tuple[int, ...]
# these write over what they take where nobody reads it afterwards, or in the store of the convolution before them
_IN_PLACE = (ScaleShift, Activate, Add, Multiply)


def tensor_shape(reference: Reference, tensors: Tensors) -> Shape:
    """Shape of a tensor, or of one row of a table."""
    return tensors[reference.table].shape[1:] if isinstance(reference, Row) else tensors[reference].shape


def kernel_shape(kernel: Kernel, tensors: Tensors) -> Shape:
    """Shape of an evaluated kernel.

    Args:
        kernel: How it is read.
        tensors: Those of the Program.

    Returns:
        (O, I, ...).
    """
    stored = tensor_shape(kernel.tensor, tensors)
    if isinstance(kernel, CombinedKernel):
        return stored[1:]
    if isinstance(kernel, RepeatedKernel):
        rows, columns = tensor_shape(kernel.gain, tensors)
        return (rows * stored[0], columns * stored[1], *stored[2:])
    return stored


def flat_steps(program: Program) -> tuple[Operation, ...]:
    """The steps of a flat Program.

    Raises:
        DeployError: The Program has loops.
    """
    operations = tuple(step for step in program.steps if not isinstance(step, Loop | Branch))
    if len(operations) != len(program.steps):
        raise DeployError(f"program '{program.name}' has loops: expected the flat one, from before they were rolled")
    return operations


def shapes(program: Program, batch: int = 1, height: int | None = None, width: int | None = None) -> dict[str, Shape]:
    """Shape of every value of a flat Program.

    Args:
        program: The Program.
        batch: Images N.
        height: Rows of an image; None: as the Program's input says.
        width: Columns of an image; None: likewise.

    Returns:
        By name of the value: N x H x W x C of the images, N x C x H x W or N x F of all others.

    Raises:
        DeployError: The image is too small, or a linear step does not fit images of this size; or the Program has loops.
    """
    of = program.input
    size = (of.height if height is None else height, of.width if width is None else width)
    if min(batch, *size) < 1:
        raise DeployError(f"{batch} images of {size[0]}x{size[1]}: expected 1 or more of each")
    found: dict[str, Shape] = {IMAGES: (batch, *size, of.channels)}
    for step in flat_steps(program):
        shape = _shape(step, [found[name] for name in operands(step)], program.tensors)
        if shape is None or min(shape) < 1:
            taken = " and ".join(" x ".join(map(str, found[name])) for name in operands(step))
            raise DeployError(
                f"program '{program.name}' cannot take images of {size[0]}x{size[1]}: step '{step.out} = {step}' gets {taken}: "
                f"expected images of {of.height}x{of.width}"
            )
        found[step.out] = shape
    return found


def _shape(step: Operation, taken: Sequence[Shape], tensors: Tensors) -> Shape | None:
    """Shape of what a step gives; None where it cannot take such values."""
    x = taken[0]
    match step:
        case Normalize():
            return (x[0], x[3], x[1], x[2])
        case Convolve():
            outputs, _, *size = kernel_shape(step.kernel, tensors)
            reach = [1 + (side - 1) * apart for side, apart in zip(size, step.dilation, strict=True)]
            return (x[0], outputs, *windows(x, reach, step.stride, step.padding))
        case MaxPool():
            return (*x[:2], *windows(x, step.size, step.stride, step.padding))
        case AveragePool():
            return (*x[:2], *windows(x, step.size, step.stride, (0, 0, 0, 0)))
        case GlobalAverage():
            return (*x[:2], 1, 1)
        case Flatten():
            return (x[0], math.prod(x[1:]))
        case Linear():
            outputs, inputs = kernel_shape(step.kernel, tensors)
            return (x[0], outputs) if x[1] == inputs else None
        case Add():
            return x if x == taken[1] else None
        case Multiply():
            return x if taken[1] in (x, (*x[:2], 1, 1)) else None
    return x


def windows(x: Shape, size: Sequence[int], stride: Sequence[int], padding: tuple[int, int, int, int]) -> list[int]:
    """How many windows there are, from above to below and from left to right.

    Args:
        x: N x C x H x W.
        size: Rows and columns of a window.
        stride: Its steps.
        padding: Above, left, below, right.

    Returns:
        Their rows and columns; 0 where none fits.
    """
    sides = (x[2] + padding[0] + padding[2], x[3] + padding[1] + padding[3])
    # not by the quotient alone, which rounds -1 / 2 down, too
    return [(side - reach) // apart + 1 if side >= reach else 0 for side, reach, apart in zip(sides, size, stride, strict=True)]


def live_bytes(
    program: Program, batch: int = 1, bytes_per_value: int = 4, height: int | None = None, width: int | None = None
) -> int:
    """The largest set of activations that must be in memory at one time while the steps run in their order.

    A value lives from its step to its last reader; what a step takes and what it gives live at the same time. Scale and shift,
    activations, sums and products write over a value of the same shape that nobody reads afterwards, and flattening gives
    the same memory in another shape: these need no second buffer. Padding, scratch and kernels are not counted.

    Args:
        program: The Program, flat.
        batch: Images N.
        bytes_per_value: Of a number; the uint8 images are 1 each.
        height: Rows of an image; None: as the Program's input says.
        width: Columns of an image; None: likewise.

    Returns:
        Bytes.

    Raises:
        DeployError: As for `shapes`.
    """
    found = shapes(program, batch, height, width)
    steps = flat_steps(program)
    last = {name: index for index, step in enumerate(steps) for name in operands(step)} | {program.result: len(steps)}
    # values that are one memory, by the first of them
    memory = {IMAGES: IMAGES}
    held = {IMAGES: math.prod(found[IMAGES])}
    until = {IMAGES: last[IMAGES]}
    largest = held[IMAGES]
    for index, step in enumerate(steps):
        reused = _written_over(step, index, found, memory, until)
        buffer = memory[reused] if reused is not None else step.out
        memory[step.out] = buffer
        if reused is None:
            held[buffer] = math.prod(found[step.out]) * bytes_per_value
        until[buffer] = max(until.get(buffer, index), last.get(step.out, index))
        largest = max(largest, sum(held.values()))
        held = {name: size for name, size in held.items() if until[name] > index}
    return largest


def _written_over(
    step: Operation, index: int, found: dict[str, Shape], memory: dict[str, str], until: dict[str, int]
) -> str | None:
    """The operand whose memory a step's value takes, if any."""
    if isinstance(step, Flatten):
        return step.x
    if not isinstance(step, _IN_PLACE):
        return None
    free = (name for name in operands(step) if until[memory[name]] <= index and found[name] == found[step.out])
    return next(free, None)


def macs(program: Program) -> int:
    """Multiply-adds of a flat Program's convolutions and linear steps for one image of the input's size.

    Args:
        program: The Program.

    Raises:
        DeployError: As for `shapes`.
    """
    found = shapes(program)
    return sum(
        math.prod(kernel_shape(step.kernel, program.tensors)) * math.prod(found[step.out][2:])
        for step in flat_steps(program)
        if isinstance(step, Convolve | Linear)
    )

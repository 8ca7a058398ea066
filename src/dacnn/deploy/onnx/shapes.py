"""The shape of every value of a Program, rolled or not, as far as it is known before an image is seen."""

import math
from collections.abc import Mapping

from dacnn.deploy.program import (
    IMAGES,
    AveragePool,
    Branch,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    Loop,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Program,
    Step,
    Tensors,
    operands,
)
from dacnn.deploy.shapes import kernel_shape

# N images, C channels, H rows, W columns, O output channels, I input channels, T templates, R x S tiles, F features

# None: not known; the number of images never is
Shape = tuple[int | None, ...]
Shapes = dict[str, Shape]


def shapes_of(program: Program, images: Shape) -> Shapes:
    """Follow a program's values through its steps.

    Args:
        program: The program, rolled or not.
        images: Shape of what `Normalize` gives: N x C x H x W.

    Returns:
        Shapes by the names of the values. What a loop carries has the shape that all its turns have in common.
    """
    shapes: Shapes = {IMAGES: images}
    _follow(program.steps, shapes, program.tensors)
    return shapes


def depends_on_image_size(program: Program) -> bool:
    """Whether the program takes images of one size only: it was made for that, or flattens what has several pixels."""
    if not program.any_size:
        return True
    shapes = shapes_of(program, (None, program.input.channels, None, None))
    return any(isinstance(step, Flatten) and shapes[step.x][2:] != (1, 1) for step in program.operations())


def _follow(steps: tuple[Step, ...], shapes: Shapes, tensors: Tensors) -> None:
    for step in steps:
        if isinstance(step, Loop):
            _follow_loop(step, shapes, tensors)
        elif isinstance(step, Branch):
            _follow(step.steps, shapes, tensors)
            shapes[step.out] = _common(shapes[step.value], shapes[step.otherwise])
        else:
            shapes[step.out] = _result(step, shapes, tensors)


def _follow_loop(loop: Loop, shapes: Shapes, tensors: Tensors) -> None:
    carried = {one.name: shapes[one.start] for one in loop.carried}
    while True:
        shapes.update(carried)
        _follow(loop.steps, shapes, tensors)
        # each round some size becomes unknown, or nothing changes any more
        found = {one.name: _common(carried[one.name], shapes[one.next]) for one in loop.carried}
        if found == carried:
            return
        carried = found


def _common(first: Shape, second: Shape) -> Shape:
    return tuple(a if a == b else None for a, b in zip(first, second, strict=True))


def _result(step: Operation, shapes: Mapping[str, Shape], tensors: Tensors) -> Shape:
    x = shapes[step.x]
    match step:
        case Normalize():
            return x
        case Convolve():
            out, _, *size = kernel_shape(step.kernel, tensors)
            reach = tuple(1 + (side - 1) * apart for side, apart in zip(size, step.dilation, strict=True))
            return (None, out, *_slid(x[2:], reach, step.stride, step.padding))
        case Linear():
            return (None, kernel_shape(step.kernel, tensors)[0])
        case MaxPool():
            return (*x[:2], *_slid(x[2:], step.size, step.stride, step.padding))
        case AveragePool():
            return (*x[:2], *_slid(x[2:], step.size, step.stride, (0, 0, 0, 0)))
        case GlobalAverage():
            return (*x[:2], 1, 1)
        case Flatten():
            sizes = [size for size in x[1:] if size is not None]
            return (None, math.prod(sizes) if len(sizes) == len(x) - 1 else None)
        case Multiply():
            # the other factor may be N x C x 1 x 1
            return x if x[2:] != (1, 1) else shapes[operands(step)[1]]
    return x


def _slid(sides: Shape, reach: tuple[int, ...], stride: tuple[int, int], padding: tuple[int, int, int, int]) -> Shape:
    """Sides of the image that a window gives, slid over one."""
    around = (padding[0] + padding[2], padding[1] + padding[3])
    return tuple(
        None if side is None else (side + more - window) // step + 1
        for side, more, window, step in zip(sides, around, reach, stride, strict=True)
    )

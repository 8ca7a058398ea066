"""A program in PyTorch, step by step: what calibration looks at, and what learns to be rounded."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dacnn.deploy.fusion import Stored, values_of
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    CombinedKernel,
    Convolve,
    Flatten,
    GlobalAverage,
    Kernel,
    Linear,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Reference,
    RepeatedKernel,
    Rotate,
    ScaleShift,
    StoredKernel,
)
from dacnn.networks.plan import Input
from dacnn.sharing.anchors import repeat_kernel

# N images, C channels, H rows, W columns

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}
Tensors = Mapping[str, Tensor]
# from a value's name and numbers to the numbers that those behind it get
See = Callable[[str, Tensor], Tensor]


def run(
    steps: Sequence[Stored | Operation],
    result: str,
    images: Tensor,
    input: Input,
    tensors: Tensors,
    see: See = lambda name, x: x,
) -> Tensor:
    """Run a program.

    Args:
        steps: From `summed`.
        result: Name of the logits.
        images: uint8, shape (N, H, W, C), or normalised floats, shape (N, C, H, W).
        input: What the images are.
        tensors: What the steps name.
        see: Called with what every step but a reshape gives; what it returns goes on.

    Returns:
        Logits, shape (N, K).
    """
    last = {name: index for index, step in enumerate(steps) for name in values_of(step)}
    values = {IMAGES: images}
    for index, step in enumerate(steps):
        taken = [values[name] for name in values_of(step)]
        for name in values_of(step):
            if last[name] == index and name != result:
                values.pop(name, None)
        values[step.out] = see(step.out, _give(step, taken, input, tensors))
        del taken
    return values[result]


def _give(step: Stored | Operation, taken: list[Tensor], input: Input, tensors: Tensors) -> Tensor:
    if not isinstance(step, Stored):
        return _operation(step, taken, input, tensors)
    y = _operation(step.step, taken, input, tensors)
    if step.affine is not None:
        y = _scale_shift(step.affine, y, tensors)
    if step.added is not None:
        y = y + taken[-1]
    if step.low == 0 and math.isinf(step.high):
        return F.relu(y)
    return y if math.isinf(step.low) and math.isinf(step.high) else y.clamp(step.low, step.high)


def _operation(step: Operation, taken: list[Tensor], input: Input, tensors: Tensors) -> Tensor:
    x = taken[0]
    match step:
        case Normalize():
            return normalized(x, input) if x.dtype == torch.uint8 else x
        case Convolve():
            above, left, below, right = step.padding
            if (above, left) != (below, right):
                x, above, left = F.pad(x, (left, right, above, below)), 0, 0
            weight = kernel(step.kernel, tensors)
            return F.conv2d(x, weight, None, step.stride, (above, left), step.dilation, step.groups)
        case Linear():
            return F.linear(x, kernel(step.kernel, tensors))
        case ScaleShift():
            return _scale_shift(step, x, tensors)
        case Activate(kind="clip"):
            return x.clamp(step.low, step.high)
        case Activate():
            return ACTIVATIONS[step.kind](x)
        case MaxPool():
            above, left, below, right = step.padding
            return F.max_pool2d(F.pad(x, (left, right, above, below), value=-math.inf), step.size, step.stride)
        case AveragePool():
            return F.avg_pool2d(x, step.size, step.stride)
        case GlobalAverage():
            return x.mean((2, 3), keepdim=True)
        case Flatten():
            return x.flatten(1)
        case Rotate():
            return torch.roll(x, -step.by, 1)
        case Add():
            return x + taken[1]
        case Multiply():
            return x * taken[1]


def normalized(images: Tensor, input: Input) -> Tensor:
    """uint8, N x H x W x C -> floats, N x C x H x W."""
    mean, std = (torch.tensor(numbers, device=images.device) for numbers in (input.mean, input.std))
    x: Tensor = images / (255 * std) - mean / std
    return x.permute(0, 3, 1, 2)


def _scale_shift(step: ScaleShift, x: Tensor, tensors: Tensors) -> Tensor:
    channels = (1, -1) + (1,) * (x.ndim - 2)
    if step.scale is not None:
        x = x * tensors[named(step.scale)].view(channels)
    return x if step.shift is None else x + tensors[named(step.shift)].view(channels)


def kernel(kernel: Kernel, tensors: Tensors) -> Tensor:
    """A kernel, evaluated now."""
    stored = tensors[named(kernel.tensor)]
    match kernel:
        case StoredKernel():
            return stored
        case CombinedKernel():
            combined: Tensor = torch.tensordot(tensors[named(kernel.coefficients)], stored, 1)
            return combined
        case RepeatedKernel():
            return repeat_kernel(stored, tensors[named(kernel.gain)], tensors[named(kernel.steepness)])


def named(reference: Reference) -> str:
    """Name of a tensor of a flat program."""
    assert isinstance(reference, str), "a row of a table in a program without loops"
    return reference

"""A Program, step by step in NumPy and float64: slow and obvious, what every back end is compared with."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
    Program,
    Reference,
    Rotate,
    Row,
    ScaleShift,
    StoredKernel,
)

# N images, C channels, H rows, W columns, O output channels, I input channels

Array = NDArray[Any]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "hardswish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2))),
    "tanh": np.tanh,
}


def run(program: Program, images: Array) -> Array:
    """Logits, N x K, in float64.

    Args:
        program: The program, rolled or not.
        images: uint8, N x H x W x C, or normalised floats, N x C x H x W.
    """
    run = _Run(program)
    run.values[IMAGES] = images
    run.steps(program.steps, turn=None)
    return run.values[program.result]


class _Run:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.values: dict[str, Array] = {}
        self.entered = Counter[int]()  # loops, by identity: how often
        self.turns = Counter[int]()  # loops and branches: how many turns they have made

    def tensor(self, reference: Reference, turn: int | None) -> Array:
        if isinstance(reference, Row):
            assert turn is not None
            return self.program.tensors[reference.table][turn].astype(np.float64)
        return self.program.tensors[reference].astype(np.float64)

    def kernel(self, kernel: Kernel, turn: int | None) -> Array:
        stored = self.tensor(kernel.tensor, turn)
        if isinstance(kernel, StoredKernel):
            return stored
        if isinstance(kernel, CombinedKernel):
            return np.tensordot(self.tensor(kernel.coefficients, turn), stored, axes=1)
        gain, steepness = self.tensor(kernel.gain, turn), self.tensor(kernel.steepness, turn)
        rows = [
            np.concatenate([g * stored / (1 + np.exp(s * stored)) for g, s in zip(*pair, strict=True)], axis=1)
            for pair in zip(gain, steepness, strict=True)
        ]
        return np.concatenate(rows, axis=0)

    def steps(self, steps: tuple[Any, ...], turn: int | None) -> None:
        for step in steps:
            if isinstance(step, Loop):
                self.loop(step)
            elif isinstance(step, Branch):
                assert turn is not None and len(step.runs) > turn
                if step.runs[turn]:
                    self.steps(step.steps, self.turns[id(step)])
                    self.turns[id(step)] += 1
                self.values[step.out] = self.values[step.value if step.runs[turn] else step.otherwise]
            else:
                self.values[step.out] = self.operation(step, turn)

    def loop(self, loop: Loop) -> None:
        now = {one.name: self.values[one.start] for one in loop.carried}
        for _ in range(loop.counts[self.entered[id(loop)]]):
            self.values |= now
            self.steps(loop.steps, self.turns[id(loop)])
            self.turns[id(loop)] += 1
            now = {one.name: self.values[one.next] for one in loop.carried}
        self.entered[id(loop)] += 1
        self.values |= now

    def operation(self, step: Any, turn: int | None) -> Array:
        x = self.values[step.x]
        match step:
            case Normalize():
                return x if x.dtype != np.uint8 else self.normalize(x)
            case Convolve():
                return convolve(x, self.kernel(step.kernel, turn), step)
            case Linear():
                return x @ self.kernel(step.kernel, turn).T
            case ScaleShift():
                channels = (1, -1) + (1,) * (x.ndim - 2)
                scaled = x if step.scale is None else x * self.tensor(step.scale, turn).reshape(channels)
                return scaled if step.shift is None else scaled + self.tensor(step.shift, turn).reshape(channels)
            case Activate(kind="clip"):
                return np.clip(x, step.low, step.high)
            case Activate():
                return ACTIVATIONS[step.kind](x)
            case MaxPool():
                return windows(padded(x, step.padding, -np.inf), step.size, step.stride, (1, 1)).max((-2, -1))
            case AveragePool():
                return windows(x, step.size, step.stride, (1, 1)).mean((-2, -1))
            case GlobalAverage():
                return x.mean((2, 3), keepdims=True)
            case Flatten():
                return x.reshape(len(x), -1)
            case Rotate():
                return np.roll(x, -step.by, axis=1)
            case Add():
                return x + self.values[step.y]
            case Multiply():
                return x * self.values[step.y]
        raise AssertionError(f"no such step: {step}")

    def normalize(self, images_nhwc: Array) -> Array:
        mean, std = (np.array(numbers) for numbers in (self.program.input.mean, self.program.input.std))
        return ((images_nhwc / 255 - mean) / std).transpose(0, 3, 1, 2)


def padded(x: Array, padding: tuple[int, int, int, int], value: float) -> Array:
    above, left, below, right = padding
    return np.pad(x, ((0, 0), (0, 0), (above, below), (left, right)), constant_values=value)


def windows(x: Array, size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Array:
    """N x C x H' x W' x size[0] x size[1]: what each output pixel sees."""
    reach = [1 + (side - 1) * apart for side, apart in zip(size, dilation, strict=True)]
    seen = np.lib.stride_tricks.sliding_window_view(x, reach, axis=(2, 3))
    return seen[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]


def convolve(x: Array, kernel: Array, step: Convolve) -> Array:
    seen = windows(padded(x, step.padding, 0.0), kernel.shape[2:], step.stride, step.dilation)
    inputs, outputs = np.split(seen, step.groups, axis=1), np.split(kernel, step.groups, axis=0)
    return np.concatenate(
        [np.einsum("nihwab,oiab->nohw", i, o, optimize=True) for i, o in zip(inputs, outputs, strict=True)], axis=1
    )

"""From a program and the ranges of its values to the integer program."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dacnn.deploy.fusion import Stored, Summing, summed, values_of
from dacnn.deploy.integers.floats import ACTIVATIONS, named
from dacnn.deploy.integers.kernels import IntegerKernels, Read
from dacnn.deploy.integers.program import IntegerProgram, IntegerStep, Lookup, Sum
from dacnn.deploy.integers.stores import Affine, make_store, make_wide_store
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Add,
    AveragePool,
    Flatten,
    GlobalAverage,
    KernelStep,
    MaxPool,
    Multiply,
    Normalize,
    Operation,
    Program,
    Rotate,
    ScaleShift,
)
from dacnn.deploy.shapes import shapes
from dacnn.errors import DeployError
from dacnn.quantization import VALUE_LIMIT, Quantity, quantity

# C channels, O output channels, I input channels, T templates, R x S tiles

Floats = NDArray[np.float64]
_LARGEST_SUM = 2**31 - 1


def quantize(program: Program, ranges: Mapping[str, tuple[float, float]]) -> IntegerProgram:
    """Turn a program into integers.

    Args:
        program: A flat one.
        ranges: Of its values, from `calibrate` or from a training that rounded them.

    Returns:
        The integer program.

    Raises:
        DeployError: A range is missing, or the sums of a step do not fit into 32 bits; or the program has loops.
    """
    return _Quantization(program, ranges).run()


class _Quantization:
    def __init__(self, program: Program, ranges: Mapping[str, tuple[float, float]]) -> None:
        self.program, self.ranges = program, ranges
        self.steps = summed(program)
        self.shapes = shapes(program)
        self.kernels = IntegerKernels(program)
        self.quantities = {IMAGES: Quantity(1.0, 0)}
        self.wide = _wide(self.steps, program.result)

    def run(self) -> IntegerProgram:
        steps = tuple(self._step(step) for step in self.steps)
        of, result = self.program, self.program.result
        found = {name: self.shapes[name] for name in (IMAGES, *(step.out for step in steps))}
        logit, tensors = self.quantities[result], self.kernels.tensors
        return IntegerProgram(of.name, of.input, of.classes, steps, result, logit, tensors, found)

    def _step(self, step: Stored | Operation) -> IntegerStep:
        match step:
            case Stored():
                return self._sum(step)
            case Activate():
                return self._lookup(step)
            case MaxPool() | Rotate() | Flatten():
                self.quantities[step.out] = self.quantities[step.x]
                return step
        raise AssertionError(f"no such step: {step}")

    def _ranged(self, name: str) -> Quantity:
        if name not in self.ranges:
            raise DeployError(
                f"program '{self.program.name}' has no range for value '{name}': calibrate it, or give its own ranges"
            )
        return quantity(*self.ranges[name])

    def _lookup(self, step: Activate) -> Lookup:
        before, behind = self.quantities[step.x], self._ranged(step.out)
        x = torch.from_numpy((np.arange(VALUE_LIMIT + 1) - before.zero) * before.scale)
        y = (x.clamp(step.low, step.high) if step.kind == "clip" else ACTIVATIONS[step.kind](x)).numpy()
        self.quantities[step.out] = behind
        table = np.clip(np.rint(y / behind.scale) + behind.zero, 0, VALUE_LIMIT).astype(np.uint8)
        return Lookup(step.out, step.x, table)

    def _sum(self, step: Stored) -> Sum:
        inner, x = step.step, self.quantities[step.step.x]
        read = self.kernels.read(inner) if isinstance(inner, KernelStep) else None
        other = self.quantities[inner.y] if isinstance(inner, Multiply) else None
        residual = inner.y if isinstance(inner, Add) else step.added
        unit = np.full(1, x.scale) if read is None else x.scale * read.scales
        if other is not None:
            unit = unit * other.scale
        scale, shift = self._affine(step)
        affine = Affine(
            unit / self._averaged(inner) * scale,
            shift,
            None if residual is None else self.quantities[residual],
            step.low,
            step.high,
            self._largest_sum(inner, read),
        )
        if step.out in self.wide:
            store, behind = make_wide_store(affine, residual)
        else:
            behind = self._ranged(step.out)
            store = make_store(affine, residual, behind)
        self.quantities[step.out] = behind
        return Sum(step.out, inner, x.zero, store, None if read is None else read.kernel, 0 if other is None else other.zero)

    def _averaged(self, step: Summing) -> int:
        """Pixels that a mean is taken of."""
        if isinstance(step, AveragePool):
            return math.prod(step.size)
        return math.prod(self.shapes[step.x][2:]) if isinstance(step, GlobalAverage) else 1

    def _largest_sum(self, step: Summing, read: Read | None) -> int:
        """What the sums of a step cannot exceed."""
        if isinstance(step, Multiply):
            return VALUE_LIMIT**2
        weights = self._averaged(step)
        if read is not None:
            weights = int(np.abs(read.weights.astype(np.int64)).reshape(len(read.weights), -1).sum(1).max())
        if VALUE_LIMIT * weights > _LARGEST_SUM:
            raise DeployError(
                f"program '{self.program.name}': sums of '{step.out} = {step}' do not fit into 32 bits: export it in float32"
            )
        return VALUE_LIMIT * weights

    def _affine(self, step: Stored) -> tuple[Floats, Floats]:
        """What the sums are multiplied by, and what is added; shapes (C,) or (1,)."""
        if isinstance(step.step, Normalize):
            mean, std = np.array(self.program.input.mean), np.array(self.program.input.std)
            return 1 / (255 * std), -mean / std
        affine = step.step if isinstance(step.step, ScaleShift) else step.affine
        if affine is None:
            return np.ones(1), np.zeros(1)
        scale, shift = (
            None if one is None else self.program.tensors[named(one)].astype(np.float64) for one in (affine.scale, affine.shift)
        )
        return np.ones(1) if scale is None else scale, np.zeros(1) if shift is None else shift


def _wide(steps: Sequence[Stored | Operation], result: str) -> set[str]:
    """Names of the values that are stored in int32: the logits, and what they are before they are reshaped."""
    made = {step.out: step for step in steps}
    names = {result}
    step = made[result]
    while isinstance(step, Flatten):
        step = made[step.x]
        names.add(step.out)
    readers = Counter(name for one in steps for name in values_of(one))
    # who else reads them wants eight bits
    alone = all(readers[name] == (name != result) for name in names)
    return names if isinstance(step, Stored) and alone else set()

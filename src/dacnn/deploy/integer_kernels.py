"""The kernels of a program in int8, and how each layer's is made of them."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dacnn.deploy.floats import named
from dacnn.deploy.integers import (
    SIGMOID,
    CombinedIntegers,
    Int8,
    IntegerKernel,
    RepeatedIntegers,
    StoredIntegers,
)
from dacnn.deploy.program import CombinedKernel, Kernel, KernelStep, Program, RepeatedKernel
from dacnn.quantization import KERNEL_LIMIT, exponent, kernel_scales, to_integers

# O output channels, I input channels, T templates, R x S tiles

Floats = NDArray[np.float64]
_INT32 = 2**31 - 1
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Read:
    """A kernel as a step reads it.

    Attributes:
        kernel: How it is made.
        weights: Its numbers, (O, I, ...).
        scales: What one step of them means, shape (O,).
    """

    kernel: IntegerKernel
    weights: Int8
    scales: Floats


class IntegerKernels:
    """The kernels of a program.

    Attributes:
        tensors: The int8 tensors that were read so far, by name.
    """

    def __init__(self, program: Program) -> None:
        """Know how each tensor is read."""
        self.program = program
        self.tensors: dict[str, Int8] = {}
        self._scales: dict[str, Floats] = {}
        kernels = [step.kernel for step in program.operations() if isinstance(step, KernelStep)]
        # a tile's table knows nothing of channels
        self._in_one_scale = {named(kernel.tensor) for kernel in kernels if isinstance(kernel, RepeatedKernel)}

    def read(self, kernel: Kernel) -> Read:
        """A kernel in integers."""
        name = named(kernel.tensor)
        stored = torch.from_numpy(self.program.tensors[name])
        is_bank = isinstance(kernel, CombinedKernel)
        if name not in self.tensors:
            # templates are added up, so they have one scale; channels come first
            by_channel = stored.transpose(0, 1) if is_bank else stored
            scales = kernel_scales(by_channel, name not in self._in_one_scale)
            integers = to_integers(by_channel, scales)
            self.tensors[name] = (integers.transpose(0, 1) if is_bank else integers).contiguous().numpy()
            self._scales[name] = scales.double().numpy()
        match kernel:
            case CombinedKernel():
                return self._combined(name, self._floats(named(kernel.coefficients)))
            case RepeatedKernel():
                return self._repeated(name, self._floats(named(kernel.gain)), self._floats(named(kernel.steepness)))
        return Read(StoredIntegers(name), self.tensors[name], self._scales[name])

    def _floats(self, name: str) -> Floats:
        return self.program.tensors[name].astype(np.float64)

    def _combined(self, name: str, coefficients: Floats) -> Read:
        bank = self.tensors[name]
        exact = np.tensordot(coefficients, bank.astype(np.float64), 1)
        unit = max(float(np.abs(exact).max()) / KERNEL_LIMIT, _SMALLEST)
        factors = coefficients / unit
        # 15 bits each; the shift of a kernel of large templates that cancel stays positive
        shift = min(max(15 - exponent(float(np.abs(factors).max())), 1), 30)
        k = np.clip(np.rint(np.ldexp(factors, shift)), -(2**15 - 1), 2**15 - 1).astype(np.int16)
        kernel = CombinedIntegers(name, k, shift)
        return Read(kernel, combined(bank, kernel), self._scales[name] * unit)

    def _repeated(self, name: str, gain: Floats, steepness: Floats) -> Read:
        base, (scale, *_) = self.tensors[name], self._scales[name]
        q = np.unique(base).astype(np.float64)
        # with the tiles of a row of them in one scale: their sums are added up
        curves = gain[..., None] * q / (1 + np.exp(np.clip(steepness[..., None] * scale * q, -700, 700)))
        units = np.maximum(np.abs(curves).max((1, 2)) / KERNEL_LIMIT, _SMALLEST)
        g = np.clip(np.rint(np.ldexp(gain / units[:, None], 14)), -_INT32, _INT32).astype(np.int32)
        # 1 / (1 + exp(x)) is the sigmoid of -x
        p = np.clip(np.rint(np.ldexp(-steepness * scale, 20)), -(2**23), 2**23).astype(np.int32)
        kernel = RepeatedIntegers(name, g, p)
        return Read(kernel, repeated(base, kernel), np.repeat(scale * units, len(base)))


def combined(bank: Int8, kernel: CombinedIntegers) -> Int8:
    """The kernel that a reader combines: (T, O, I, ...) -> (O, I, ...)."""
    total = np.tensordot(kernel.coefficients.astype(np.int64), bank.astype(np.int64), 1)
    return np.clip((total + (1 << (kernel.shift - 1))) >> kernel.shift, -KERNEL_LIMIT, KERNEL_LIMIT).astype(np.int8)


def tile_table(gain: int, steepness: int) -> Int8:
    """What the weights -128..127 of a base become in a tile, see `RepeatedIntegers`."""
    q = np.arange(-128, 128, dtype=np.int64)
    u = np.clip((q * steepness) >> 8, -(2**15), 2**15 - 1) + 2**15
    i, f = u >> 8, u & 255
    curve = SIGMOID.astype(np.int64)
    v = curve[i] + (((curve[i + 1] - curve[i]) * f + 128) >> 8)
    return np.clip((q * v * gain + (1 << 28)) >> 29, -KERNEL_LIMIT, KERNEL_LIMIT).astype(np.int8)


def repeated(base: Int8, kernel: RepeatedIntegers) -> Int8:
    """The kernel that a reader tiles: (O, I, ...) -> (R * O, S * I, ...)."""
    tables = [
        [tile_table(int(g), int(p)) for g, p in zip(*pair, strict=True)]
        for pair in zip(kernel.gain, kernel.steepness, strict=True)
    ]
    place = base.astype(np.int64) + 128
    return np.concatenate([np.concatenate([table[place] for table in row], 1) for row in tables], 0)

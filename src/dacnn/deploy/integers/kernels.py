"""The kernels of a program in int8, and how each layer's is made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dacnn.deploy.integers.floats import named
from dacnn.deploy.integers.program import (
    SIGMOID,
    CombinedIntegers,
    Int8,
    IntegerKernel,
    RepeatedIntegers,
    StoredIntegers,
)
from dacnn.deploy.program import CombinedKernel, Convolve, KernelStep, Program, RepeatedKernel
from dacnn.quantization import KERNEL_LIMIT, OWN_LIMIT, exponent, has_own, kernel_scales, own_weights, to_integers, without_own

# O output channels, I input channels, T templates, R x S tiles

Floats = NDArray[np.float64]
Integers = NDArray[Any]
_INT32 = 2**31 - 1
_SMALLEST = 1e-30


@dataclass(frozen=True)
class Read:
    """A kernel as a step reads it.

    Attributes:
        kernel: How it is made.
        weights: Its numbers, (O, I, ...), with those that stand apart in their place.
        scales: What one step of them means, shape (O,).
    """

    kernel: IntegerKernel
    weights: Integers
    scales: Floats


class IntegerKernels:
    """The kernels of a program.

    Attributes:
        tensors: The int8 tensors that were read so far, by name.
    """

    def __init__(self, program: Program) -> None:
        """Know how each tensor is read."""
        self.program = program
        self.tensors: dict[str, Integers] = {}
        self._scales: dict[str, Floats] = {}
        kernels = [step.kernel for step in program.operations() if isinstance(step, KernelStep)]
        # a tile's table knows nothing of channels
        self._in_one_scale = {named(kernel.tensor) for kernel in kernels if isinstance(kernel, RepeatedKernel)}

    def read(self, step: KernelStep) -> Read:
        """The kernel of a step in integers."""
        kernel, name = step.kernel, named(step.kernel.tensor)
        if name not in self.tensors:
            groups = step.groups if isinstance(step, Convolve) else 1
            self._store(name, isinstance(kernel, CombinedKernel), groups)
        match kernel:
            case CombinedKernel():
                return self._combined(name, self._floats(named(kernel.coefficients)))
            case RepeatedKernel():
                return self._repeated(name, self._floats(named(kernel.gain)), self._floats(named(kernel.steepness)))
        stored = StoredIntegers(name, self._own(name))
        return Read(stored, whole_kernel(self.tensors, stored), self._scales[name])

    def _own(self, name: str) -> str | None:
        return f"{name}.own" if f"{name}.own" in self.tensors else None

    def _store(self, name: str, is_bank: bool, groups: int) -> None:
        kernel = torch.from_numpy(self.program.tensors[name])
        per_channel = name not in self._in_one_scale
        apart = per_channel and has_own(tuple(kernel.shape[is_bank:]), groups)
        rest = without_own(kernel) if apart else kernel
        # templates are added up, so they have one scale; channels come first
        by_channel = rest.transpose(0, 1) if is_bank else rest
        scales = kernel_scales(by_channel, per_channel)
        integers = to_integers(by_channel, scales)
        self.tensors[name] = (integers.transpose(0, 1) if is_bank else integers).contiguous().numpy()
        self._scales[name] = scales.double().numpy()
        if apart:
            own = torch.round(own_weights(kernel) / scales).clamp(-OWN_LIMIT, OWN_LIMIT)
            self.tensors[f"{name}.own"] = own.to(torch.int16).contiguous().numpy()

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
        kernel = CombinedIntegers(name, k, shift, self._own(name))
        return Read(kernel, whole_kernel(self.tensors, kernel), self._scales[name] * unit)

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
        return Read(kernel, whole_kernel(self.tensors, kernel), np.repeat(scale * units, len(base)))


def combined(bank: Integers, kernel: CombinedIntegers, limit: int = KERNEL_LIMIT) -> Integers:
    """The kernel that a reader combines: (T, O, I, ...) -> (O, I, ...)."""
    total = np.tensordot(kernel.coefficients.astype(np.int64), bank.astype(np.int64), 1)
    rounded: Integers = (total + (1 << (kernel.shift - 1))) >> kernel.shift
    return np.clip(rounded, -limit, limit).astype(bank.dtype)


def with_own(weights: Int8, own: Integers) -> Integers:
    """The weights that stand apart put in their place: (O, O, H, W) and (O,) -> (O, O, H, W)."""
    whole, channels = weights.astype(np.int16), np.arange(len(weights))
    whole[channels, channels, weights.shape[2] // 2, weights.shape[3] // 2] = own
    return whole


def tile_table(gain: int, steepness: int) -> Int8:
    """What the weights -128..127 of a base become in a tile, see `RepeatedIntegers`."""
    q = np.arange(-128, 128, dtype=np.int64)
    u = np.clip((q * steepness) >> 8, -(2**15), 2**15 - 1) + 2**15
    i, f = u >> 8, u & 255
    curve = SIGMOID.astype(np.int64)
    v = curve[i] + (((curve[i + 1] - curve[i]) * f + 128) >> 8)
    rounded: Integers = (q * v * gain + (1 << 28)) >> 29
    return np.clip(rounded, -KERNEL_LIMIT, KERNEL_LIMIT).astype(np.int8)


def repeated(base: Int8, kernel: RepeatedIntegers) -> Int8:
    """The kernel that a reader tiles: (O, I, ...) -> (R * O, S * I, ...)."""
    tables = [
        [tile_table(int(g), int(p)) for g, p in zip(*pair, strict=True)]
        for pair in zip(kernel.gain, kernel.steepness, strict=True)
    ]
    place = base.astype(np.int64) + 128
    return np.concatenate([np.concatenate([table[place] for table in row], 1) for row in tables], 0)


def whole_kernel(tensors: Mapping[str, Integers], kernel: IntegerKernel) -> Integers:
    """A kernel as its step reads it, made of the stored tensors: (O, I, ...)."""
    stored = tensors[kernel.tensor]
    match kernel:
        case RepeatedIntegers():
            return repeated(stored, kernel)
        case StoredIntegers():
            return stored if kernel.own is None else with_own(stored, tensors[kernel.own])
        case CombinedIntegers():
            weights = combined(stored, kernel)
            return weights if kernel.own is None else with_own(weights, combined(tensors[kernel.own], kernel, OWN_LIMIT))

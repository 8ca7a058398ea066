"""An IntegerProgram, step by step in NumPy and int64: slow and obvious, what every form of it must equal bit for bit."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.integers.program import (
    CombinedIntegers,
    IntegerKernel,
    IntegerProgram,
    Lookup,
    RepeatedIntegers,
    StoredIntegers,
    Sum,
)
from dacnn.deploy.program import (
    AveragePool,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    MaxPool,
    Multiply,
    Rotate,
)
from interpreter import convolve, padded, windows

# N images, C channels, H rows, W columns, T templates

Array = NDArray[Any]


def run(program: IntegerProgram, images: Array) -> Array:
    """Logits, N x K, float32, of uint8 images N x H x W x C."""
    values: dict[str, Array] = {"images": images.transpose(0, 3, 1, 2).astype(np.int64)}
    for step in program.steps:
        made = operation(program, step, values)
        assert made.dtype == np.int64
        if step.out != program.result and program.result not in followers(program, step.out):
            assert made.min() >= 0 and made.max() <= 255
        values[step.out] = made
    return (program.logit.scale * (values[program.result] - program.logit.zero)).astype(np.float32)


def followers(program: IntegerProgram, name: str) -> set[str]:
    return {step.out for step in program.steps if isinstance(step, Flatten) and step.x == name}


def operation(program: IntegerProgram, step: Any, values: dict[str, Array]) -> Array:
    match step:
        case Sum():
            return stored(sums(program, step, values), step.store, values)
        case Lookup():
            return step.table[values[step.x]].astype(np.int64)
        case MaxPool():
            return windows(padded(values[step.x], step.padding, -1), step.size, step.stride, (1, 1)).max((-2, -1))
        case Rotate():
            return np.roll(values[step.x], -step.by, axis=1)
        case Flatten():
            return values[step.x].reshape(len(values[step.x]), -1)
    raise AssertionError(f"no such step: {step}")


def sums(program: IntegerProgram, step: Sum, values: dict[str, Array]) -> Array:
    x = values[step.step.x] - step.zero
    match step.step:
        case Convolve():
            assert step.kernel is not None
            return convolve(x, kernel(program, step.kernel), step.step)
        case Linear():
            assert step.kernel is not None
            return x @ kernel(program, step.kernel).T
        case AveragePool():
            return windows(x, step.step.size, step.step.stride, (1, 1)).sum((-2, -1))
        case GlobalAverage():
            return x.sum((2, 3), keepdims=True)
        case Multiply():
            return x * (values[step.step.y] - step.other_zero)
    return x


def stored(total: Array, store: Any, values: dict[str, Array]) -> Array:
    assert np.abs(total).max() < 2**31
    channels = (1, -1) + (1,) * (total.ndim - 2)
    t = total * store.m.astype(np.int64).reshape(channels) + (store.b.astype(np.int64).reshape(channels) << store.b_shift)
    if store.residual is not None:
        t = t + (values[store.residual] - store.residual_zero) * store.residual_m
    return np.clip(store.zero + ((t + (1 << (store.shift - 1))) >> store.shift), store.low, store.high)


def kernel(program: IntegerProgram, kernel: IntegerKernel) -> Array:
    tensor = program.tensors[kernel.tensor].astype(np.int64)
    if isinstance(kernel, StoredIntegers):
        return tensor if kernel.own is None else with_own(tensor, program.tensors[kernel.own])
    if isinstance(kernel, CombinedIntegers):
        weights = combination(tensor, kernel, 127)
        if kernel.own is None:
            return weights
        return with_own(weights, combination(program.tensors[kernel.own].astype(np.int64), kernel, 32767))
    assert isinstance(kernel, RepeatedIntegers)
    rows = [
        np.concatenate([tile(tensor, int(g), int(p)) for g, p in zip(*pair, strict=True)], axis=1)
        for pair in zip(kernel.gain, kernel.steepness, strict=True)
    ]
    return np.concatenate(rows, axis=0)


def combination(bank: Array, kernel: CombinedIntegers, limit: int) -> Array:
    total = sum(int(k) * template for k, template in zip(kernel.coefficients, bank, strict=True))
    return np.clip((np.asarray(total) + (1 << (kernel.shift - 1))) >> kernel.shift, -limit, limit)


def with_own(weights: Array, own: Array) -> Array:
    whole = weights.copy()
    for channel, weight in enumerate(own):
        assert whole[channel, channel, whole.shape[2] // 2, whole.shape[3] // 2] == 0
        whole[channel, channel, whole.shape[2] // 2, whole.shape[3] // 2] = weight
    return whole


SIGMOID = [round(2**15 / (1 + math.exp(-x / 16))) for x in range(-128, 129)]


def tile(base: Array, gain: int, steepness: int) -> Array:
    """Each weight by itself, in Python's own integers."""
    made = np.empty_like(base)
    for place, q in np.ndenumerate(base):
        u = min(max((int(q) * steepness) >> 8, -(2**15)), 2**15 - 1) + 2**15
        i, f = u // 256, u % 256
        v = SIGMOID[i] + (((SIGMOID[i + 1] - SIGMOID[i]) * f + 128) >> 8)
        made[place] = min(max((int(q) * v * gain + 2**28) >> 29, -127), 127)
    return made

"""An integer program in PyTorch: the bits that every compiled form gives, fast enough to measure what the integers cost."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dacnn.deploy.integers.kernels import whole_kernel
from dacnn.deploy.integers.program import IntegerProgram, IntegerStep, Lookup, Store, Sum
from dacnn.deploy.program import (
    IMAGES,
    AveragePool,
    Convolve,
    Flatten,
    GlobalAverage,
    Linear,
    MaxPool,
    Multiply,
    Rotate,
)

# N images, C channels, H rows, W columns, K classes

# whole numbers below this are exact in float32, and so are their sums
_EXACT = 2**24


class IntegerRun:
    """A callable on images. Values are floats that hold whole numbers: a float unit multiplies faster."""

    def __init__(self, program: IntegerProgram) -> None:
        """Evaluate the kernels."""
        self.program = program
        self._kernels = {step.out: self._kernel(step) for step in program.steps if isinstance(step, Sum) and step.kernel}

    def _kernel(self, step: Sum) -> Tensor:
        assert step.kernel is not None
        weights = torch.from_numpy(whole_kernel(self.program.tensors, step.kernel)).float()
        # 255 is the most that a number can be away from a zero
        exact = 255 * float(weights.flatten(1).abs().sum(1).max()) < _EXACT
        return weights if exact else weights.double()

    def __call__(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: uint8, shape (N, H, W, C).

        Returns:
            Logits, float32, shape (N, K).
        """
        program = self.program
        values = {IMAGES: images.permute(0, 3, 1, 2).float()}
        for step in program.steps:
            values[step.out] = self._step(step, values)
        return (values[program.result].double() - program.logit.zero).mul_(program.logit.scale).float()

    def _step(self, step: IntegerStep, values: dict[str, Tensor]) -> Tensor:
        match step:
            case Sum():
                return _store(self._sums(step, values), step.store, values)
            case Lookup():
                return torch.from_numpy(step.table).float()[values[step.x].long()]
            case MaxPool():
                above, left, below, right = step.padding
                return F.max_pool2d(F.pad(values[step.x], (left, right, above, below), value=-1), step.size, step.stride)
            case Rotate():
                return torch.roll(values[step.x], -step.by, 1)
            case Flatten():
                return values[step.x].flatten(1)

    def _sums(self, step: Sum, values: dict[str, Tensor]) -> Tensor:
        inner, x = step.step, values[step.step.x] - step.zero
        match inner:
            case Convolve():
                above, left, below, right = inner.padding
                x, kernel = F.pad(x, (left, right, above, below)), self._kernels[step.out]
                return F.conv2d(x.to(kernel.dtype), kernel, None, inner.stride, 0, inner.dilation, inner.groups)
            case Linear():
                kernel = self._kernels[step.out]
                return F.linear(x.to(kernel.dtype), kernel)
            case AveragePool():
                # a mean times its divisor: sums of whole numbers are exact, their mean need not be
                area = inner.size[0] * inner.size[1]
                return F.avg_pool2d(x.double(), inner.size, inner.stride, divisor_override=1) if area > 1 else x
            case GlobalAverage():
                return x.double().sum((2, 3), keepdim=True)
            case Multiply():
                return x * (values[inner.y] - step.other_zero)
        return x


def _store(sums: Tensor, store: Store, values: dict[str, Tensor]) -> Tensor:
    channels = (1, -1) + (1,) * (sums.ndim - 2)
    m, b = (torch.from_numpy(one.astype(np.int64)).view(channels) for one in (store.m, store.b))
    t = sums.long().mul_(m).add_((b << store.b_shift) + (1 << (store.shift - 1)))
    if store.residual is not None:
        t += (values[store.residual] - store.residual_zero).long() * store.residual_m
    stored = (t >> store.shift).add_(store.zero).clamp_(store.low, store.high)
    # float32 does not hold every int32
    return stored.float() if store.low >= 0 and store.high <= 255 else stored.double()

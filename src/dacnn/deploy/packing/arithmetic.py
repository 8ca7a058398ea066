"""Steps of a program in PyTorch, on one device: each as a function of the values that it takes.

Activations are in channels-last memory. On a CPU oneDNN convolves, with kernels that are packed once; kernels that are
expressions, and other devices, get PyTorch's own convolution; on a GPU what follows it is one pass.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dacnn.deploy.fusion import Stored, Task
from dacnn.deploy.packing import fused, onednn
from dacnn.deploy.packing.chains import Convolution, MaxPooling
from dacnn.deploy.program import (
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
    Tensors,
)
from dacnn.networks.plan import Input
from dacnn.sharing.anchors import repeat_kernel

# N images, C channels, H rows, W columns, O output channels, I input channels

Call = Callable[..., Tensor]
Factors = NDArray[np.float64]
_LAST = torch.channels_last
# a factor of 2 to minus this, or an addend this much larger than what it is added to, leaves float32 nothing to see
_UNSEEN_BITS = 100
_SMALLEST_EXPONENT = -126

_ACTIVATIONS: dict[str, Callable[[Tensor, bool], Tensor]] = {
    "relu": lambda x, owned: x.relu_() if owned else x.relu(),
    "sigmoid": lambda x, owned: x.sigmoid_() if owned else x.sigmoid(),
    "silu": lambda x, owned: F.silu(x, inplace=owned),
    "hardsigmoid": lambda x, owned: F.hardsigmoid(x, inplace=owned),
    "hardswish": lambda x, owned: F.hardswish(x, inplace=owned),
    "gelu": lambda x, owned: F.gelu(x),
    "tanh": lambda x, owned: x.tanh_() if owned else x.tanh(),
}


def factor_and_addend(scale: Factors, shift: Factors | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Factor f and addend b so that (x + b) * f is x * scale + shift: what oneDNN does as it stores.

    The addend is shift / f, whose rounding is of the size of the shift's. Where the scale is 0, or so small beside the shift
    that float32 cannot hold the quotient, f is a power of two at which b swallows x without a trace: what comes out is the
    shift, exactly.

    Args:
        scale: Shape (C,).
        shift: Shape (C,); None is 0.
        dtype: Number format of both results; what the factor is rounded by, the addend knows.

    Returns:
        Factor, shape (1, C, 1, 1), and addend, shape (C,), None without a shift.
    """
    factor = torch.from_numpy(scale).to(dtype).double().numpy()
    if shift is None:
        return _rounded(factor, dtype).view(1, -1, 1, 1), None
    _, bits = np.frexp(shift)
    unseen = (shift != 0) & (np.abs(factor) < np.maximum(np.ldexp(1.0, bits - _UNSEEN_BITS), np.ldexp(1.0, _SMALLEST_EXPONENT)))
    power = np.ldexp(1.0, np.clip(bits - _UNSEEN_BITS, _SMALLEST_EXPONENT, None))
    factor = np.where(unseen, power, factor)
    addend = np.divide(shift, factor, out=np.zeros_like(shift), where=shift != 0)
    return _rounded(factor, dtype).view(1, -1, 1, 1), _rounded(addend, dtype)


def _rounded(values: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)


@dataclass(frozen=True)
class Held:
    """What a packed network keeps in memory, and where.

    Attributes:
        device: Where everything runs.
        dtype: Number format of activations and of the kernels of convolutions.
        fused: Whether what follows PyTorch's own convolution is one pass.
        packed: Kernels of convolutions by name, for oneDNN; empty elsewhere.
        plain: All other kernels, banks and what belongs to them, by name.
    """

    device: torch.device
    dtype: torch.dtype
    fused: bool
    packed: Mapping[str, onednn.PackedKernel]
    plain: Mapping[str, Tensor]

    def kernel(self, kernel: Kernel) -> Tensor:
        """A kernel that is not packed, evaluated now and kept nowhere where it is an expression."""
        stored, own = self.plain[_name(kernel.tensor)], self.plain
        if isinstance(kernel, CombinedKernel):
            coefficients = own[_name(kernel.coefficients)]
            return (coefficients @ stored.flatten(1)).view(stored.shape[1:])
        if isinstance(kernel, RepeatedKernel):
            return repeat_kernel(stored, own[_name(kernel.gain)], own[_name(kernel.steepness)])
        return stored


def _name(reference: Reference) -> str:
    assert isinstance(reference, str), "a row of a table in a program without loops"
    return reference


def call_of(task: Task, held: Held, tensors: Tensors, input: Input) -> tuple[Call | Convolution, list[Tensor]]:
    """How a step is done.

    Args:
        task: The step.
        held: The kernels.
        tensors: The program's.
        input: The program's.

    Returns:
        A function of the task's values, or a convolution of a packed kernel, and the tensors that it holds beside the kernels.
    """
    step = task.step
    if isinstance(step, Stored):
        if isinstance(step.step, Convolve):
            return _convolution(step, step.step, held, tensors)
        assert isinstance(step.step, Linear), "only steps with a kernel take others along"
        return _linear(step, step.step, held, tensors)
    if isinstance(step, ScaleShift):
        return _scale_shift(*_terms(*_factors(step, tensors), held.device), task.owned)
    if isinstance(step, Normalize):
        return _normalize(input, held)
    return _elementary(step, task.owned), []


def _factors(affine: ScaleShift | None, tensors: Tensors) -> tuple[Factors | None, Factors | None]:
    scale, shift = (None, None) if affine is None else (affine.scale, affine.shift)
    made = [None if one is None else tensors[_name(one)].astype(np.float64) for one in (scale, shift)]
    return made[0], made[1]


def _terms(scale: Factors | None, shift: Factors | None, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    made = [None if one is None else torch.from_numpy(one).float().to(device) for one in (scale, shift)]
    return made[0], made[1]


def _normalize(input: Input, held: Held) -> tuple[Call, list[Tensor]]:
    mean, std = np.array(input.mean), np.array(input.std)
    scale, shift = (torch.from_numpy(one).float().to(held.device) for one in (1 / (255 * std), -mean / std))

    def call(images: Tensor) -> Tensor:
        if images.dtype != torch.uint8:
            return images.to(held.dtype)
        if held.fused:
            return fused.affine(images.permute(0, 3, 1, 2), scale, shift, held.dtype)
        return torch.addcmul(shift, images.float(), scale).permute(0, 3, 1, 2).to(held.dtype)

    return call, [scale, shift]


def _convolution(stored: Stored, step: Convolve, held: Held, tensors: Tensors) -> tuple[Call | Convolution, list[Tensor]]:
    scale, shift = _factors(stored.affine, tensors)
    packed = held.packed.get(_name(step.kernel.tensor)) if isinstance(step.kernel, StoredKernel) else None
    if packed is None:
        return _plain_convolution(stored, step, held, *_terms(scale, shift, held.device))
    factor, bias = None, None
    if scale is not None:
        factor, bias = factor_and_addend(scale, shift, held.dtype)
    elif shift is not None:
        bias = _rounded(shift, held.dtype)

    return Convolution(packed, onednn.slide_of(step), factor, bias, stored.relu), [
        one for one in (factor, bias) if one is not None
    ]


def _plain_convolution(
    stored: Stored, step: Convolve, held: Held, scale: Tensor | None, shift: Tensor | None
) -> tuple[Call, list[Tensor]]:
    """PyTorch's own convolution, and what follows it in one pass or step by step."""
    slide = onednn.slide_of(step)
    if held.fused and (scale is None) != (shift is None):
        # the pass has both
        scale = torch.ones_like(shift) if scale is None and shift is not None else scale
        shift = torch.zeros_like(scale) if shift is None and scale is not None else shift
    behind, own = _scale_shift(scale, shift, True)

    def call(x: Tensor) -> Tensor:
        x = x.to(held.dtype)
        x = (F.pad(x, slide.margin) if any(slide.margin) else x).contiguous(memory_format=_LAST)
        y = _convolved(x, held.kernel(step.kernel).to(held.dtype), slide.geometry).contiguous(memory_format=_LAST)
        if held.fused and scale is not None and shift is not None:
            return fused.affine(y, scale, shift, held.dtype, relu=stored.relu, pool=stored.pool)
        y = behind(y)
        y = y.relu_() if stored.relu else y
        return F.max_pool2d(y, 2) if stored.pool else y

    return call, own


def _convolved(x: Tensor, kernel: Tensor, of: onednn.Geometry) -> Tensor:
    if x.dtype == torch.float32 and x.is_cuda and torch.version.cuda and torch.backends.cudnn.is_acceptable(x):  # type: ignore[no-untyped-call]
        # PyTorch's own would round to the ten bits of TF32, unless that were switched off for the whole process
        return torch.ops.aten.cudnn_convolution(  # type: ignore[no-any-return]
            x, kernel, of.padding, of.stride, of.dilation, of.groups, False, False, False
        )
    return F.conv2d(x, kernel, None, of.stride, of.padding, of.dilation, of.groups)


def _linear(stored: Stored, step: Linear, held: Held, tensors: Tensors) -> tuple[Call, list[Tensor]]:
    kernel = step.kernel
    scale, shift = _terms(*_factors(stored.affine, tensors), held.device)

    def call(x: Tensor) -> Tensor:
        # in float32: these are few products, and the logits come from them
        y = F.linear(x.float(), held.kernel(kernel).float(), shift if scale is None else None)
        if scale is not None:
            y = y * scale if shift is None else torch.addcmul(shift, y, scale)
        return y.relu_() if stored.relu else y

    return call, [one for one in (scale, shift) if one is not None]


def _scale_shift(scale: Tensor | None, shift: Tensor | None, owned: bool) -> tuple[Call, list[Tensor]]:
    held = [one for one in (scale, shift) if one is not None]

    def call(x: Tensor) -> Tensor:
        channels = (1, -1) + (1,) * (x.ndim - 2)
        out = x if owned else None
        s, t = (None if one is None else one.view(channels) for one in (scale, shift))
        if s is not None and t is not None:
            y = torch.addcmul(t, x, s, out=out)
        elif s is not None:
            y = torch.mul(x, s, out=out)
        elif t is not None:
            y = torch.add(x, t, out=out)
        else:
            return x
        return y.to(x.dtype)

    return call, held


def _elementary(step: Operation, owned: bool) -> Call:
    """A step that holds nothing."""
    match step:
        case Activate(kind="clip", low=low, high=high):
            least, most = (None if math.isinf(bound) else bound for bound in (low, high))
            return (lambda x: x.clamp_(least, most)) if owned else (lambda x: x.clamp(least, most))
        case Activate(kind=kind):
            return lambda x: _ACTIVATIONS[kind](x, owned)
        case MaxPool():
            return _max_pool(step)
        case AveragePool(size=size, stride=stride):
            return lambda x: F.avg_pool2d(x, size, stride)
        case GlobalAverage():
            return _global_average
        case Flatten():
            return lambda x: x.reshape(len(x), -1)
        case Rotate(by=by):
            return lambda x: torch.cat((x[:, by % x.shape[1] :], x[:, : by % x.shape[1]]), 1)
        case Add():
            return (lambda x, y: x.add_(y)) if owned else (lambda x, y: x + y)
        case Multiply():
            return lambda x, y: x.mul_(y) if owned and x.numel() >= y.numel() else x * y
    raise AssertionError(f"no such step: {step}")


def _global_average(x: Tensor) -> Tensor:
    # in float32; a pool is several times as fast as `mean`, and one pixel is its own mean
    return x if x.shape[2:] == (1, 1) else F.avg_pool2d(x.float(), x.shape[2:])


def _max_pool(step: MaxPool) -> MaxPooling:
    above, left, below, right = step.padding
    even = (above, left) == (below, right) and 2 * above <= step.size[0] and 2 * left <= step.size[1]
    padding, margin = ((above, left), (0, 0, 0, 0)) if even else ((0, 0), (left, right, above, below))
    return MaxPooling(step.size, onednn.Slide(onednn.Geometry(step.stride, padding), margin))

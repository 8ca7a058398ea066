"""Numbers in eight bits: scales, zero points, and rounding as training and deployment both do it.

A value is stored as q in 0..255 and means scale * (q - zero). A kernel is stored as q in -127..127 and means scale * q, with a
scale for each output channel: what lies behind the convolution takes it in, so it costs nothing when the network runs.

A kernel that many layers in a row read is near the identity: the weight of a channel for itself, at the centre, is several
times as large as all others, whose rounding it would make as many times coarser. So it stands apart, in 16 bits.
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

# N images, C channels, O output channels

KERNEL_LIMIT = 127
VALUE_LIMIT = 255
OWN_LIMIT = 2**15 - 1
# shares of the range that are tried as the range, each with a finer search around the best
_SHARES = torch.logspace(0, -2, 48, dtype=torch.float64)
_FINE = torch.linspace(0.92, 1.08, 17, dtype=torch.float64)


@dataclass(frozen=True)
class Quantity:
    """What the numbers 0..255 of a value mean.

    Attributes:
        scale: Of one step, in the value's unit; larger than 0.
        zero: The number that means 0.
    """

    scale: float
    zero: int


def quantity(low: float, high: float) -> Quantity:
    """The quantity that covers a range.

    Args:
        low: Smallest value; 0 is in the range whatever this is, so that padding is exact.
        high: Largest value; likewise.

    Returns:
        The quantity.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    # a value that is always 0 has a scale, too; no smaller one, so that no quotient of two scales is infinite
    scale = max((high - low) / VALUE_LIMIT, 1e-30)
    return Quantity(scale, round(-low / scale))


def best_range(samples: Tensor) -> tuple[float, float]:
    """The range whose quantity has the smallest squared error; what lies outside is clipped.

    Args:
        samples: Of a value, in any shape.

    Returns:
        Its low and its high end, 0 between them.
    """
    samples = samples.flatten().double()
    low, high = min(float(samples.min()), 0.0), max(float(samples.max()), 0.0)
    # one end after the other
    if high > 0:
        high = _best_end(samples, high, lambda end: (low, end))
    if low < 0:
        low = _best_end(samples, low, lambda end: (end, high))
    return low, high


def _best_end(samples: Tensor, largest: float, range_of: Any) -> float:
    end = largest
    for shares in (_SHARES, _FINE):
        ends = [min(end * share, largest, key=abs) for share in shares.tolist()]
        errors = [float((rounded(samples, quantity(*range_of(one))) - samples).square().mean()) for one in ends]
        end = ends[errors.index(min(errors))]
    return end


def kernel_scales(kernel: Tensor, per_channel: bool = True) -> Tensor:
    """Scales of a kernel, so that its largest weight is 127 or -127.

    Args:
        kernel: Shape (O, ...).
        per_channel: A scale for each output channel; otherwise one for all.

    Returns:
        Shape (O,), each larger than 0.
    """
    largest = kernel.detach().flatten(1).abs().amax(1)
    if not per_channel:
        largest = largest.max().expand_as(largest)
    # a channel of zeros has a scale, too
    return (largest / KERNEL_LIMIT).clamp_min(torch.finfo(torch.float32).tiny)


def to_integers(kernel: Tensor, scales: Tensor) -> Tensor:
    """A kernel in its scales.

    Args:
        kernel: Shape (O, ...).
        scales: Shape (O,).

    Returns:
        int8, shape (O, ...).
    """
    scales = scales.view(-1, *[1] * (kernel.ndim - 1))
    return torch.clamp(torch.round(kernel / scales), -KERNEL_LIMIT, KERNEL_LIMIT).to(torch.int8)


def rounded(x: Tensor, of: Quantity) -> Tensor:
    """A value as it is after it was stored in eight bits, differentiable: within the range as if it had not been rounded.

    Args:
        x: Floats.
        of: What the eight bits mean.

    Returns:
        Floats of the same shape.
    """
    return cast(Tensor, _Rounded.apply(x, of))  # type: ignore[no-untyped-call]


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, of: Quantity) -> Tensor:
        low, high = -of.zero, VALUE_LIMIT - of.zero
        y = (x / of.scale).round_().clamp_(low, high).mul_(of.scale)
        # the next convolution keeps y anyway; the two ends stand for all that was clipped to them
        context.save_for_backward(y)
        context.low, context.high = (low + 0.5) * of.scale, (high - 0.5) * of.scale
        return y

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (y,) = context.saved_tensors
        return gradients[0] * ((y > context.low) & (y < context.high)), None


def has_own(shape: tuple[int, ...], groups: int = 1) -> bool:
    """Whether weights of a kernel stand apart.

    Args:
        shape: (O, I, H, W) or (O, I).
        groups: Of the convolution.

    Returns:
        True for a convolution of as many channels as it gives, with a pixel at its centre.
    """
    return len(shape) == 4 and groups == 1 and 1 < shape[0] == shape[1] and shape[2] % 2 == shape[3] % 2 == 1


def own_weights(kernel: Tensor) -> Tensor:
    """The weights of a kernel's channels for themselves, at its centre.

    Args:
        kernel: Shape (..., O, O, H, W).

    Returns:
        A view of shape (..., O).
    """
    return kernel[..., kernel.shape[-2] // 2, kernel.shape[-1] // 2].diagonal(dim1=-2, dim2=-1)


def without_own(kernel: Tensor) -> Tensor:
    """A copy of a kernel with zeros for `own_weights`."""
    rest = kernel.detach().clone()
    own_weights(rest).zero_()
    return rest


def rounded_kernel(kernel: Tensor, per_channel: bool = True, own: bool = False) -> Tensor:
    """A kernel as it is after it was stored in integers; its gradient is that of the kernel as it was.

    Args:
        kernel: Shape (O, ...).
        per_channel: See `kernel_scales`.
        own: Whether weights stand apart.

    Returns:
        The same shape.
    """
    scales = kernel_scales(without_own(kernel) if own else kernel, per_channel).view(-1, *[1] * (kernel.ndim - 1))
    return kernel + (torch.round(kernel / scales) * scales - kernel).detach()


def exponent(number: float) -> int:
    """The power of two that a positive number lies below: number < 2 ** exponent, as small as possible."""
    return math.frexp(number)[1]

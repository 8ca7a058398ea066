"""The start value of a shared kernel, from the kernels that it replaces."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dacnn.config import Start
from dacnn.errors import PlanError

# L layers, O output channels, I input channels, T templates

# a channel that hardly resembles the shared one keeps this share of its size, so that a norm can still bring it back
_SMALLEST_GAIN = 0.01


@dataclass(frozen=True)
class StartValue:
    """Where a shared kernel begins.

    Attributes:
        kernel: Shape (O, I, ...), or a bank of shape (T, O, I, ...).
        gains: Factor by which each layer's output channel exceeds the shared one's, shape (L, O), float64, where there is a
            norm that takes it up, else 1.
        coefficients: Of each layer, shape (L, T), for a bank.
    """

    kernel: Tensor
    gains: Tensor
    coefficients: Tensor | None = None


def start_value(kernels: Sequence[Tensor], start: Start, rescaled: Sequence[bool]) -> StartValue:
    """Choose the start of a shared kernel.

    Args:
        kernels: Those that it replaces, each of shape (O, I, ...).
        start: `mean`; `first`; or `fit`: least squares up to a gain per layer and output channel.
        rescaled: For every layer, whether a norm behind it takes up gains.

    Returns:
        The value.
    """
    first = kernels[0].detach()
    ones = torch.ones(len(kernels), first.shape[0], dtype=torch.float64, device=first.device)
    if start == "first":
        return StartValue(first.clone(memory_format=torch.contiguous_format), ones)
    stack = torch.stack([kernel.detach() for kernel in kernels]).contiguous()
    if start == "mean" or not any(rescaled):
        return StartValue(stack.mean(0), ones)
    rows = stack.flatten(2).double()
    filters, gains = _rank_one(rows, rescaled)
    return StartValue(filters.to(stack.dtype).view(stack.shape[1:]), gains)


def _rank_one(rows: Tensor, rescaled: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The filters and gains of least squared error, channel by channel.

    A filter is a length times a direction. Where N layers must have gain 1, their mean m fixes the length to m's share of
    the direction, and what remains to be found is the direction that the other rows and sqrt(N) m agree on best.

    Args:
        rows: Shape (L, O, X).
        rescaled: For every layer, whether its gains are free.

    Returns:
        Filters of shape (O, X), as large as the layers' on average where all gains are free, and gains of shape (L, O).
    """
    # numbers, not a mask: the meta device cannot count one
    free = [layer for layer, is_free in enumerate(rescaled) if is_free]
    pinned = rows[[layer for layer, is_free in enumerate(rescaled) if not is_free]]
    means = pinned.mean(0, keepdim=True) if len(pinned) else rows[:0]
    _, best = _singular(torch.cat([rows[free], means * len(pinned) ** 0.5]).transpose(0, 1), 1)
    directions = nn.functional.normalize(best[:, 0], dim=1, eps=1e-30)
    shares = (rows[free] * directions).sum(2)
    if len(pinned):
        lengths = (means[0] * directions).sum(1)
        # where the pinned layers have next to nothing of the direction, they may make the others' gains large, not infinite
        smallest = _SMALLEST_GAIN * shares.abs().amax(0)
        lengths = torch.where(lengths.abs() < smallest, _signs(lengths) * smallest, lengths)
    else:
        lengths = _signs(shares.sum(0)) * shares.square().mean(0).sqrt()
    dead = lengths == 0
    gains = torch.where(dead, 1.0, shares / torch.where(dead, 1.0, lengths))
    all_gains = torch.ones(rows.shape[:2], dtype=rows.dtype, device=rows.device)
    all_gains[free] = _signs(gains) * gains.abs().clamp_min(_SMALLEST_GAIN)
    return directions * lengths[:, None], all_gains


def _signs(values: Tensor) -> Tensor:
    """1 and -1; of zero, 1."""
    return torch.where(values < 0, -1.0, 1.0).to(values.dtype)


def _singular(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first left singular vectors of matrices, and singular values times right ones.

    Args:
        rows: Shape (..., L, X).
        count: How many.

    Returns:
        Shapes (..., L, count) and (..., count, X).
    """
    # few rows and many columns: the eigenvectors of the small square find the same, a hundred times faster
    vectors = torch.linalg.eigh(rows @ rows.mT).eigenvectors.flip(-1)[..., :count]
    return vectors, vectors.mT @ rows


def start_bank(kernels: Sequence[Tensor], templates: int) -> StartValue:
    """The bank and the coefficients of least squared error.

    Args:
        kernels: Those that it replaces, each of shape (O, I, ...).
        templates: T, at most as many as there are kernels.

    Returns:
        The value; coefficients are of size 1 on average.

    Raises:
        PlanError: There are more templates than kernels.
    """
    stack = torch.stack([kernel.detach() for kernel in kernels]).contiguous()
    layers = len(stack)
    if templates > layers:
        raise PlanError(f"a bank of {templates} templates for {layers} layers: expected at most as many templates as layers")
    u, scaled = _singular(stack.flatten(1).double(), templates)
    coefficients, bank = u * layers**0.5, scaled / layers**0.5
    gains = torch.ones(stack.shape[:2], dtype=torch.float64, device=stack.device)
    return StartValue(bank.to(stack.dtype).view(templates, *stack.shape[1:]), gains, coefficients.to(stack.dtype))


@torch.no_grad()
def take_up(norm: nn.Module, gain: Tensor, bias: Tensor | None) -> None:
    """Let a batch norm take up that the convolution before it gives each channel 1 / gain as large.

    Args:
        norm: A batch norm, changed in place.
        gain: Per channel, shape (O,).
        bias: What the convolution adds, whose size stays, shape (O,).
    """
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.weight is not None
    scale = gain.sign()
    if norm.running_mean is not None and norm.running_var is not None:
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        offset = torch.zeros_like(mean) if bias is None else bias.double()
        # a variance below 0 cannot be: what eps then keeps the statistics from taking up goes into the scale
        taken = ((variance + norm.eps) / gain.square() - norm.eps).clamp_min(0)
        scale = gain * ((taken + norm.eps) / (variance + norm.eps)).sqrt()
        norm.running_mean.copy_(offset + (mean - offset) / gain)
        norm.running_var.copy_(taken)
    norm.weight.mul_(scale)

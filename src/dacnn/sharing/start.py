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
    if start == "mean" or not any(rescaled):
        return StartValue(torch.stack([kernel.detach() for kernel in kernels]).mean(0).contiguous(), ones)
    filters, gains = _rank_one(torch.stack([kernel.detach().flatten(1).double() for kernel in kernels], dim=1), rescaled)
    return StartValue(filters.to(first.dtype).view(first.shape), gains.T)


def _rank_one(rows: Tensor, rescaled: Sequence[bool]) -> tuple[Tensor, Tensor]:
    """The filters and gains of least squared error, channel by channel.

    A filter is a length times a direction. Where N layers must have gain 1, their mean m fixes the length to m's share of
    the direction, and what remains to be found is the direction that the other rows and sqrt(N) m agree on best.

    Args:
        rows: Shape (O, L, X).
        rescaled: For every layer, whether its gains are free.

    Returns:
        Filters of shape (O, X), as large as the layers' on average where all gains are free, and gains of shape (O, L).
    """
    # numbers, not a mask: the meta device cannot count one
    free, pinned = ([layer for layer, is_free in enumerate(rescaled) if is_free == wanted] for wanted in (True, False))
    if pinned:
        rows = torch.cat([rows[:, free], rows[:, pinned].mean(1, keepdim=True) * len(pinned) ** 0.5], dim=1)
    left, best = _singular(rows, 1)
    sizes = best[:, 0].norm(dim=1, keepdim=True)
    # how much of the direction each row has
    shares = left[..., 0] * sizes
    if pinned:
        shares, lengths = shares[:, :-1], shares[:, -1:] / len(pinned) ** 0.5
        # where the pinned layers have next to nothing of the direction, they may make the others' gains large, not infinite
        smallest = _SMALLEST_GAIN * shares.abs().amax(1, keepdim=True)
        lengths = torch.where(lengths.abs() < smallest, _signs(lengths) * smallest, lengths)
    else:
        lengths = _signs(shares.sum(1, keepdim=True)) * shares.square().mean(1, keepdim=True).sqrt()
    fitted = torch.where(lengths == 0, 1.0, shares / torch.where(lengths == 0, 1.0, lengths))
    gains = torch.ones(len(rows), len(rescaled), dtype=rows.dtype, device=rows.device)
    gains[:, free] = _signs(fitted) * fitted.abs().clamp_min(_SMALLEST_GAIN)
    return best[:, 0] * (lengths / torch.where(sizes == 0, 1.0, sizes)), gains


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

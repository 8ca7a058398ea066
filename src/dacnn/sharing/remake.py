"""Activations and kernels that are made again for the gradient instead of kept.

A network in training keeps, for every layer, the convolution's output (the norm's gradient needs it) and the ReLU's output
(the next convolution's gradient needs it): two activations of one size, though the second follows from the first. And
max-pooling keeps an eight-byte index for every output, though its input tells which pixel was the largest. Within `remaking()`
neither is kept, nor is a kernel that follows from stored ones. Outputs, gradients and running statistics are those of the
plain operations, bit for bit.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dacnn.sharing.keeping import Keeper, keeping, remaking_keeper
from dacnn.sharing.parts import to_do
from dacnn.sharing.segments import made_again

# N images, C channels, H rows, W columns

# parts of a batch whose indices are there at a time
_PARTS = 32


class _NormReluRecipe:
    """How to make the output of a norm and its ReLU again; what was made is kept from the first who needs it to the last."""

    def __init__(self, keeper: Keeper, x: Tensor, norm: nn.BatchNorm2d) -> None:
        self.inputs = [keeper.keep(tensor) for tensor in (x, norm.weight, norm.bias)]
        self.eps = norm.eps
        self.made: Tensor | None = None

    @torch.no_grad()
    def tensor(self) -> Tensor:
        if self.made is None:
            x, weight, bias = (kept.tensor() for kept in self.inputs)
            # the statistics of the batch are found once more: the same operation gives the same bits
            self.made = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, self.eps)[0].relu_()
        return self.made


def _spread_to_largest(gradient: Tensor, x: Tensor, *, rectified: bool = False) -> Tensor:
    """The gradient of 2x2 max-pooling: that of every output goes to the first of its largest inputs.

    Args:
        gradient: Of the outputs, shape (N, C, H // 2, W // 2).
        x: What was pooled, shape (N, C, H, W).
        rectified: Whether `x` is what a ReLU gave, whose gradient is then taken as well.

    Returns:
        Of `x`, or of what the ReLU took; shape (N, C, H, W).
    """
    result = torch.empty_like(x)
    # a few images at a time, so that the indices are never all there; a GPU would rather have one launch
    step = max(1, -(-len(x) // _PARTS) if x.device.type == "cpu" else len(x))
    for images in to_do([slice(begin, begin + step) for begin in range(0, len(x), step)]):
        part = x[images]
        _, indices = torch.ops.aten.max_pool2d_with_indices(part, [2, 2], [2, 2])
        spread = torch.ops.aten.max_pool2d_with_indices_backward(
            gradient[images], part, [2, 2], [2, 2], [0, 0], [1, 1], False, indices
        )
        result[images] = torch.ops.aten.threshold_backward(spread, part, 0) if rectified else spread
        # or they would be there beside those of the next part
        del indices, spread
    return result


class _HalveByMax(torch.autograd.Function):
    """2x2 max-pooling whose indices are found again when the gradient needs them."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return F.max_pool2d(x, 2)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _spread_to_largest(gradients[0], *context.saved_tensors)


class _NormRelu(torch.autograd.Function):
    """Batch norm in training mode, ReLU, and 2x2 max-pooling where it is asked for."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, keeper: Keeper, halve: bool
    ) -> Tensor:
        assert norm.momentum is not None
        y, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        y.relu_()
        recipe = _NormReluRecipe(keeper, x, norm)
        keeper.remember(y, recipe)
        # weakly: a graph's nodes live longer than what they saved
        context.recipe, context.halve, context.eps = weakref.ref(recipe), halve, norm.eps
        # saved like everything else, so that y is kept in the form in which the next convolution keeps it
        context.save_for_backward(x, y, weight, mean, inverse_std)
        return F.max_pool2d(y, 2) if halve else y

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, inverse_std = context.saved_tensors
        if context.halve:
            gradient = _spread_to_largest(gradients[0], y, rectified=True)
        else:
            gradient = torch.ops.aten.threshold_backward(gradients[0], y, 0)
        # whoever else needed y came before
        recipe = context.recipe()
        if recipe is not None:
            recipe.made = None
        del y
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, inverse_std, True, context.eps, [True, True, True]
        )
        return of_x, of_weight, of_bias, None, None, None


def norm_relu(norm: nn.BatchNorm2d, x: Tensor, halve: bool = False) -> Tensor:
    """ReLU of a batch norm; within `remaking()` its output is not kept.

    Args:
        norm: The norm, in either mode.
        x: Shape (N, C, H, W).
        halve: Whether 2x2 max-pooling follows.

    Returns:
        Shape (N, C, H, W), or (N, C, H // 2, W // 2).
    """
    keeper = remaking_keeper()
    if keeper is None or not norm.training or not norm.affine or norm.momentum is None or not x.requires_grad:
        y = F.relu(norm(x), inplace=True)
        return F.max_pool2d(y, 2) if halve else y
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    output: Tensor = _NormRelu.apply(x, norm.weight, norm.bias, norm, keeper, halve)  # type: ignore[no-untyped-call]
    return output


def halve_by_max(x: Tensor) -> Tensor:
    """Keep the largest of every 2x2 pixels; within `remaking()` no index is kept.

    Args:
        x: Shape (N, C, H, W).

    Returns:
        Shape (N, C, H // 2, W // 2).
    """
    if remaking_keeper() is None or not x.requires_grad:
        return F.max_pool2d(x, 2)
    y: Tensor = _HalveByMax.apply(x)  # type: ignore[no-untyped-call]
    return y


class _Evaluation:
    """How to evaluate a kernel again: for each reader anew, for it is small work and a deep network has many kernels."""

    def __init__(self, keeper: Keeper, function: Callable[..., Tensor], stored: tuple[Tensor, ...], dtype: torch.dtype) -> None:
        self.function, self.dtype = function, dtype
        self.stored = [keeper.keep(tensor) for tensor in stored]

    @torch.no_grad()
    def tensor(self) -> Tensor:
        return _evaluate(self.function, [kept.tensor() for kept in self.stored], self.dtype)


def _evaluate(function: Callable[..., Tensor], stored: list[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The value as it is stored, and rounded once."""
    device = stored[0].device.type
    # the meta device, on which memory is predicted, knows no autocast
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    # what a reader would convert it to; a converted copy would have no recipe
    dtype = dtype or (torch.get_autocast_dtype(device) if autocast else None)
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        value = function(*stored)
        return value.to(dtype) if dtype else value


def evaluated(function: Callable[..., Tensor], *stored: Tensor) -> Tensor:
    """Compute a kernel from stored tensors; within `remaking()` it is not kept, but evaluated again for each gradient.

    Under autocast the function runs without it, and its value is rounded to autocast's type.

    Args:
        function: From the stored tensors to the kernel; the same arguments give the same bits.
        *stored: What the kernel follows from, one tensor or more, on one device.

    Returns:
        `function(*stored)`, differentiable in the stored tensors.
    """
    keeper = remaking_keeper()
    if keeper is None:
        return _evaluate(function, list(stored))
    first, *others = stored
    # neither is kept what the function's own gradient needs
    value = _evaluate(lambda *_: made_again(lambda tensor: function(tensor, *others), first), list(stored))
    if value.requires_grad and not any(value is tensor for tensor in stored):
        keeper.remember(value, _Evaluation(keeper, function, stored, value.dtype))
    return value


@contextlib.contextmanager
def remaking(wanted: bool = True) -> Iterator[None]:
    """Within this context, what `norm_relu` and `evaluated` give is kept for the gradient as a recipe.

    Args:
        wanted: False makes this context do nothing.
    """
    with keeping(Keeper(remakes=True)) if wanted else contextlib.nullcontext():
        yield

"""Activations that are made again for the gradient instead of kept.

A network in training keeps, for every layer, the convolution's output (the norm's gradient needs it) and the ReLU's output
(the next convolution's gradient needs it): two activations of one size, though the second follows from the first. And
max-pooling keeps an eight-byte index for every output, though its input tells which pixel was the largest. Within `remaking()`
neither is kept. Outputs, gradients and running statistics are those of the plain operations, bit for bit.
"""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# N images, C channels, H rows, W columns

# parts of a batch whose indices are there at a time
_PARTS = 32


class _Recipe:
    """How to make one output again; what was made is kept from the first who needs it to the last."""

    def __init__(self, x: Tensor, norm: nn.BatchNorm2d) -> None:
        self.x, self.weight, self.bias, self.eps = x, norm.weight, norm.bias, norm.eps
        self.made: Tensor | None = None

    def forget(self) -> Tensor:
        """Hand the input over: nobody needs the output any more, and the graph lives longer than its backward pass."""
        x = self.x
        del self.x
        self.made = None
        return x

    @torch.no_grad()
    def make(self) -> Tensor:
        if self.made is None:
            # the statistics of the batch are found once more: the same operation gives the same bits
            self.made = torch.native_batch_norm(self.x, self.weight, self.bias, None, None, True, 0.0, self.eps)[0].relu_()
        return self.made


# outputs of the forward pass that is running, by where they lie, as long as they live
_Outputs = dict[tuple[int, int], tuple["weakref.ref[Tensor]", _Recipe]]
_outputs: ContextVar[_Outputs | None] = ContextVar("outputs", default=None)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies: its storage and the offset in it. A tensor without values has these too, but no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def _running() -> _Outputs | None:
    """The outputs that are remembered, where this is wanted; a compiler decides for itself what to keep."""
    return None if torch.compiler.is_compiling() else _outputs.get()


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
    parts = _PARTS if x.device.type == "cpu" else 1
    for part, below, above in zip(*(tensor.chunk(parts) for tensor in (x, result, gradient)), strict=True):
        _, indices = torch.ops.aten.max_pool2d_with_indices(part, [2, 2], [2, 2])
        spread = torch.ops.aten.max_pool2d_with_indices_backward(above, part, [2, 2], [2, 2], [0, 0], [1, 1], False, indices)
        below.copy_(torch.ops.aten.threshold_backward(spread, part, 0) if rectified else spread)
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
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d, recipe: _Recipe, halve: bool
    ) -> Tensor:
        assert norm.momentum is not None
        y, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        context.recipe, context.halve = recipe, halve
        context.save_for_backward(mean, inverse_std)
        return F.max_pool2d(y.relu_(), 2) if halve else y.relu_()

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, inverse_std = context.saved_tensors
        recipe: _Recipe = context.recipe
        if context.halve:
            gradient = _spread_to_largest(gradients[0], recipe.make(), rectified=True)
        else:
            gradient = torch.ops.aten.threshold_backward(gradients[0], recipe.make(), 0)
        x = recipe.forget()
        of_x, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, recipe.weight, None, None, mean, inverse_std, True, recipe.eps, [True, True, True]
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
    outputs = _running()
    if outputs is None or not norm.training or not norm.affine or norm.momentum is None or not x.requires_grad:
        y = F.relu(norm(x), inplace=True)
        return F.max_pool2d(y, 2) if halve else y
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    recipe = _Recipe(x, norm)
    output: Tensor = _NormRelu.apply(x, norm.weight, norm.bias, norm, recipe, halve)  # type: ignore[no-untyped-call]
    if not halve:
        outputs[_place(output)] = weakref.ref(output), recipe
    return output


def halve_by_max(x: Tensor) -> Tensor:
    """Keep the largest of every 2x2 pixels; within `remaking()` no index is kept.

    Args:
        x: Shape (N, C, H, W).

    Returns:
        Shape (N, C, H // 2, W // 2).
    """
    if _running() is None or not x.requires_grad:
        return F.max_pool2d(x, 2)
    y: Tensor = _HalveByMax.apply(x)  # type: ignore[no-untyped-call]
    return y


@contextlib.contextmanager
def remaking(wanted: bool = True) -> Iterator[None]:
    """Within this context, outputs of `norm_relu` that others keep for their gradients are kept as recipes.

    Args:
        wanted: False makes this context do nothing.
    """
    if not wanted:
        yield
        return
    outputs: _Outputs = {}

    def pack(tensor: Tensor) -> Tensor | _Recipe:
        output, recipe = outputs.get(_place(tensor), (None, None))
        # while the output lives nothing else lies at its place
        alive = output() if output else None
        same = alive is not None and alive.shape == tensor.shape and alive.stride() == tensor.stride()
        return recipe if same and recipe else tensor

    def unpack(kept: Tensor | _Recipe) -> Tensor:
        return kept.make() if isinstance(kept, _Recipe) else kept

    token = _outputs.set(outputs)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _outputs.reset(token)

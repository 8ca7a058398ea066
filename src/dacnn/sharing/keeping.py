"""In which form a graph keeps the tensors that its gradients need: whole, or as a recipe that makes them again.

PyTorch hands every tensor that an operation saves to the innermost pair of hooks alone. So all of this library's ways to
keep less go through one pair, and a `Keeper` says what it does with a tensor.
"""

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from dacnn.errors import TrainingError


class Kept(Protocol):
    """A form in which a tensor is kept."""

    def tensor(self) -> Tensor:
        """The tensor, now that a gradient needs it."""


class Whole:
    """The tensor itself."""

    def __init__(self, tensor: Tensor) -> None:
        """Keep `tensor`, apart from its graph: a graph that kept its own output would never be freed."""
        self._tensor, self._version = tensor.detach(), tensor._version

    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            TrainingError: It holds other values than those that were saved.
        """
        if self._tensor._version != self._version:
            raise TrainingError(
                f"a tensor of shape {tuple(self._tensor.shape)} that the gradient needs was changed in place behind the "
                "forward pass: call backward() before the optimiser's step, and write to a copy"
            )
        return self._tensor


class Keeper:
    """Keeps outputs that have a recipe as that recipe, and everything else whole.

    Attributes:
        remakes: Whether outputs of norms, ReLUs, poolings and evaluated kernels are given recipes.
    """

    def __init__(self, remakes: bool) -> None:
        """Begin with no recipes."""
        self.remakes = remakes
        # by place in memory; an entry leaves with its output, and all leave with the forward pass: what a recipe holds shall
        # live no longer than the graph that needs it
        self._recipes: dict[tuple[int, int], tuple[weakref.ref[Tensor], int, Kept]] = {}

    def remember(self, output: Tensor, recipe: Kept) -> None:
        """Let whoever saves `output` keep `recipe` instead."""
        place = _place(output)
        reference = weakref.ref(output, lambda _: self._recipes.pop(place, None))
        self._recipes[place] = reference, output._version, recipe

    def keep(self, tensor: Tensor) -> Kept:
        """The form in which `tensor` is kept."""
        reference, version, recipe = self._recipes.get(_place(tensor), (None, 0, None))
        # while the output lives nothing else stands at its place, but a view of it may
        output = reference() if reference else None
        if output is None or recipe is None or output._version != version:
            return Whole(tensor)
        same = (output.shape, output.stride(), output.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)
        return recipe if same else Whole(tensor)

    def forget(self) -> None:
        """Let go of all recipes, behind the forward pass."""
        self._recipes.clear()

    def pack(self, tensor: Tensor) -> Kept:
        """What the graph holds in place of `tensor`."""
        return self.keep(tensor)


_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins in memory; not its address, which tensors without memory (`FakeTensorMode`) do not have."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def current_keeper() -> Keeper | None:
    """The keeper whose context is the innermost; none while a compiler looks on, which decides for itself what to keep."""
    return None if torch.compiler.is_compiling() else _keeper.get()


def remaking_keeper() -> Keeper | None:
    """The keeper, where it wants recipes."""
    keeper = current_keeper()
    return keeper if keeper and keeper.remakes else None


@contextlib.contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """Within this context, what operations save for their gradients goes through `keeper`."""
    token = _keeper.set(keeper)
    try:
        with torch.autograd.graph.saved_tensors_hooks(keeper.pack, lambda kept: kept.tensor()):
            yield
    finally:
        _keeper.reset(token)
        keeper.forget()

"""Which tensors live at each moment of a computation, and how many bytes they take at the worst one.

A storage counts from the operator that made it until it is let go, once, however many tensors look at it. The tensors
need no values: under PyTorch's `FakeTensorMode`, or on its `meta` device, a computation is followed without being done.
"""

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# bytes that an operator takes for itself beside its results, from the operator, its arguments and its results
Workspace = Callable[[Any, tuple[Any, ...], Any], int]


def _normed(x: Tensor, weight: Tensor | None, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    _bias, running_mean, _running_variance, training = others[:4]
    like = next(one for one in (weight, running_mean, x) if one is not None)
    statistics = like.new_empty(x.shape[1] if training else 0)
    return torch.empty_like(x), statistics, torch.empty_like(statistics)


def _normed_backward(gradient: Tensor, x: Tensor, weight: Tensor | None, *others: Any) -> tuple[Tensor | None, ...]:
    asked = others[-1]
    of_weight = (x if weight is None else weight).new_empty
    return (
        torch.empty_like(x) if asked[0] else None,
        of_weight(x.shape[1]) if asked[1] else None,
        of_weight(x.shape[1]) if asked[2] else None,
    )


# what gives tensors like those of an operator where they have no values: there PyTorch goes through all steps of a norm, in
# Python, in ten milliseconds
_INSTEAD: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _normed,
    torch.ops.aten.native_batch_norm_backward.default: _normed_backward,
}


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that follows every storage made within it, from its first tensor to its last."""

    def __init__(self, workspace: Workspace | None = None, granule_bytes: int = 1) -> None:
        """Get ready.

        Args:
            workspace: What operators take beside their results while they run; None: nothing.
            granule_bytes: The allocator hands out multiples of this.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspace, self._granule = workspace, granule_bytes
        self._numbers = itertools.count()
        # storages that live: by where they are, their number and what tells when they go
        self._live: dict[int, tuple[int, weakref.ref[Any]]] = {}
        # (number of the storage, bytes taken or given back), in the order in which it happened
        self._events: list[tuple[int, int]] = []
        self._kinds: dict[int, str] = {}

    def label(self, kind: str, tensors: Iterable[Tensor]) -> None:
        """Say what some living tensors are, for all their life; those unknown so far are taken in.

        Args:
            kind: What `peak` shall call them.
            tensors: The tensors.
        """
        for tensor in tensors:
            self._take_in(tensor)
            self._kinds[self._live[tensor.untyped_storage()._cdata][0]] = kind

    def peak(self, otherwise: str = "activations") -> dict[str, int]:
        """The bytes at the moment when they were most, by kind.

        Args:
            otherwise: The kind of what has no label.

        Returns:
            Kind to bytes; what operators took for themselves at that moment is `workspace`.
        """
        now: defaultdict[str, int] = defaultdict(int)
        most, peak = 0, dict(now)
        total = 0
        for number, size in self._events:
            now[self._kinds.get(number, otherwise)] += size
            total += size
            if total > most:
                most, peak = total, dict(now)
        return peak

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        instead = _INSTEAD.get(func)
        if instead and (args[0].is_meta or is_fake(args[0])):
            results = instead(*args, **(kwargs or {}))
        else:
            results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._take_in(result)
        if self._workspace and (taken := self._workspace(func, args, results)):
            number = next(self._numbers)
            self._kinds[number] = "workspace"
            self._events += [(number, taken), (number, -taken)]
        return results

    def _take_in(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place: int = storage._cdata
        if place in self._live:
            return
        size = -(-storage.nbytes() // self._granule) * self._granule
        number = next(self._numbers)

        def let_go(_: Any) -> None:
            del self._live[place]
            self._events.append((number, -size))

        # the storage object of Python lives exactly as long as the memory behind it
        self._live[place] = number, weakref.ref(storage, let_go)
        self._events.append((number, size))

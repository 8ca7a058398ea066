"""Counts the memory of tensors that live, as the dispatcher sees them made and the garbage collector sees them go."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made within this context: now, and at their peak. Storages in `known` are not counted."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function: Callable, types: Any, arguments: Any = (), more: Any = None) -> Any:
        result = function(*arguments, **(more or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.seen:
                self.add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        self.seen.add(place)
        self.now += size
        weakref.finalize(storage, self.remove, place, size)

    def remove(self, place: int, size: int) -> None:
        self.seen.discard(place)
        self.now -= size

"""Foreign layers that read their kernel: a subclass of the layer's own class whose `weight` belongs to somebody else."""

import math
from collections.abc import Set
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dacnn.errors import PlanError
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.regulators import LowRank, make_regulator
from dacnn.sharing.survey import Layer

# N images, C channels, H rows, W columns


class ForeignReader(nn.Module):
    """What every reader of a foreign module has in common; mixed in before the layer's own class."""

    _anchors: Anchors
    _reader_name: str
    regulator: nn.Module | None

    @property
    def weight(self) -> Tensor:
        """The kernel, read from its owner."""
        return self._anchors.read(self._reader_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own class does, and the regulator behind it."""
        y = super().forward(*args, **kwargs)
        return y if self.regulator is None else _regulated(self, self.regulator, y)

    def reset_parameters(self) -> None:
        """What the layer's own class does, which draws the kernel anew for all its readers.

        Raises:
            PlanError: The kernel is made of a bank, which is nobody's alone.
        """
        if not self._anchors.is_stored(self._reader_name):
            raise PlanError(
                f"layer '{self._reader_name}' reads a kernel that is made of others: there is nothing of its own to reset; "
                "reset_parameters() of their owner draws the bank anew"
            )
        super().reset_parameters()  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made when it is needed: a pickle can only name the class that it was made from
        return _empty_reader, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[no-untyped-call]


def _regulated(layer: nn.Module, regulator: nn.Module, y: Tensor) -> Tensor:
    """What a regulator, which takes images of N x C x H x W, makes of what a layer gives, of any shape."""
    if isinstance(layer, nn.Linear):
        # images of one row whose channels come last in memory: nothing is copied
        *rows, columns = y.shape[:-1] if y.ndim > 2 else (*y.shape[:-1], 1)
        pixels = y.reshape(math.prod(rows), 1, columns, y.shape[-1]).permute(0, 3, 1, 2)
        regulated: Tensor = regulator(pixels).permute(0, 2, 3, 1)
        return regulated.reshape(y.shape)
    batched = y.ndim == len(cast(_ConvNd, layer).kernel_size) + 2
    # one dimension gets a second, of three the last two become one
    images = (y if batched else y[None]).unsqueeze(-1).flatten(3)
    return cast(Tensor, regulator(images)).reshape(y.shape)


_classes: dict[type[nn.Module], type[ForeignReader]] = {}


def reader_class(base: type[nn.Module]) -> type[ForeignReader]:
    """The readers of a class of layers.

    Args:
        base: `nn.Conv2d`, or any other class whose instances hold a `weight`.

    Returns:
        A subclass of it.
    """
    if base not in _classes:
        names = {"__module__": __name__, "__doc__": ForeignReader.__doc__}
        _classes[base] = type(f"Anchored{base.__name__}", (ForeignReader, base), names)
    return _classes[base]


def _empty_reader(base: type[nn.Module]) -> ForeignReader:
    kind = reader_class(base)
    return kind.__new__(kind)


def regulator_behind(layer: Layer, kind: str, rank: int | None, generator: torch.Generator | None = None) -> nn.Module:
    """Make the regulator of a foreign layer.

    Args:
        layer: The layer.
        kind: Name of the regulator.
        rank: Rank of a low-rank one.
        generator: Source of its start; None is PyTorch's global one.

    Returns:
        The regulator, on the layer's device, of its type and in its mode.
    """
    regulator = make_regulator(kind, layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features, rank)
    if isinstance(regulator, LowRank):
        nn.init.kaiming_uniform_(regulator.down.weight, a=5**0.5, generator=generator)
    return regulator.to(device=layer.weight.device, dtype=layer.weight.dtype).train(layer.training)


def become_reader(layer: Layer, anchors: Anchors, name: str, regulator: nn.Module | None) -> None:
    """Turn a layer into a reader, in place.

    Args:
        layer: The layer; it loses its weight.
        anchors: Who owns its kernel.
        name: Its name there.
        regulator: What stands behind it.
    """
    del layer._parameters["weight"]
    layer.__class__ = reader_class(type(layer))  # type: ignore[assignment]
    # past nn.Module's own setattr, which would make the owner a part of every reader
    layer.__dict__["_anchors"] = anchors
    layer.__dict__["_reader_name"] = name
    layer.regulator = regulator  # type: ignore[assignment]


def owner_of(module: nn.Module) -> Anchors | None:
    """Who owns the kernels of a module that was converted as a whole.

    Args:
        module: The module.

    Returns:
        The owner; None where it does not share by anchors.

    Raises:
        PlanError: A part of it was converted by itself, or several were: what is in a part is known by other names here.
    """
    owners = {name: part for name, part in module.named_modules() if isinstance(part, Anchors)}
    if not owners:
        return None
    names = {name for name, _ in module.named_modules(remove_duplicate=False)}
    parts = [_shared_part(names, place, owner) for place, owner in owners.items()]
    if parts == [""]:
        return next(iter(owners.values()))
    named = " and ".join(f"'{part}'" for part in parts)
    raise PlanError(
        f"{type(module).__name__} is not what shares kernels, but {named} in it: give that part alone (of an average of "
        "weights, its `module`), or share the kernels of the whole: dacnn.anchor on the module that has no anchors yet"
    )


def _shared_part(names: Set[str], place: str, owner: Anchors) -> str:
    """Name of the part that was converted as a whole: where the readers have the names that their owner knows them by."""
    above = [""]
    for step in place.split("."):
        above.append(f"{above[-1]}.{step}".removeprefix("."))
    for part in above:
        if all(f"{part}.{reader}".removeprefix(".") in names for reader in owner.expressions):
            return part
    # of a network of the zoo, where they go by the names of the plan
    return place.rpartition(".")[0]

"""Foreign layers that read their kernel: a subclass of the layer's own class whose `weight` belongs to somebody else."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dacnn.errors import PlanError
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.regulators import make_regulator
from dacnn.sharing.survey import Layer


class ForeignReader(nn.Module):
    """What every reader of a foreign module has in common; mixed in before the layer's own class."""

    _anchors: Anchors
    _name: str
    regulator: nn.Module | None

    @property
    def weight(self) -> Tensor:
        """The kernel, read from its owner."""
        return self._anchors.read(self._name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the layer's own class does, and the regulator behind it."""
        y = super().forward(*args, **kwargs)
        return y if self.regulator is None else self.regulator(y)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class is made when it is needed: a pickle can only name the class that it was made from
        return _empty_reader, (type(self).__bases__[1],), self.__dict__


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


class Behind(nn.Module):
    """A regulator behind any layer: the images of N x C x H x W that it takes are made of what the layer gives."""

    def __init__(self, regulator: nn.Module, last: bool) -> None:
        """Wrap a regulator; `last`: channels are the last dimension, as behind a linear layer."""
        super().__init__()
        self.inner = regulator
        self.last = last

    def forward(self, y: Tensor) -> Tensor:
        """Regulate what a layer gives.

        Args:
            y: Shape (..., C) or (N, C, ...).

        Returns:
            The same shape.
        """
        if self.last:
            regulated: Tensor = self.inner(y.reshape(-1, y.shape[-1], 1, 1))
            return regulated.reshape(y.shape)
        regulated = self.inner(y.reshape(*y.shape[:2], -1, 1))
        return regulated.reshape(y.shape)


def regulator_behind(layer: Layer, kind: str, rank: int | None) -> nn.Module:
    """Make the regulator of a foreign layer.

    Args:
        layer: The layer.
        kind: Name of the regulator.
        rank: Rank of a low-rank one.

    Returns:
        From what the layer gives to the same shape; on the layer's device and of its type.

    Raises:
        PlanError: This kind cannot stand behind such a layer.
    """
    channels = layer.out_channels if isinstance(layer, _ConvNd) else layer.out_features
    images = isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
    if kind == "depthwise" and not images:
        raise PlanError(
            f"a depthwise regulator stands behind 2-d convolutions, not behind {type(layer).__name__}: use pointwise"
        )
    regulator = make_regulator(kind, channels, rank)
    if not images:
        regulator = Behind(regulator, last=isinstance(layer, nn.Linear))
    return regulator.to(device=layer.weight.device, dtype=layer.weight.dtype)


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
    layer.__dict__["_name"] = name
    layer.regulator = regulator  # type: ignore[assignment]


def owner_of(module: nn.Module) -> Anchors | None:
    """Who owns the kernels of a module; None where it does not share by anchors."""
    return next((part for part in module.modules() if isinstance(part, Anchors)), None)

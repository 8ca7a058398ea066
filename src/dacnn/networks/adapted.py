"""A foreign module as a network of this library: trained, measured, stored and shipped like one of ours."""

import dataclasses
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Self

import torch
from torch import Tensor, nn

from dacnn.errors import ConfigError, DacnnError, ShapeError, told
from dacnn.networks.classifier import Classifier, evaluating
from dacnn.networks.plan import Input
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.conversion import Conversion
from dacnn.sharing.convert import conversion_of
from dacnn.sharing.readers import owner_of

# N images, C channels, H rows, W columns, K classes


class Adapted(Classifier):
    """A module that takes N x C x H x W and gives logits, as they are, in an attribute `logits` or first in a tuple.

    Attributes:
        module: The module, converted or not.
        refused: Layers that could not share, and why; known of a module that was just converted.
    """

    # what a forward pass may do to its activations, such as view(), may hold for this order alone
    memory_format = torch.contiguous_format

    def __init__(self, module: nn.Module, input: Input, classes: tuple[str, ...]) -> None:
        """Adapt a module.

        Args:
            module: The module, which becomes a part of this one.
            input: What it takes.
            classes: Names of the classes, one for each of its logits.
        """
        super().__init__(input, classes)
        self.module = module
        self.refused: Mapping[str, str] = {}
        self.normalize.to(next((parameter.device for parameter in module.parameters()), "cpu"))

    @torch.no_grad()
    def try_out(self) -> Self:
        """Run the module once, on black images: lazy layers then have their shapes, and what cannot work is refused.

        Returns:
            This network, every part in the mode that it was in.

        Raises:
            ConfigError: The module has no parameters.
            ShapeError: It does not run on such images, or gives something else than a logit for every class.
        """
        kind, size = type(self.module).__name__, (self.input.channels, self.input.height, self.input.width)
        if next(self.module.parameters(), None) is None:
            raise ConfigError(f"{kind} has no parameters: expected a network with layers that learn")
        with evaluating(self.module):
            try:
                self.logits(torch.zeros(2, *size, device=self.normalize.scale.device))
            except DacnnError:
                raise
            except Exception as error:
                raise _not_running(self.module, self.input, error) from error
        return self

    @property
    def conversion(self) -> Conversion:
        """Which layers read which kernel."""
        return dataclasses.replace(conversion_of(self.module), refused=self.refused)

    @property
    def owner(self) -> Anchors | None:
        """Who owns the kernels; None where nothing is shared."""
        return owner_of(self.module)

    def logits(self, x: Tensor) -> Tensor:
        """Run the module.

        Args:
            x: Normalised floats, shape (N, C, H, W).

        Returns:
            Shape (N, K).

        Raises:
            ShapeError: The module gives something else.
        """
        if x.is_contiguous():
            # an image of one channel lies in memory as in either order: a convolution goes by the strides
            x = x.flatten().view(x.shape)
        y = _logits(self.module(x))
        expected = (x.shape[0], len(self.classes))
        if not isinstance(y, Tensor) or tuple(y.shape) != expected:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ShapeError(
                f"{type(self.module).__name__} gives {found} for {x.shape[0]} images: expected logits of shape {expected}, "
                f"one for each of the {len(self.classes)} classes"
            )
        return y


def _not_running(module: nn.Module, input: Input, error: Exception) -> ShapeError:
    size = f"N x {input.channels} x {input.height} x {input.width}"
    return ShapeError(f"{type(module).__name__} does not run on images of {size}: {told(error)}")


def _logits(given: Any) -> Any:
    """What a module means by its logits."""
    given = getattr(given, "logits", given)
    return given[0] if isinstance(given, tuple | list) else given


@torch.no_grad()
def count_logits(module: nn.Module, input: Input) -> int:
    """How many classes a module tells apart.

    Args:
        module: The module; it is put into evaluation mode and run once, on black images.
        input: What it takes.

    Returns:
        K.

    Raises:
        ShapeError: It does not run on such images, or gives no logits.
    """
    try:
        y = _logits(module.eval()(torch.zeros(2, input.channels, input.height, input.width)))
    except Exception as error:
        raise _not_running(module, input, error) from error
    if not isinstance(y, Tensor) or y.ndim != 2 or y.shape[0] != 2:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ShapeError(f"{type(module).__name__} gives {found} for 2 images: expected logits, N x K")
    return y.shape[1]


def adapt(module: nn.Module, input: Input, classes: Sequence[str] | int) -> Adapted:
    """Make a network of a module, for `save`, `count`, `evaluate`, `predict`, `export` and `pack`, however it was trained.

    Args:
        module: Takes normalised floats N x C x H x W and gives logits N x K; converted by `dacnn.anchor` or not. It becomes a
            part of the network, in the mode that it is in, and is run once, on black images.
        input: The size of its images, and the mean and deviation, on the scale 0 to 1, that they were normalised by when it
            was trained: the network takes uint8 images, too.
        classes: Their names in the order of the logits, or how many there are.

    Returns:
        The network.

    Raises:
        ConfigError: This is no module, or one without parameters, or there are no classes.
        ShapeError: The module does not run on such images, or gives something else than a logit for every class.

    Example:
        >>> import dacnn
        >>> from torch import nn
        >>> convolutions = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)]
        >>> module = nn.Sequential(nn.Conv2d(3, 8, 1), *convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        >>> shared, _ = dacnn.anchor(module, "all")
        >>> network = dacnn.adapt(shared, dacnn.Input(16, 16), ["ant", "bee", "cat", "dog", "eel"])
        >>> len(dacnn.pack(network.eval()).steps.held.packed)
        2
    """
    if not isinstance(module, nn.Module) or isinstance(module, Classifier):
        kind = "a network already" if isinstance(module, Classifier) else f"a {type(module).__name__}"
        raise ConfigError(f"module is {kind}: expected an nn.Module that is no network yet")
    if not isinstance(input, Input):
        raise ConfigError(f"input is a {type(input).__name__}: expected dacnn.Input(height, width, ...)")
    if isinstance(classes, Integral) and not isinstance(classes, bool):
        names = tuple(map(str, range(int(classes))))
    else:
        # a set has no order
        names = tuple(map(str, classes)) if isinstance(classes, Sequence) and not isinstance(classes, str) else ()
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"classes is {classes!r}: expected names, each once and in order, or a number from 1")
    meta = next((name for name, tensor in module.state_dict().items() if tensor.is_meta), None)
    if meta is not None:
        raise ConfigError(f"'{meta}' is on the device 'meta', where it has no values: load the module's weights first")
    return Adapted(module, input, names).try_out()

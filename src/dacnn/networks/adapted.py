"""A foreign module as a network of this library: trained, measured, stored and shipped like one of ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from dacnn.errors import ConfigError, DacnnError, ShapeError, told
from dacnn.networks.classifier import Classifier
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
        modes = {part: part.training for part in self.module.modules()}
        self.module.eval()
        try:
            self.logits(torch.zeros(2, *size, device=self.normalize.scale.device))
        except DacnnError:
            raise
        except Exception as error:
            expected = " x ".join(map(str, ("N", *size)))
            raise ShapeError(f"{kind} does not run on images of {expected}: {told(error)}") from error
        finally:
            for part, mode in modes.items():
                part.training = mode
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
        given: Any = self.module(x)
        given = getattr(given, "logits", given)
        y = given[0] if isinstance(given, tuple | list) else given
        expected = (x.shape[0], len(self.classes))
        if not isinstance(y, Tensor) or tuple(y.shape) != expected:
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise ShapeError(
                f"{type(self.module).__name__} gives {found} for {x.shape[0]} images: expected logits of shape {expected}, "
                f"one for each of the {len(self.classes)} classes"
            )
        return y

"""A foreign module as a network of this library: trained, measured, stored and shipped like one of ours."""

from typing import Any

from torch import Tensor, nn

from dacnn.errors import ShapeError
from dacnn.networks.classifier import Classifier
from dacnn.networks.plan import Input
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.readers import owner_of

# N images, C channels, H rows, W columns, K classes


class Adapted(Classifier):
    """A module that takes N x C x H x W and gives logits, as they are, in an attribute `logits` or first in a tuple.

    Attributes:
        module: The module, converted or not.
    """

    def __init__(self, module: nn.Module, input: Input, classes: tuple[str, ...]) -> None:
        """Adapt a module.

        Args:
            module: The module, which becomes a part of this one.
            input: What it takes.
            classes: Names of the classes, one for each of its logits.
        """
        super().__init__(input, classes)
        self.module = module

    @property
    def owner(self) -> Anchors | None:
        """Who owns the kernels; None where nothing is shared."""
        return owner_of(self.module)

    def check_images(self, images: Tensor, x: Tensor) -> None:
        """Refuse images that the network cannot take; which sizes it can take only the module knows.

        Args:
            images: As they were given.
            x: The same, normalised.

        Raises:
            ShapeError: They have another shape.
        """
        channels = self.input.channels
        if x.ndim != 4 or x.shape[1] != channels:
            raise ShapeError(
                f"images have shape {tuple(images.shape)}: expected N x {channels} x H x W (or uint8, N x H x W x {channels})"
            )

    def logits(self, x: Tensor) -> Tensor:
        """Run the module.

        Args:
            x: Normalised floats, shape (N, C, H, W).

        Returns:
            Shape (N, K).

        Raises:
            ShapeError: The module gives something else.
        """
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

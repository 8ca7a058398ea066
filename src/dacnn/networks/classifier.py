"""What all networks have in common, ours and foreign ones: they know what they take and what they tell apart."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dacnn.errors import ConfigError, ShapeError
from dacnn.networks.normalize import Normalize
from dacnn.networks.plan import Input
from dacnn.sharing.anchors import Anchors

# N images, C channels, H rows, W columns, K classes


def _refill(network: nn.Module, incompatible: object) -> None:
    """The statistics of the input are in no state dict: whoever loads one into empty memory gets them from the description."""
    assert isinstance(network, Classifier)
    network.normalize.reset_statistics(next(network.parameters()).device)


class Classifier(nn.Module):
    """From images, as they are, to logits.

    Attributes:
        input: What it takes.
        classes: Names of the classes it tells apart.
        normalize: From uint8 images to what the first layer takes.
        ranges: Low and high end of every value that its integers store, by the value's name in its Program; None: it was not
            trained in integers.
        memory_format: Order in memory of what the layers are given of uint8 images.
    """

    memory_format = torch.channels_last

    def __init__(self, input: Input, classes: tuple[str, ...]) -> None:
        """Make a network of no layers yet."""
        super().__init__()
        self.input = input
        self.classes = classes
        self.normalize = Normalize(input)
        self.ranges: dict[str, tuple[float, float]] | None = None
        self.register_load_state_dict_post_hook(_refill)  # type: ignore[no-untyped-call]

    @property
    def owner(self) -> Anchors | None:
        """Who owns the kernels; None where nothing is shared."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: uint8 of shape (N, H, W, C), or already normalised floats of shape (N, C, H, W).

        Returns:
            Logits, shape (N, K).

        Raises:
            ShapeError: The images have another shape, or are no tensor.
        """
        x = images
        if images.dtype == torch.uint8:
            x = self.normalize(images).contiguous(memory_format=self.memory_format)
        self._check_images(images, x)
        return self.logits(x)

    @property
    def smallest_side(self) -> int:
        """Smallest side of an image that the layers can take, in pixels, as far as it is known."""
        return 1

    def _check_images(self, images: Tensor, x: Tensor) -> None:
        """Refuse images, given as `images` and normalised as `x`, that the network cannot take."""
        if not isinstance(x, Tensor):
            raise ShapeError(f"images are a {type(x).__name__}: expected a tensor: torch.from_numpy makes one of an array")
        channels, side = self.input.channels, self.smallest_side
        if x.ndim != 4 or x.shape[1] != channels or min(x.shape[2:]) < side:
            least = f" of at least {side} pixels a side" if side > 1 else ""
            raise ShapeError(
                f"images have shape {tuple(images.shape)}: expected N x {channels} x H x W "
                f"(or uint8, N x H x W x {channels}){least}"
            )

    def logits(self, x: Tensor) -> Tensor:
        """Run the layers.

        Args:
            x: Normalised floats, shape (N, C, H, W).

        Returns:
            Shape (N, K).
        """
        raise NotImplementedError


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a while; then each part is in its own again, whatever happened."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def as_network(found: object) -> Classifier:
    """Refuse what is no network of this library, before something of it is asked for.

    Args:
        found: What a caller gave; of a compiled one, that which was compiled is taken.

    Returns:
        The network.

    Raises:
        ConfigError: It is something else.
    """
    found = getattr(found, "_orig_mod", found)
    if not isinstance(found, Classifier):
        raise ConfigError(
            f"got {type(found).__name__}: expected a network: dacnn.create makes one, dacnn.load reads one, "
            "and dacnn.adapt makes one of a module of yours"
        )
    return found

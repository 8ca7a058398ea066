"""Batches: fetched ahead of the step, shifted, mirrored and blanked out as a whole, without a loop over images."""

# B images of one batch, H rows, W columns, C channels

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from dacnn.data.imageset import ImageSet, StreamedImages
from dacnn.errors import ConfigError

# enough to bridge an uneven step, few enough to stay small beside the network
_BATCHES_AHEAD = 4


@dataclass(frozen=True, eq=False)
class Draws:
    """The random numbers that augment one batch; `draws[start:stop]` are those of a part of it.

    Attributes:
        shift_y: Rows by which the window moves down, int64, shape (B,).
        shift_x: Columns by which the window moves right, int64, shape (B,).
        mirror: Whether the image is mirrored, left to right, bool, shape (B,).
        hole_y: Row of the centre of the cutout, int64, shape (B,).
        hole_x: Column of the centre of the cutout, int64, shape (B,).
        cutout: Side of the cutout in pixels; 0: none.
    """

    shift_y: Tensor
    shift_x: Tensor
    mirror: Tensor
    hole_y: Tensor
    hole_x: Tensor
    cutout: int

    def __len__(self) -> int:
        """Number of images."""
        return len(self.mirror)

    def __getitem__(self, part: slice) -> "Draws":
        """The draws of a part of the batch."""
        return Draws(
            self.shift_y[part], self.shift_x[part], self.mirror[part], self.hole_y[part], self.hole_x[part], cutout=self.cutout
        )

    def to(self, device: torch.device) -> "Draws":
        """The same numbers on a device; a GPU gets them in one piece and is not waited for."""
        if device == self.mirror.device:
            return self
        numbers = torch.stack((self.shift_y, self.shift_x, self.mirror.long(), self.hole_y, self.hole_x))
        if device.type == "cuda":
            # from other memory a transfer waits for all that the GPU has still to do
            numbers = numbers.pin_memory()
        shift_y, shift_x, mirror, hole_y, hole_x = numbers.to(device, non_blocking=device.type == "cuda")
        return Draws(shift_y, shift_x, mirror.bool(), hole_y, hole_x, cutout=self.cutout)


def draw(count: int, height: int, width: int, *, crop: int, flip: bool, cutout: int, generator: torch.Generator) -> Draws:
    """Draw how each image of a batch is augmented.

    Args:
        count: Images in the batch, B.
        height: Rows of an image.
        width: Columns of an image.
        crop: Largest shift in each direction, in pixels; 0: none.
        flip: Whether every image is mirrored with probability 1/2.
        cutout: Side of the square to blank out, in pixels; 0: none.
        generator: On the CPU. It moves on alike whatever is switched off, so that other draws stay comparable.

    Returns:
        The draws.

    Raises:
        ConfigError: The shift is as large as the image.
    """
    if not 0 <= crop < min(height, width):
        raise ConfigError(f"training.crop is {crop}: expected 0 to {min(height, width) - 1} for images of {height}x{width}")

    def whole(low: int, high: int) -> Tensor:
        return torch.randint(low, high + 1, (count,), generator=generator)

    return Draws(
        shift_y=whole(-crop, crop),
        shift_x=whole(-crop, crop),
        mirror=(whole(0, 1) == 1) & flip,
        hole_y=whole(0, height - 1),
        hole_x=whole(0, width - 1),
        cutout=cutout,
    )


def apply(images_nhwc: Tensor, draws: Draws, fill: Tensor | None = None) -> Tensor:
    """Augment a batch as drawn: mirrored, then shifted with reflected borders, then blanked out.

    Args:
        images_nhwc: uint8, shape (B, H, W, C), on any device.
        draws: One for each image.
        fill: Colour of the cutout, uint8, shape (C,); default: black.

    Returns:
        uint8, shape (B, H, W, C), on the device of the images.
    """
    count, height, width, channels = images_nhwc.shape
    device = images_nhwc.device
    draws = draws.to(device)
    shift_y, shift_x, mirror = draws.shift_y[:, None], draws.shift_x[:, None], draws.mirror[:, None]
    rows = _reflect(torch.arange(height, device=device) + shift_y, height)
    columns = _reflect(torch.arange(width, device=device) + shift_x, width)
    columns = torch.where(mirror, width - 1 - columns, columns)
    # one index per pixel into the flattened batch: four times as fast as indexing with three tensors
    first = torch.arange(count, device=device)[:, None] * height
    pixels = (first + rows)[:, :, None] * width + columns[:, None, :]
    shifted = images_nhwc.reshape(-1, channels).index_select(0, pixels.reshape(-1)).view(images_nhwc.shape)
    return _blanked(shifted, draws, fill) if draws.cutout else shifted


def augment(
    images_nhwc: Tensor, *, crop: int, flip: bool, cutout: int, generator: torch.Generator, fill: Tensor | None = None
) -> Tensor:
    """Draw and apply in one: random shift, mirror image and cutout.

    Args:
        images_nhwc: uint8, shape (B, H, W, C), on any device.
        crop: Largest shift in each direction, in pixels; 0: none.
        flip: Whether every image is mirrored with probability 1/2.
        cutout: Side of the square to blank out, in pixels; 0: none.
        generator: On the CPU.
        fill: Colour of the cutout, uint8, shape (C,); default: black.

    Returns:
        uint8, shape (B, H, W, C), on the device of the images.

    Raises:
        ConfigError: The shift is as large as the image.
    """
    count, height, width, _ = images_nhwc.shape
    return apply(images_nhwc, draw(count, height, width, crop=crop, flip=flip, cutout=cutout, generator=generator), fill)


def _reflect(indices: Tensor, length: int) -> Tensor:
    """Indices beyond either end, turned back at the outermost pixel, which is not repeated."""
    return (length - 1) - ((length - 1) - indices.abs()).abs()


def _blanked(images_nhwc: Tensor, draws: Draws, fill: Tensor | None) -> Tensor:
    """The images with their cutouts; a hole that reaches over the border is clipped."""
    _, height, width, channels = images_nhwc.shape
    device = images_nhwc.device

    def covered(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=device) - (centre[:, None] - draws.cutout // 2)
        return (offset >= 0) & (offset < draws.cutout)

    hole = covered(draws.hole_y, height)[:, :, None] & covered(draws.hole_x, width)[:, None, :]
    colour = torch.zeros(channels, dtype=torch.uint8) if fill is None else fill
    return torch.where(hole[..., None], colour.to(device), images_nhwc)


def ahead(
    image_set: ImageSet, batches_of_indices: Iterable[Tensor], device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Fetch batches in order; those of streamed images are decoded in the background, a few ahead.

    Close the iterator (or let go of it) to stop the background work before its end.

    Args:
        image_set: Where the images come from.
        batches_of_indices: The images of each batch, int64, shape (B,).
        device: Where the batches go.

    Yields:
        Images, uint8, shape (B, H, W, C), and labels, int64, shape (B,), on the device.

    Raises:
        DataError: An image cannot be decoded.
    """
    labels = image_set.labels

    def fetch(indices: Tensor) -> tuple[Tensor, Tensor]:
        return image_set.gather(indices).to(device), labels[indices.to(labels.device)].to(device)

    if not isinstance(image_set, StreamedImages):
        yield from map(fetch, batches_of_indices)
        return
    indices = iter(batches_of_indices)
    # one thread keeps the order; each batch is decoded by several
    pool = ThreadPoolExecutor(1, thread_name_prefix="dacnn-ahead")
    try:
        first = islice(indices, _BATCHES_AHEAD)
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque(pool.submit(fetch, batch) for batch in first)
        while waiting:
            ready = waiting.popleft().result()
            waiting.extend(pool.submit(fetch, batch) for batch in islice(indices, 1))
            yield ready
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

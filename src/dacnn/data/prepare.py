"""What a network should take, judged from the train images: size, channels, mean and standard deviation."""

# N images, H rows, W columns, C channels

from dataclasses import replace

import numpy as np
import torch

from dacnn.config import DataConfig
from dacnn.data.fit import is_grey
from dacnn.data.imageset import ImageSet, MemoryImages
from dacnn.data.records import Records, evenly
from dacnn.errors import DataError
from dacnn.networks.plan import Input

_SMALLEST_SIDE = 32
# images whose headers are read: opening one costs almost as much as decoding it, so not all of a large set
_SURVEYED = 2000
# below this, an image set is one colour, and dividing by its deviation would only amplify rounding
_SMALLEST_STD = 1e-3


def choose_input(records: Records, config: DataConfig, name: str) -> Input:
    """Size and channels, from the config, else from the headers of up to 2,000 evenly spaced train images.

    Args:
        records: The train images.
        config: `size`, `channels` and `fit`.
        name: Names the data set in error messages.

    Returns:
        The input, with mean and standard deviation yet to be measured.

    Raises:
        DataError: An image cannot be opened, or the images suggest no size.
    """
    sizes: set[tuple[int, int]] = set()
    grey = True
    if config.size is None or config.channels is None:
        for index in evenly(len(records), _SURVEYED):
            with records.open(int(index)) as image:
                sizes.add(image.size)
                grey = grey and is_grey(image)
    side = config.size or _common_side(sizes, name)
    channels = config.channels or (1 if grey else 3)
    return Input(height=side, width=side, channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels, fit=config.fit)


def _common_side(sizes: set[tuple[int, int]], name: str) -> int:
    """The side of the network's input that fits images of these sizes, in pixels."""
    if max((max(size) for size in sizes), default=0) <= _SMALLEST_SIDE:
        return _SMALLEST_SIDE
    width, height = min(sizes)
    if len(sizes) > 1 or width != height:
        widths, heights = zip(*sizes, strict=True)
        raise DataError(
            f"{name}: the images are {min(widths)} to {max(widths)} wide and {min(heights)} to {max(heights)} high: "
            f"expected one square size: set data.size, for example to {_SMALLEST_SIDE} or 64"
        )
    return width


def measured(input: Input, images: ImageSet) -> Input:
    """The input with the mean and the standard deviation of each channel, on the scale 0 to 1, to 4 digits.

    Args:
        input: Size and channels.
        images: The train images: all are measured in memory, 2,000 evenly spaced ones where they are streamed.

    Returns:
        The completed input.

    Raises:
        DataError: An image cannot be decoded.
    """
    if isinstance(images, MemoryImages):
        pixels = images.images_nhwc.numpy()
    else:
        pixels = images.gather(torch.from_numpy(evenly(len(images), _SURVEYED))).numpy()
    flat = pixels.reshape(-1, input.channels)
    # counts of the 256 values give both moments exactly, whatever the number of pixels
    counts = [np.bincount(flat[:, channel], minlength=256) for channel in range(input.channels)]
    values = np.arange(256) / 255
    mean = [float(np.average(values, weights=count)) for count in counts]
    std = [float(np.average((values - centre) ** 2, weights=count)) ** 0.5 for centre, count in zip(mean, counts, strict=True)]
    rounded = tuple(max(round(deviation, 4), _SMALLEST_STD) for deviation in std)
    return replace(input, mean=tuple(round(centre, 4) for centre in mean), std=rounded)

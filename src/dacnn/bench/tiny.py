"""A network that is next to nothing: what a runtime takes for itself is taken when it has run this."""

import numpy as np
from numpy.typing import NDArray

from dacnn.bench.contenders import Takes
from dacnn.networks.network import Network, create


def tiny_network() -> Network:
    """Three convolutions of 8 channels, for images of 32 x 32 in three colours."""
    return create("dacnn3", width=8, seed=0).eval()


def tiny_images(takes: Takes) -> NDArray[np.uint8] | NDArray[np.float32]:
    """One black image for it.

    Args:
        takes: In which form.

    Returns:
        uint8, shape (1, 32, 32, 3), or float32, shape (1, 3, 32, 32).
    """
    return np.zeros((1, 32, 32, 3), np.uint8) if takes == "uint8" else np.zeros((1, 3, 32, 32), np.float32)

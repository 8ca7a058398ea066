"""What the logits of a contender are compared with: the network itself in PyTorch, in float64."""

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dacnn.networks.classifier import Classifier

# N images, H rows, W columns, C channels, K classes

_BATCH = 32


@torch.inference_mode()
def reference_logits(network: Classifier, images_nhwc: Tensor) -> NDArray[np.float64]:
    """The logits to compare with.

    Args:
        network: The network, left as it is.
        images_nhwc: uint8, shape (N, H, W, C).

    Returns:
        Shape (N, K).
    """
    exact = copy.deepcopy(network).double()
    # its statistics were rounded to float32 before
    exact.normalize.reset_statistics()
    return torch.cat([exact(batch) for batch in torch.split(images_nhwc, _BATCH)]).numpy()


def compare(logits: NDArray[Any], reference: NDArray[np.float64]) -> tuple[float, float]:
    """How far logits are from the reference.

    Args:
        logits: Shape (N, K).
        reference: Of the same shape.

    Returns:
        The share of images whose first guess is the same, and the largest difference over the largest logit.
    """
    if logits.shape != reference.shape:
        raise ValueError(f"gave logits of shape {logits.shape}: expected {reference.shape}")
    agreement = float((logits.argmax(1) == reference.argmax(1)).mean())
    return agreement, float(np.abs(logits - reference).max() / np.abs(reference).max())

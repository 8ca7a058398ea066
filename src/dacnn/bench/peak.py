"""What the machine can do at most: multiply-adds a second of a float32 convolution that PyTorch runs at its best.

Of what PyTorch computes, this came nearest to what a core can do in a loop of multiply-adds alone; products of large
matrices stayed further below it.
"""

from typing import Any

from numpy.typing import NDArray

from dacnn.bench.contenders import Artefact, Loaded

# C channels, both of the input and of the output, S x S pixels: enough that the units are busy, little enough that kernel and
# images stay in a core's own cache
C, S, KERNEL = 64, 16, 3
IMAGES_PER_THREAD = 8
# multiply-adds of an image; what lies beyond its border is counted too, as it is for every network
MACS_PER_IMAGE = C * C * KERNEL * KERNEL * S * S


def load(artefact: Artefact) -> Loaded:
    """Ready the convolution.

    Args:
        artefact: Its threads are taken, nothing else.

    Returns:
        What computes it for as many images as it is given, whatever they show.
    """
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(artefact.threads)
    kernel = torch.randn(C, C, KERNEL, KERNEL).contiguous(memory_format=torch.channels_last)

    def prepare(images: NDArray[Any]) -> Any:
        return torch.randn(len(images), C, S, S).contiguous(memory_format=torch.channels_last)

    return Loaded(torch.inference_mode()(lambda x: F.conv2d(x, kernel, padding=KERNEL // 2)), prepare)

"""What the machine can do at most: multiply-adds a second of a large product of float32 matrices, as PyTorch computes it."""

from dacnn.bench.contenders import Artefact, Loaded

# three matrices of 4 MiB: large enough that the units are busy, small enough for a cache that cores share
SIDE = 1024
# multiply-adds of one product
PEAK_MACS = SIDE**3


def load(artefact: Artefact) -> Loaded:
    """Ready the product.

    Args:
        artefact: Its threads are taken, nothing else.

    Returns:
        What computes it, whatever images it is given.
    """
    import torch

    torch.set_num_threads(artefact.threads)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SIDE, SIDE, generator=generator) for _ in range(2))
    product = torch.empty(SIDE, SIDE)
    return Loaded(lambda images: torch.mm(x, y, out=product))

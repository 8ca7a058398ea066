"""The range of every value that is stored in eight bits, from images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dacnn.deploy.fusion import Stored, summed
from dacnn.deploy.integers.floats import run
from dacnn.deploy.program import Activate, Program
from dacnn.errors import DeployError
from dacnn.quantization import best_range

# N images, H rows, W columns, C channels

# low and high end by name of the value
Ranges = Mapping[str, tuple[float, float]]
_BATCH = 50
# numbers of a value that are looked at, over all images
_SAMPLES = 2**16


@torch.no_grad()
def calibrate(program: Program, images: Tensor) -> dict[str, tuple[float, float]]:
    """Find for every value the range in which eight bits have the smallest squared error.

    Args:
        program: A flat program.
        images: Images as the network will see them, uint8, shape (N, H, W, C); some hundreds are enough.

    Returns:
        The ranges.

    Raises:
        DeployError: There are no images, or they are of another size; or the program has loops.
    """
    check_images(program, images)
    steps = summed(program)
    ranged = {step.out for step in steps if isinstance(step, Stored | Activate)}
    tensors = {name: torch.from_numpy(tensor) for name, tensor in program.tensors.items()}
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, list[Tensor]] = {name: [] for name in ranged}

    def see(name: str, x: Tensor) -> Tensor:
        if name in ranged:
            count = min(x.numel(), -(-_SAMPLES * len(x) // len(images)))
            flat = x.flatten()
            samples[name].append(flat[torch.randint(len(flat), (count,), generator=generator)])
        return x

    for part in torch.split(images, _BATCH):
        run(steps, program.result, part, program.input, tensors, see)
    return {name: best_range(torch.cat(found)) for name, found in samples.items()}


def check_images(program: Program, images: Tensor) -> None:
    """Refuse images that tell nothing of a program's values.

    Raises:
        DeployError: There are none, or they are of another size or type.
    """
    of = program.input
    expected = (of.height, of.width, of.channels)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != expected or len(images) == 0:
        size = " x ".join(map(str, images.shape))
        raise DeployError(
            f"calibration of '{program.name}' got images of {size} ({images.dtype}): expected 1 or more uint8 images of "
            f"{' x '.join(map(str, expected))}: give images of the data set that the network was trained on"
        )

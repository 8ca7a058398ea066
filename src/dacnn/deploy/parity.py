"""Whether what was shipped computes what the network computes: measured when it is written, never assumed."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dacnn.deploy.integers.floats import run
from dacnn.deploy.program import Program
from dacnn.deploy.rounding import in_bfloat16
from dacnn.deploy.shapes import flat_steps
from dacnn.errors import DeployError, told
from dacnn.networks.classifier import Classifier
from dacnn.networks.plan import Input

# N images, H rows, W columns, C channels, K classes

# float32 itself differs from float64 by 1e-5 on trained networks and by up to 5e-4 on untrained deep ones: more is a mistake
TOLERANCE = 1e-3
_BATCH = 64
# runs an artefact on images as it takes them
Runner = Callable[[Tensor], NDArray[Any]]


@dataclass(frozen=True)
class Parity:
    """How far an artefact is from the network that it was made from.

    Attributes:
        images: Images that both classified.
        max_error: Largest difference of two logits, in units of the largest logit.
        top1_agreement: Share of the images for which both name the same class.
        unexplained: Images for which they do not, although the first two classes are further apart than twice the error.
    """

    images: int
    max_error: float
    top1_agreement: float
    unexplained: int

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)


def noise_images(input: Input, count: int, seed: int = 0) -> Tensor:
    """Images of noise, where there are no others.

    Args:
        input: What the network takes.
        count: How many.
        seed: Of the generator.

    Returns:
        uint8, shape (N, H, W, C).
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (count, input.height, input.width, input.channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


@torch.no_grad()
def reference_logits(network: Classifier, images: Tensor) -> NDArray[np.float64]:
    """What a network gives when rounding plays no part.

    Args:
        network: The network; left as it is.
        images: uint8, shape (N, H, W, C).

    Returns:
        Logits, shape (N, K), computed in float64.

    Raises:
        DeployError: The network does not run in float64.
    """
    try:
        exact = copy.deepcopy(network).cpu().double().eval()
        # of the statistics, the float32 numbers alone would be there
        exact.normalize.reset_statistics()
        logits = [exact(part).double() for part in torch.split(images, _BATCH)]
    except (RuntimeError, TypeError) as error:
        raise DeployError(
            f"the network does not run in float64, in which the exported one is checked: {told(error)}: "
            "let its own code take the type of its input"
        ) from error
    return torch.cat(logits).numpy()


@torch.no_grad()
def program_logits(program: Program, images: Tensor) -> NDArray[np.float64]:
    """What the steps of a program give when rounding plays no part.

    Args:
        program: A flat program.
        images: uint8, shape (N, H, W, C).

    Returns:
        Logits, shape (N, K), computed in float64.
    """
    of, steps = program.input, flat_steps(program)
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in (of.mean, of.std))
    tensors = {name: torch.from_numpy(tensor).double() for name, tensor in program.tensors.items()}
    parts = (((part.double() / 255 - mean) / std).permute(0, 3, 1, 2) for part in torch.split(images, _BATCH))
    return torch.cat([run(steps, program.result, part, of, tensors) for part in parts]).numpy()


def measure(run: Runner, images: Tensor, reference: NDArray[np.float64], batch_size: int = _BATCH) -> Parity:
    """Run an artefact and compare.

    Args:
        run: From uint8 images N x H x W x C to logits N x K.
        images: The images.
        reference: Their logits, from `reference_logits`.
        batch_size: Images of one call.

    Returns:
        The comparison.
    """
    return compare(logits_of(run, images, batch_size), reference)


def logits_of(run: Runner, images: Tensor, batch_size: int = _BATCH) -> NDArray[np.float64]:
    """What an artefact gives for images, so many in a call."""
    return np.concatenate([np.asarray(run(part), dtype=np.float64) for part in torch.split(images, batch_size)])


def compare(logits: NDArray[np.float64], reference: NDArray[np.float64]) -> Parity:
    """Compare logits with those of the reference, both N x K."""
    if logits.shape != reference.shape or not np.isfinite(logits).all():
        return Parity(len(reference), float("inf"), 0.0, len(reference))
    error = float(np.abs(logits - reference).max())
    differ = logits.argmax(1) != reference.argmax(1)
    ordered = np.sort(reference, axis=1)
    margin = ordered[:, -1] - ordered[:, -2] if reference.shape[1] > 1 else np.full(len(reference), np.inf)
    return Parity(
        images=len(reference),
        max_error=error / max(float(np.abs(reference).max()), 1e-30),
        top1_agreement=float(1 - differ.mean()),
        unexplained=int((differ & (margin > 2 * error)).sum()),
    )


def check(parity: Parity, what: str, than: str = "the network") -> None:
    """Refuse what does not compute the same.

    Args:
        parity: The comparison.
        what: What was compared, for the message.
        than: With what, likewise.

    Raises:
        DeployError: The error is larger than rounding explains.
    """
    if parity.max_error > TOLERANCE or parity.unexplained:
        raise DeployError(
            f"{what} does not compute what {than} computes: logits differ by {parity.max_error:.1e} of the largest one "
            f"(expected at most {TOLERANCE:.0e}), the first guess on {1 - parity.top1_agreement:.2%} of {parity.images} "
            "images: nothing was written; please report it with the network's plan"
        )


def check_rounded(program: Program, run: Runner, images: Tensor, reference: NDArray[np.float64], where: str) -> Parity:
    """Refuse code with kernels of bfloat16 that computes anything else than these kernels give in the steps of the program.

    Args:
        program: A flat program, not rounded.
        run: The code, from images to logits.
        images: uint8, shape (N, H, W, C).
        reference: Logits of the network, in float64: what the steps must give before kernels are rounded.
        where: The file, for the message.

    Returns:
        How far the code is from the network, which rounding of kernels may explain.

    Raises:
        DeployError: The logits are others.
    """
    check(compare(program_logits(program, images), reference), f"{where}: the program that was made of it")
    logits = logits_of(run, images)
    exact = program_logits(in_bfloat16(program), images)
    check(compare(logits, exact), f"{where}: what was exported", "the program with rounded kernels")
    return compare(logits, reference)

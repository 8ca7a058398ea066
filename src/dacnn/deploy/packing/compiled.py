"""A Program as compiled C within this process: what `dacnn.pack` takes where it is the faster way."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dacnn import runtime
from dacnn.deploy.c.build import build
from dacnn.deploy.c.source import FloatDtype, Winograd, to_c
from dacnn.deploy.program import Program

# N images, H rows, W columns, C channels, K classes

_TRIALS = 7


@dataclass(frozen=True)
class Library:
    """A program that was compiled and loaded.

    Attributes:
        network: It, on arrays.
        file_bytes: Of the library, which is mapped: kernels, transformed ones too, and code.
    """

    network: runtime.Compiled
    file_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes that it takes beside what a call needs."""
        return self.file_bytes + self.network.context_bytes

    def takes(self, images: Tensor) -> bool:
        """Whether these are images of its size: it knows neither others nor normalised floats."""
        return images.dtype == torch.uint8 and tuple(images.shape[1:]) == self.network.input_shape

    def __call__(self, images: Tensor) -> Tensor:
        """Logits, N x K, of uint8 images, N x H x W x C; on as many threads as PyTorch has."""
        return torch.from_numpy(self.network(images.numpy(), torch.get_num_threads()))


def compiled(program: Program, winograd: Winograd, dtype: FloatDtype = "float32") -> Library:
    """Compile a flat program, which takes seconds, and load it.

    Args:
        program: The program.
        winograd: Where the kernels of Winograd's convolution come from.
        dtype: Of the kernels.

    Returns:
        The library; its file is gone again.

    Raises:
        DeployError: There is no C compiler, or the program has loops.
    """
    with tempfile.TemporaryDirectory(prefix="dacnn-") as folder:
        file = Path(folder) / "network.so"
        build(to_c(program, name="network", winograd=winograd, dtype=dtype), file)
        return Library(runtime.load(file), file.stat().st_size)


def seconds_of(*calls: Callable[[], object]) -> list[float]:
    """The shortest time of each call, in a few alternating rounds behind one that is not counted."""
    seconds: list[list[float]] = [[] for _ in calls]
    for trial in range(_TRIALS + 1):
        for taken, call in zip(seconds, calls, strict=True):
            begin = time.perf_counter()
            call()
            if trial:
                taken.append(time.perf_counter() - begin)
    return [min(taken) for taken in seconds]

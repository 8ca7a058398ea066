"""Compiled integers against their evaluator: not close, but the same."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dacnn import runtime
from dacnn.deploy.c.integer_source import INTEGER_PATHS
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.integers.run import IntegerRun
from dacnn.errors import ArtefactError, DeployError

# N images, H rows, W columns, C channels

# images that every path is compared on: plain code and exact sums take their time
_IMAGES = 8


def check_bits(program: IntegerProgram, library: Path, images: Tensor, where: str) -> None:
    """Refuse a library that gives other logits than its program, by any path that this processor has.

    Args:
        program: What it was made from.
        library: The shared library.
        images: uint8, shape (N, H, W, C); the first few are compared.
        where: The file, for the message.

    Raises:
        DeployError: A path gives other logits.
    """
    for path in INTEGER_PATHS:
        try:
            compiled = runtime.load(library, path)
        except ArtefactError:
            # of another processor
            continue
        check_same(program, compiled, images, f"{where}: its '{path}' code")


def check_same(
    program: IntegerProgram, run: Callable[[NDArray[np.uint8]], NDArray[np.float32]], images: Tensor, what: str
) -> None:
    """Refuse code that gives other logits than its program.

    Args:
        program: What it was made from.
        run: The code, from images to logits.
        images: uint8, shape (N, H, W, C); the first few are compared.
        what: The code, for the message.

    Raises:
        DeployError: The logits are others.
    """
    some = images[:_IMAGES]
    if not np.array_equal(run(some.numpy()), IntegerRun(program)(some).numpy()):
        raise DeployError(
            f"{what} gives other logits than the integers it was made from: nothing was written; "
            "please report it with the network's plan and the compiler's version"
        )

"""Compiled integers against their evaluator: not close, but the same."""

from pathlib import Path

import numpy as np
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
    some = images[:_IMAGES]
    expected = IntegerRun(program)(some).numpy()
    for path in INTEGER_PATHS:
        try:
            compiled = runtime.load(library, path)
        except ArtefactError:
            # of another processor
            continue
        if not np.array_equal(compiled(some.numpy()), expected):
            raise DeployError(
                f"{where}: its '{path}' code gives other logits than the integers it was made from: nothing was written; "
                "please report it with the network's plan and the compiler's version"
            )

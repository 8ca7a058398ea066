"""What a generated file says of where it comes from."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from dacnn import __version__
from dacnn.deploy.c.literals import comment
from dacnn.deploy.c.source import CSource
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.parity import Parity
from dacnn.deploy.program import Program


def weights_hash(tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of tensors, with their names and shapes, in the order of the names.

    Args:
        tensors: Those of a Program.

    Returns:
        64 hexadecimal digits.
    """
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].shape} {tensors[name].dtype.str}\n".encode())
        found.update(tensors[name].tobytes())
    return found.hexdigest()


def signed(files: CSource, program: Program | IntegerProgram, parity: Parity, dtype: str) -> CSource:
    """Put a comment before source and header: the plan, the weights, the version, how far it is from the network.

    Args:
        files: What was checked.
        program: What it was made from.
        parity: The check's result.
        dtype: Number format of the kernels in the files.

    Returns:
        The files with the comment.
    """
    of = program.input
    mean, std = (" ".join(f"{value:.6g}" for value in values) for values in (of.mean, of.std))
    text = (
        f"/* {comment(program.name)}, written by dacnn {__version__}: to change it, export it again\n"
        f"   images: uint8, {of.height} x {of.width} x {of.channels}, those of another size fitted to it by '{of.fit}'; "
        f"taken as (x / 255 - mean) / deviation,\n   mean {mean}, deviation {std}\n"
        f"   weights: SHA-256 {weights_hash(program.tensors)}; kernels are written in {dtype}\n"
        f"   checked on {parity.images} images against the network in float64: largest error {parity.max_error:.1e} of the "
        f"largest logit,\n   the same class for {parity.top1_agreement:.2%} */\n"
    )
    return dataclasses.replace(files, source=text + files.source, header=text + files.header, example=text + files.example)

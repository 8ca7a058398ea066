"""What the fast code keeps beside the kernels: those in the domain of Winograd's convolution, and scratch. Sizes in floats."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.c import winograd
from dacnn.deploy.c.calls import Call, Calls
from dacnn.deploy.c.literals import counted


@dataclass(frozen=True)
class PreparedKernel:
    """A kernel that is transformed once.

    Attributes:
        array: Name of the array that holds it as it is.
        inputs: Input channels.
        outputs: Output channels.
        offset: Where it begins among all transformed ones.
    """

    array: str
    inputs: int
    outputs: int
    offset: int


@dataclass(frozen=True)
class Prepared:
    """Memory of the fast code.

    Attributes:
        kernels: Those that are transformed once.
        size: Of all of them.
        scratch: Of the tiles of one layer.
        kernel_scratch: Of a kernel that is evaluated, and therefore transformed, in every call.
    """

    kernels: tuple[PreparedKernel, ...]
    size: int
    scratch: int
    kernel_scratch: int

    def offset(self, row: Call) -> int:
        """Where the transformed kernel of a row begins; -1: it has none."""
        offsets: Mapping[str | None, int] = {one.array: one.offset for one in self.kernels}
        return offsets.get(row.kernel, 0) if row.winograd else -1


def prepare(calls: Calls) -> Prepared:
    """Plan it.

    Args:
        calls: The table; its rows say which layers want Winograd's convolution.

    Returns:
        The plan.

    Raises:
        DeployError: The kernels are more than C can count.
    """
    rows = [row for row in calls.rows if row.winograd]
    kernels: dict[str, PreparedKernel] = {}
    size = 0
    for row in rows:
        if row.kernel is not None and row.kernel not in kernels:
            kernels[row.kernel] = PreparedKernel(row.kernel, row.geometry.in_c, row.geometry.out_c, size)
            size = counted(size + _size(row), "the transformed kernels")
    return Prepared(
        tuple(kernels.values()),
        size,
        max((winograd.scratch_floats(row.geometry.in_c) for row in rows), default=0),
        max((_size(row) for row in rows if row.kernel is None), default=0),
    )


def transformed(calls: Calls, prepared: Prepared) -> NDArray[np.float32]:
    """The transformed kernels themselves, one behind the other."""
    return np.concatenate([winograd.transformed(calls.kernels[one.array]) for one in prepared.kernels])


def _size(row: Call) -> int:
    return winograd.transformed_floats(row.geometry.in_c, row.geometry.out_c)

"""A Program whose kernels are numbers of bfloat16: half the bytes, for whoever holds them so. All else stays float32."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.program import KernelStep, Program
from dacnn.deploy.shapes import flat_steps
from dacnn.errors import DeployError


def in_bfloat16(program: Program) -> Program:
    """Round the kernels of a program, and what kernels are computed from.

    Args:
        program: A flat program.

    Returns:
        One with the same steps. Its tensors are float32 still; of kernels the lower halves of the numbers are zeros.

    Raises:
        DeployError: A number is larger than bfloat16 can be, or none; or the program has loops.
    """
    kernels = {str(step.kernel.tensor) for step in flat_steps(program) if isinstance(step, KernelStep)}
    tensors = {name: rounded(tensor) if name in kernels else tensor for name, tensor in program.tensors.items()}
    for name in sorted(kernels):
        if not (np.isfinite(program.tensors[name]) & np.isfinite(tensors[name])).all():
            raise DeployError(
                f"'{name}' has values that are no numbers, or above 3.39e38, the largest of bfloat16: train again"
            )
    return dataclasses.replace(program, tensors=tensors)


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers that bfloat16 has, ties to even; beyond its largest they become infinite."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)

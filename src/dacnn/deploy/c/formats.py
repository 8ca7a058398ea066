"""How the C code holds the numbers of kernels: as floats, or as the upper halves of floats, which are bfloat16."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class KernelFormat:
    """A format, and how the templates name it.

    Attributes:
        type: In C.
        field: Of the description of a convolution: where its kernel is, if it has this format.
        suffix: Ends the names of the functions that read kernels of this format.
        load: The macro that reads a vector.
    """

    type: str
    field: str
    suffix: str
    load: str

    def read(self, number: str) -> str:
        """An expression of this format, as a float."""
        return f"widened({number})" if self.suffix else number


FLOAT32 = KernelFormat("float", "kernel", "", "LOAD")
BFLOAT16 = KernelFormat("uint16_t", "kernel_bfloat16", "_bfloat16", "LOAD_BFLOAT16")


def upper_halves(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Numbers of bfloat16, as `dacnn.deploy.rounding` gives them, without the half that is zeros."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)

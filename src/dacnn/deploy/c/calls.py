"""The table that the C code runs, and the arrays that it names. Values lie pixel by pixel, H x W x C."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.c.memory import Use
from dacnn.deploy.program import Program

# C channels, H rows, W columns

ACTIVATIONS = ("relu", "clip", "sigmoid", "silu", "hardsigmoid", "hardswish", "gelu", "tanh")
# place by place, so that what they give may lie where what they take lies
_OVER_BOTH = ("add", "multiply")
_OVER_FIRST = (*ACTIVATIONS, "scale_shift", "multiply_channels")


@dataclass(frozen=True)
class Geometry:
    """Sizes of a row, as in the C code; rows of equal sizes share one.

    A combination has the templates in `in_c` and the numbers of a kernel in `out_c`; a repetition the tiles in `in_h` and
    `in_w`, the channels of its small kernel in `in_c` and `out_c`; a rotation how far in `kernel_h`.
    """

    in_h: int = 1
    in_w: int = 1
    in_c: int = 1
    out_h: int = 1
    out_w: int = 1
    out_c: int = 1
    kernel_h: int = 1
    kernel_w: int = 1
    stride_h: int = 1
    stride_w: int = 1
    pad_top: int = 0
    pad_left: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1


@dataclass(frozen=True)
class Call:
    """One row of the table.

    Attributes:
        op: What is done.
        geometry: On what sizes.
        x: The value that is read; None where only a kernel is, which goes to scratch.
        y: The value that is written; None likewise.
        z: A second value that is read.
        kernel: The array that holds the kernel; None: it lies in scratch.
        scale: An array of numbers, one a channel.
        shift: Likewise.
        relu: Whether a ReLU is done while storing.
        pool: Whether only the largest of 2x2 is stored.
        winograd: Whether the fast code uses Winograd's convolution.
    """

    op: str
    geometry: Geometry
    x: str | None = None
    y: str | None = None
    z: str | None = None
    kernel: str | None = None
    scale: str | None = None
    shift: str | None = None
    relu: bool = False
    pool: bool = False
    winograd: bool = False

    def use(self) -> Use | None:
        """What it does with values, if anything."""
        if self.y is None:
            return None
        takes = tuple(name for name in (self.x, self.z) if name is not None)
        return Use(takes, self.y, self._over(takes))

    def _over(self, takes: tuple[str, ...]) -> tuple[str, ...]:
        if self.op == "convolve":
            # what is added is read where the sum is stored, but pooling stores elsewhere, and x is read all over again
            return () if self.pool else tuple(name for name in takes[1:] if name != self.x)
        return takes if self.op in _OVER_BOTH else takes[:1] if self.op in _OVER_FIRST else ()


@dataclass
class Calls:
    """The table and what it names.

    Attributes:
        program: What it was made from.
        rows: The table.
        arrays: Stored numbers by name, each once.
        held: Those of the arrays that hold kernels, or what kernels are computed from.
        sizes: How many numbers each value has.
        result: The value that holds the logits.
        kernels: Those kernels of the arrays that Winograd's convolution reads, as (O, I, 3, 3).
        scratch_kernel: Numbers of the largest kernel that is evaluated while running.
    """

    program: Program
    rows: list[Call] = field(default_factory=list)
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    sizes: dict[str, int] = field(default_factory=dict)
    result: str = ""
    kernels: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    scratch_kernel: int = 0

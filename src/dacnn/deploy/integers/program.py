"""The integer program: a network in int8 kernels and uint8 values, with nothing left to decide. Pure data.

A value is uint8, and q means scale * (q - zero). A step that sums up makes an int32 of every output,

    a = sum of (x - zero_x) * w    what is padded counts as x = zero_x; w is 1 where the step has no kernel,
                                   and (y - zero_y) where it multiplies two values

and stores it in the way of its layer: with the channel's c,

    t = a * m[c] + (b[c] << b_shift) + (r - zero_r) * m_r       in int64
    y = min(max(zero + ((t + (1 << (shift - 1))) >> shift), low), high)

m[c] holds what batch norm multiplies by, b[c] what it adds: 6 bytes a channel and layer. A factor near 0 is a small m[c]:
nothing is divided by it. `m` and `b` of one element are for all channels. The logits are stored in int32 in the same way.

A combined kernel is made of the int8 templates of its bank by

    w = min(max((sum over t of k[t] * template[t] + (1 << (shift - 1))) >> shift, -127), 127)

and a repeated one by the table of each tile, see `RepeatedIntegers`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.fusion import Summing
from dacnn.deploy.program import Flatten, MaxPool, Rotate
from dacnn.networks.plan import Input
from dacnn.quantization import Quantity

# O output channels, I input channels, C channels, T templates, R x S tiles

Int8 = NDArray[np.int8]
# sigmoid(x) * 2 ** 15 for x = -8, -8 + 1 / 16, ..., 8
SIGMOID = np.rint(2**15 / (1 + np.exp(-np.arange(-128, 129) / 16))).astype(np.uint16)


@dataclass(frozen=True)
class StoredIntegers:
    """A kernel as it is stored.

    Attributes:
        tensor: Name of an int8 tensor, (O, I, H, W) or (O, I).
        own: Name of an int16 tensor, (O,): the weight of each channel for itself, at the centre, where `tensor` has 0; None:
            no weight stands apart.
    """

    tensor: str
    own: str | None = None


@dataclass(frozen=True, eq=False)
class CombinedIntegers:
    """A combination of templates.

    Attributes:
        tensor: Name of an int8 tensor, (T, O, I, ...).
        coefficients: int16, shape (T,).
        shift: See above.
        own: Name of an int16 tensor, (T, O), combined in the same way, but cut at 32767 instead of 127; None: there is none.
    """

    tensor: str
    coefficients: NDArray[np.int16]
    shift: int
    own: str | None = None


@dataclass(frozen=True, eq=False)
class RepeatedIntegers:
    """A small kernel tiled, each tile (r, s) through a table of its own.

    The weight q of the base becomes, with p = steepness[r, s] and g = gain[r, s],

        u = min(max((q * p) >> 8, -32768), 32767)                       an argument of the sigmoid, in 1 / 4096
        i, f = (u + 32768) >> 8, (u + 32768) & 255
        v = SIGMOID[i] + (((SIGMOID[i + 1] - SIGMOID[i]) * f + 128) >> 8)
        w = min(max((q * v * g + (1 << 28)) >> 29, -127), 127)          in int64

    Attributes:
        tensor: Name of an int8 tensor, (O, I, ...).
        gain: int32, shape (R, S).
        steepness: int32, shape (R, S): minus the steepness of the curve.
    """

    tensor: str
    gain: NDArray[np.int32]
    steepness: NDArray[np.int32]


IntegerKernel = StoredIntegers | CombinedIntegers | RepeatedIntegers


@dataclass(frozen=True, eq=False)
class Store:
    """From sums to what is stored.

    Attributes:
        m: int32, shape (C,) or (1,).
        b: int16, the same shape.
        b_shift: See above.
        shift: See above; 1 or more.
        zero: Of what is stored.
        low: Smallest number that is stored.
        high: Largest one.
        residual: Name of a value that is added.
        residual_zero: Its zero.
        residual_m: Its factor.
    """

    m: NDArray[np.int32]
    b: NDArray[np.int16]
    b_shift: int
    shift: int
    zero: int
    low: int
    high: int
    residual: str | None = None
    residual_zero: int = 0
    residual_m: int = 0


@dataclass(frozen=True, eq=False)
class Sum:
    """A step that sums up and stores.

    Attributes:
        out: Name of what it gives.
        step: What it is: its operands, stride, padding, ...
        zero: Of its first operand.
        store: How its sums are stored.
        kernel: Of a convolution or linear step.
        other_zero: Of its second operand, where it multiplies two.
    """

    out: str
    step: Summing
    zero: int
    store: Store
    kernel: IntegerKernel | None = None
    other_zero: int = 0


@dataclass(frozen=True, eq=False)
class Lookup:
    """A function of every number by itself.

    Attributes:
        out: Name of what it gives.
        x: Of what it takes.
        table: uint8, shape (256,).
    """

    out: str
    x: str
    table: NDArray[np.uint8]


# the last three move numbers and change none
IntegerStep = Sum | Lookup | MaxPool | Rotate | Flatten


@dataclass(frozen=True, eq=False)
class IntegerProgram:
    """A network in integers.

    Attributes:
        name: What the network is called.
        input: What the images are.
        classes: Names of the classes, one for each logit.
        steps: What is done, beginning with a `Sum` that normalises the value `images`.
        result: Name of the value that holds the logits.
        logit: What its numbers mean; the scale is a power of two where they are int32.
        tensors: int8 kernels, templates and bases, and what stands apart of them in int16, each stored once.
        shapes: Of every value, for one image.
    """

    name: str
    input: Input
    classes: tuple[str, ...]
    steps: tuple[IntegerStep, ...]
    result: str
    logit: Quantity
    tensors: Mapping[str, NDArray[Any]]
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def kernel_bytes(self) -> int:
        """Bytes of the kernels."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def layer_bytes(self) -> int:
        """Bytes of what the layers store for themselves: factors, shifts, tables, what makes kernels of others."""
        return sum(array.nbytes for step in self.steps for array in _arrays(step))


def _arrays(*parts: Any) -> Iterator[NDArray[Any]]:
    for part in parts:
        if isinstance(part, np.ndarray):
            yield part
        elif hasattr(part, "__dataclass_fields__"):
            yield from _arrays(*vars(part).values())

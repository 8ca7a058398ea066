"""What the templates of the fast C code (`fast.c.jinja`) name."""

from collections.abc import Sequence
from typing import Any

from dacnn.deploy.c.formats import KernelFormat
from dacnn.deploy.c.isa import ISAS, Isa
from dacnn.deploy.c.winograd import TILES
from dacnn.sharing.winograd import LARGE_POINT, SMALL_POINT


def fast_values(
    padding: int,
    taps: int,
    *,
    depthwise: bool,
    winograd: bool,
    direct_formats: Sequence[KernelFormat],
    transforms: Sequence[KernelFormat],
    isas: Sequence[Isa] = ISAS,
) -> dict[str, Any]:
    """Values for the templates, beside the `name` that begins all names.

    Args:
        padding: The most channels that an image has which a fast convolution reads.
        taps: Rows times columns of the largest kernel that is convolved directly or depthwise; 0: there is none.
        depthwise: Whether a convolution is depthwise.
        winograd: Whether a convolution is Winograd's.
        direct_formats: Formats of the kernels that are convolved directly or depthwise.
        transforms: Formats of the kernels that are transformed in C.
        isas: Instruction sets to write code for.

    Returns:
        The values by name.
    """
    return {
        "padding": padding,
        "taps": taps,
        "depthwise": depthwise,
        "winograd": winograd,
        "direct_formats": tuple(direct_formats),
        "transforms": tuple(transforms),
        "isas": isas,
        "winograd_tiles": TILES,
        "small_point": SMALL_POINT,
        "large_point": LARGE_POINT,
    }

"""An integer program as C99, in the form of `source`: one source, its header, an example that uses them."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dacnn.deploy.c import integer_arrays
from dacnn.deploy.c.calls import Geometry
from dacnn.deploy.c.integer_tables import Table, table
from dacnn.deploy.c.integer_translate import LOGITS, IntegerCall, IntegerCalls, translate_integers
from dacnn.deploy.c.literals import counted, identifier, integers, string
from dacnn.deploy.c.memory import Memory, plan
from dacnn.deploy.c.source import ABI, CSource, makefile_line, render
from dacnn.deploy.integers.program import SIGMOID, IntegerProgram
from dacnn.deploy.program import IMAGES

# offsets are counted in bytes; vectors are read over the end of a value by less than this
_ALIGN = 64
# where a value lies that is the caller's image
_IMAGE = -1
_POINTERS = {"kernel": "const int8_t *", "own": "const int16_t *"}
_COMBINED = {"bank": "const int8_t *", "coefficients": "const int16_t *", "own": "const int16_t *"}
_REPEATED = {"base": "const int8_t *", "gain": "const int32_t *", "steepness": "const int32_t *"}
# pixels of the tiles of the fast code
_TILES = (6, 4, 1)
# tiles of Winograd's convolution that are there at a time, as in int8_avx2.c.jinja
_WINOGRAD_TILES = 24


@dataclass(frozen=True)
class _Isa:
    """Code for an instruction set, see `isa`."""

    label: str
    features: tuple[str, ...]
    guard: str = "defined(__x86_64__)"


# the fastest first
_ISAS = (_Isa("vnni", ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni")), _Isa("avx2", ("avx2",)))
INTEGER_PATHS = ("portable", *(isa.label for isa in _ISAS))


def to_c_int8(program: IntegerProgram, *, name: str) -> CSource:
    """Write an integer program as C.

    Args:
        program: The program.
        name: What the file shall be called without its ending; all its names begin with that.

    Returns:
        The files. All of their paths give the same bits.

    Raises:
        DeployError: `name` is no name in C, or a value is too large to count.
    """
    calls = translate_integers(program)
    uses = [use for use in (row.use() for row in calls.rows) if use is not None]
    memory = plan(uses, calls.sizes, {IMAGES: _IMAGE, LOGITS: 0}, _ALIGN)
    values = _names(identifier(name), program, calls) | _sizes(calls, memory)
    values["arrays"] = _arrays(calls)
    values["tables"] = _tables(calls, memory)
    return CSource(
        name,
        render("integer_network.c.jinja", values),
        render("network.h.jinja", values),
        render("example.c.jinja", values),
        values["makefile_line"],
        values["workspace_bytes"],
        values["context_bytes"],
        values["portable_workspace_bytes"],
    )


def _names(name: str, program: IntegerProgram, calls: IntegerCalls) -> dict[str, Any]:
    scale = program.logit.scale
    # a product by a power of two is exact in float
    exact = float(np.float32(scale)) == scale and calls.wide
    return {
        "name": name,
        "header_name": f"{name}.h",
        "abi": ABI,
        "input": program.input,
        "classes": [string(word) for word in program.classes],
        "makefile_line": makefile_line(name),
        "memory": "integer_memory.h.jinja",
        "preparing": "integer_prepare.c.jinja",
        "fast_where": "defined(__x86_64__)",
        "sigmoid": SIGMOID.tolist(),
        "tiles": _TILES,
        "logit_wide": calls.wide,
        "logit_scale": scale.hex() + ("f" if exact else ""),
        "logit_type": "float" if exact else "double",
        "logit_zero": program.logit.zero,
    }


def _sizes(calls: IntegerCalls, memory: Memory) -> dict[str, Any]:
    """Of memory, and what the code depends on."""
    convolutions = [row.geometry for row in calls.rows if row.op == "convolve"]
    dense = [of for of in convolutions if not _depthwise(of)]
    prepared = tuple(calls.transformed.values()) if dense else ()
    transformed = sum(one.size for one in prepared)
    words = _words(memory.size + _ALIGN)
    kernel = _words(calls.made_bytes + integer_arrays.SLACK) if calls.made_bytes else 0
    own = (calls.made_own + integer_arrays.BLOCK + 1) // 2 * 2 if calls.made_own else 0
    tiles = max((_tile_bytes(one.inputs) for one in prepared), default=0)
    scratch = _words(max([tiles, *map(_padded_bytes, dense)]) + _ALIGN) if dense else 0
    portable = 4 * (words + kernel) + 2 * own
    return {
        "ops": sorted({row.op for row in calls.rows}),
        "features": (*(("dense",) if dense else ()), *(("depthwise",) if len(dense) < len(convolutions) else ())),
        "isas": _ISAS if dense else (),
        "winograd": bool(prepared),
        "prepared": prepared,
        "transformed": transformed,
        "values": words,
        "kernel_scratch": kernel,
        "own_scratch": own,
        "scratch": scratch,
        "workspace_bytes": counted(portable + 4 * scratch, "the workspace", "bytes"),
        "portable_workspace_bytes": portable,
        "context_bytes": counted(4 + 2 * transformed, "the context", "bytes"),
        "portable_context_bytes": 4,
    }


def _depthwise(of: Geometry) -> bool:
    return integer_arrays.is_depthwise(of.out_c, of.in_c // of.groups, of.groups)


def _words(size: int) -> int:
    return -(-size // 4)


def _tile_bytes(inputs: int) -> int:
    """Of products, transformed pixels, and a pixel outside of the image."""
    return _WINOGRAD_TILES * 36 * (2 * inputs + 64) + inputs


def _padded_bytes(of: Geometry) -> int:
    """Of an image with its padding around it; 0: it is read as it is."""
    height = (of.out_h - 1) * of.stride_h + (of.kernel_h - 1) * of.dilation_h + 1
    width = (of.out_w - 1) * of.stride_w + (of.kernel_w - 1) * of.dilation_w + 1
    as_it_is = of.pad_top == 0 and of.pad_left == 0 and height <= of.in_h and width <= of.in_w
    return 0 if as_it_is else height * width * of.in_c


def _arrays(calls: IntegerCalls) -> list[dict[str, Any]]:
    stores = {
        "factors": ("int32_t", calls.factors),
        "addends": ("int16_t", calls.addends),
        "lookups": ("uint8_t", calls.tables),
    }
    joined = {name: (kind, np.concatenate(parts)) for name, (kind, parts) in stores.items() if parts}
    return [
        {"name": name, "type": kind, "length": values.size, "numbers": integers(values)}
        for name, (kind, values) in (calls.arrays | joined).items()
    ]


def _tables(calls: IntegerCalls, memory: Memory) -> list[Table]:
    geometries = list(dict.fromkeys(row.geometry for row in calls.rows))
    sums = [
        row | {"residual": -1 if name is None else memory.offsets[name]}
        for row, name in zip(calls.sums, calls.residuals, strict=True)
    ]
    steps = [_step(row, geometries.index(row.geometry), memory) for row in calls.rows]
    made = [
        table("geometry", "geometries", map(asdict, geometries), about="sizes of a step"),
        table(
            "sum_row",
            "sum_rows",
            sums,
            _POINTERS,
            ("residual", "transformed"),
            "a step that sums up: what it reads, where its factors and addends begin, how it stores",
        ),
    ]
    if calls.combinations:
        made.append(table("combination", "combinations", calls.combinations, _COMBINED))
    if calls.repetitions:
        made.append(table("repetition", "repetitions", calls.repetitions, _REPEATED))
    about = "a step: offsets are bytes of the workspace, -1 the image; `item` is a row of the table that belongs to `op`"
    return [*made, table("step", "steps", steps, {"op": "uint8_t"}, signed=("x", "z"), about=about)]


def _step(row: IntegerCall, geometry: int, memory: Memory) -> dict[str, Any]:
    x, y, z = (0 if value is None else memory.offsets[value] for value in (row.x, row.y, row.z))
    return {"op": f"OP_{row.op.upper()}", "geometry": geometry, "item": row.item, "x": x, "y": y, "z": z}

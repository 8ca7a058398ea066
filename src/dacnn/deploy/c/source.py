"""A Program as C99: one source, its header, an example that uses them. Templates give the text, this gives their values."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import jinja2

from dacnn.deploy.c.arrays import SLACK, depthwise
from dacnn.deploy.c.calls import ACTIVATIONS, Call, Calls
from dacnn.deploy.c.fast import fast_values
from dacnn.deploy.c.formats import BFLOAT16, FLOAT32, KernelFormat, upper_halves
from dacnn.deploy.c.isa import ISAS
from dacnn.deploy.c.literals import comment, counted, floats, identifier, integers, string
from dacnn.deploy.c.memory import Memory, plan
from dacnn.deploy.c.prepared import prepare, transformed
from dacnn.deploy.c.translate import translate
from dacnn.deploy.program import IMAGES, Program
from dacnn.deploy.rounding import in_bfloat16

Winograd = Literal["init", "file", "off"]
FloatDtype = Literal["float32", "bfloat16"]
# of the description that a shared library gives; changes with its fields
ABI = 1
# offsets are counted in floats; a vector of 64 bytes that begins at one lies in one line of the cache
_ALIGN = 16
_FLOAT = 4
# of the value that lies in the caller's memory
_LOGITS = -1
# those for which C has functions in math.h only
_TRANSCENDENTAL = frozenset(("sigmoid", "silu", "gelu", "tanh"))


@dataclass(frozen=True)
class CSource:
    """Files of C that compute what a Program does.

    Attributes:
        name: What all names in them begin with.
        source: NAME.c: needs its header and a C99 compiler, nothing else.
        header: NAME.h.
        example: NAME_example.c: a program that reads an image and prints its class.
        makefile_line: How that is compiled, as a rule of a Makefile.
        workspace_bytes: Memory that one call needs, given by the caller.
        context_bytes: Memory that all calls share, given by the caller.
        portable_workspace_bytes: As workspace_bytes, of the plain code alone; that shares no memory worth counting.
    """

    name: str
    source: str
    header: str
    example: str
    makefile_line: str
    workspace_bytes: int
    context_bytes: int
    portable_workspace_bytes: int


def to_c(program: Program, *, name: str, winograd: Winograd = "init", dtype: FloatDtype = "float32") -> CSource:
    """Write a Program as C.

    Each kernel is in it once, and is read by a loop over the steps. There is no heap and no state but what the caller gives.

    Args:
        program: A flat Program.
        name: What the file shall be called without its ending; all its names begin with that.
        winograd: Where the kernels of Winograd's convolution come from: `init` computes them at the start, `file` has them in
            the file, `off` does without that convolution.
        dtype: `bfloat16` rounds kernels, and holds them in half the bytes; all that is computed is float32.

    Returns:
        The files.

    Raises:
        DeployError: `name` is no name in C, the Program has loops, or has numbers that are none, or too large for `dtype`.
    """
    stored = BFLOAT16 if dtype == "bfloat16" else FLOAT32
    calls = translate(in_bfloat16(program) if stored is BFLOAT16 else program, winograd != "off")
    memory = _places(calls)
    names, sizes = _names(identifier(name), program), _sizes(calls, memory, stored, winograd == "file")
    values = names | _table(calls, memory) | sizes | {"stored": stored, "arrays": _arrays(calls, stored)}
    return CSource(
        name,
        render("network.c.jinja", values),
        render("network.h.jinja", values),
        render("example.c.jinja", values),
        values["makefile_line"],
        values["workspace_bytes"],
        values["context_bytes"],
        values["portable_workspace_bytes"],
    )


def to_footprint(name: str) -> str:
    """The least program around a network of this name, to measure what it takes."""
    return render("footprint.c.jinja", {"name": name, "header_name": f"{name}.h"})


def _places(calls: Calls) -> Memory:
    uses = [use for use in (row.use() for row in calls.rows) if use is not None]
    return plan(uses, calls.sizes, {IMAGES: 0, calls.result: _LOGITS}, _ALIGN)


# what the templates name, in three parts


# of the preprocessor: where there is code for vectors
_FAST_WHERE = "(defined(__x86_64__) || defined(__wasm_simd128__) || (defined(__ARM_NEON) && defined(__ARM_FEATURE_FMA)))"


def _names(name: str, program: Program) -> dict[str, Any]:
    return {
        "name": name,
        "header_name": f"{name}.h",
        "abi": ABI,
        "input": program.input,
        "classes": [string(word) for word in program.classes],
        "makefile_line": makefile_line(name),
        "memory": "memory.h.jinja",
        "preparing": "prepare.c.jinja",
        "fast_where": _FAST_WHERE,
    }


def _table(calls: Calls, memory: Memory) -> dict[str, Any]:
    geometries = list(dict.fromkeys(row.geometry for row in calls.rows))
    ops = sorted({row.op for row in calls.rows})
    return {
        "geometries": [astuple(geometry) for geometry in geometries],
        "steps": [_step(row, geometries.index(row.geometry), memory) for row in calls.rows],
        "ops": ops,
        "activations": ACTIVATIONS,
        "counts": not set(ops).isdisjoint((*ACTIVATIONS, "add", "multiply")),
        "needs_math": not _TRANSCENDENTAL.isdisjoint(ops),
    }


def _arrays(calls: Calls, stored: KernelFormat) -> list[dict[str, Any]]:
    return [
        {
            "name": array,
            "type": stored.type if array in calls.held else FLOAT32.type,
            "length": numbers.size + SLACK,
            "numbers": integers(upper_halves(numbers)) if stored is BFLOAT16 and array in calls.held else floats(numbers),
        }
        for array, numbers in calls.arrays.items()
    ]


def _step(row: Call, geometry: int, memory: Memory) -> dict[str, Any]:
    x, y, z = (0 if value is None else memory.offsets[value] for value in (row.x, row.y, row.z))
    return {"row": row, "geometry": geometry, "x": x, "y": y, "z": z}


def _sizes(calls: Calls, memory: Memory, stored: KernelFormat, in_file: bool) -> dict[str, Any]:
    """Of memory, and what the code for convolutions depends on."""
    convolutions = [row for row in calls.rows if row.op == "convolve"]
    direct = [row for row in convolutions if not row.winograd]
    kinds = {depthwise(of.out_c, of.in_c // of.groups, of.groups) for of in (row.geometry for row in convolutions)}
    prepared = prepare(calls)
    in_file = in_file and prepared.size > 0
    kernel_scratch = calls.scratch_kernel + SLACK if calls.scratch_kernel else 0
    portable = memory.size + SLACK + kernel_scratch
    # kernels that stand transformed in the file are not transformed in C
    transformed_here = [row for row in convolutions if row.winograd and not (in_file and row.kernel)]
    return {
        **fast_values(
            max((row.geometry.in_c for row in convolutions), default=0),
            max((row.geometry.kernel_h * row.geometry.kernel_w for row in direct), default=0),
            depthwise=True in kinds,
            winograd=prepared.scratch > 0,
            direct_formats=_formats(direct, stored),
            transforms=_formats(transformed_here, stored),
            isas=ISAS if convolutions else (),
        ),
        "formats": _formats(convolutions, stored),
        "dense": False in kinds,
        "prepared": () if in_file else prepared.kernels,
        "offsets": [prepared.offset(row) for row in calls.rows],
        "transformed": prepared.size,
        "transformed_in_file": floats(transformed(calls, prepared)) if in_file else "",
        "transformed_scratch": prepared.kernel_scratch,
        "scratch": prepared.scratch,
        "kernel_scratch": kernel_scratch,
        "values": memory.size + SLACK,
        "workspace_bytes": counted(_FLOAT * (portable + prepared.scratch + prepared.kernel_scratch), "the workspace", "bytes"),
        "context_bytes": counted(_FLOAT * (1 + (0 if in_file else prepared.size)), "the context", "bytes"),
        "portable_workspace_bytes": _FLOAT * portable,
        "portable_context_bytes": _FLOAT,
    }


def _formats(rows: Sequence[Call], stored: KernelFormat) -> list[KernelFormat]:
    """What the rows read their kernels as: one that is computed is of floats."""
    found = {stored if row.kernel else FLOAT32 for row in rows}
    return [one for one in (BFLOAT16, FLOAT32) if one in found]


def makefile_line(name: str) -> str:
    """How the example is compiled."""
    return f"{name}_example: {name}_example.c {name}.c {name}.h\n\t$(CC) -std=c99 -O2 -o $@ {name}_example.c {name}.c -lm"


def render(template: str, values: dict[str, Any]) -> str:
    """The text of a template."""
    return _ENVIRONMENT.get_template(template).render(values)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("dacnn.deploy.c"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)
_ENVIRONMENT.filters["comment"] = comment

"""A Program as C99: one source, its header, an example that uses them. Templates give the text, this gives their values."""

from dataclasses import astuple, dataclass
from typing import Any, Literal

import jinja2

from dacnn.deploy.c.arrays import SLACK, depthwise
from dacnn.deploy.c.calls import ACTIVATIONS, Call, Calls
from dacnn.deploy.c.literals import comment, floats, identifier, string
from dacnn.deploy.c.memory import Memory, plan
from dacnn.deploy.c.translate import translate
from dacnn.deploy.program import IMAGES, Program

Winograd = Literal["init", "file", "off"]
# of the description that a shared library gives; changes with its fields
ABI = 1
# offsets are counted in floats; a vector of 64 bytes that begins at one lies in one line of the cache
_ALIGN = 16
_FLOAT = 4
# of the value that lies in the caller's memory
_LOGITS = -1
# those for which C has functions in math.h only
_TRANSCENDENTAL = frozenset(("sigmoid", "silu", "gelu", "tanh", "repeat"))


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
    """

    name: str
    source: str
    header: str
    example: str
    makefile_line: str
    workspace_bytes: int
    context_bytes: int


def to_c(program: Program, *, name: str, winograd: Winograd = "init") -> CSource:
    """Write a Program as C.

    Each kernel is in it once, and is read by a loop over the steps. There is no heap and no state but what the caller gives.

    Args:
        program: A flat Program.
        name: What the file shall be called without its ending; all its names begin with that.
        winograd: Where the kernels of Winograd's convolution come from: `init` computes them at the start, `file` has them in
            the file, `off` does without that convolution.

    Returns:
        The files.

    Raises:
        DeployError: `name` is no name in C, the Program has loops, or has numbers that are none.
    """
    calls = translate(program)
    memory = _places(calls)
    values = _values(identifier(name), calls, memory)
    return CSource(
        name,
        _render("network.c.jinja", values),
        _render("network.h.jinja", values),
        _render("example.c.jinja", values),
        values["makefile_line"],
        values["workspace_bytes"],
        values["context_bytes"],
    )


def _places(calls: Calls) -> Memory:
    uses = [use for use in (row.use() for row in calls.rows) if use is not None]
    return plan(uses, calls.sizes, {IMAGES: 0, calls.result: _LOGITS}, _ALIGN)


def _values(name: str, calls: Calls, memory: Memory) -> dict[str, Any]:
    """What the templates name."""
    program = calls.program
    geometries = list(dict.fromkeys(row.geometry for row in calls.rows))
    ops = sorted({row.op for row in calls.rows})
    kernel_scratch = calls.scratch_kernel + SLACK if calls.scratch_kernel else 0
    workspace = memory.size + SLACK
    return {
        "name": name,
        "header_name": f"{name}.h",
        "abi": ABI,
        "input": program.input,
        "classes": [string(word) for word in program.classes],
        "arrays": {array: floats(numbers) for array, numbers in calls.arrays.items()},
        "lengths": {array: numbers.size + SLACK for array, numbers in calls.arrays.items()},
        "geometries": [astuple(geometry) for geometry in geometries],
        "steps": [_step(row, geometries.index(row.geometry), memory) for row in calls.rows],
        "ops": ops,
        "activations": ACTIVATIONS,
        "counts": not set(ops).isdisjoint((*ACTIVATIONS, "add", "multiply")),
        "features": _features(calls),
        "needs_math": not _TRANSCENDENTAL.isdisjoint(ops),
        "kernel_scratch": kernel_scratch,
        "transformed": 0,
        "scratch": 0,
        "path_words": "",
        "values": workspace,
        "workspace_bytes": _FLOAT * (workspace + kernel_scratch),
        "context_bytes": _FLOAT,
        "makefile_line": _makefile_line(name),
    }


def _step(row: Call, geometry: int, memory: Memory) -> dict[str, Any]:
    x, y, z = (0 if value is None else memory.offsets[value] for value in (row.x, row.y, row.z))
    words = {key: getattr(row, key) for key in ("op", "kernel", "scale", "shift", "relu", "pool")}
    return {**words, "geometry": geometry, "x": x, "y": y, "z": z, "adds": row.z is not None}


def _features(calls: Calls) -> set[str]:
    """Kinds of convolutions."""
    sizes = [row.geometry for row in calls.rows if row.op == "convolve"]
    return {"depthwise" if depthwise(of.out_c, of.in_c // of.groups, of.groups) else "dense" for of in sizes}


def _makefile_line(name: str) -> str:
    return f"{name}_example: {name}_example.c {name}.c {name}.h\n\t$(CC) -std=c99 -O3 -o $@ {name}_example.c {name}.c -lm"


def _render(template: str, values: dict[str, Any]) -> str:
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

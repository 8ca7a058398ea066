"""A network as files of C, compiled and compared before they take their places."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dacnn.checkpoint import replacing
from dacnn.deploy.c.build import build
from dacnn.deploy.c.integer_source import to_c_int8
from dacnn.deploy.c.literals import identifier
from dacnn.deploy.c.provenance import signed
from dacnn.deploy.c.source import CSource, Winograd, to_c
from dacnn.deploy.c.target import Footprint, Microcontroller, check_budget, footprint
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.parity import Parity
from dacnn.deploy.program import Program
from dacnn.errors import DeployError

Dtype = Literal["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        parity: How far the compiled code is from the network.
        others: The files beside the source.
        workspace_bytes: Memory that one call needs.
        context_bytes: Memory that all calls share.
        footprint: Memory of the microcontroller that was named.
    """

    parity: Parity
    others: tuple[Path, ...]
    workspace_bytes: int
    context_bytes: int
    footprint: Footprint | None


@dataclass(frozen=True)
class Wanted:
    """How the files shall be.

    Attributes:
        dtype: Number format of the kernels; int8 is that of the values too.
        winograd: Where the kernels of Winograd's convolution come from, as for `to_c`; None: init.
        build: Whether the shared library is written.
        target: The microcontroller that the network shall run on.
        flash_budget: Bytes of its flash that the network may take; None: any.
        ram_budget: Bytes of its RAM; None: any.
    """

    dtype: Dtype = "float32"
    winograd: Winograd | None = None
    build: bool = False
    target: Microcontroller | None = None
    flash_budget: int | None = None
    ram_budget: int | None = None


def files_of(program: Program | IntegerProgram, name: str, wanted: Wanted) -> CSource:
    """A program as C.

    Args:
        program: A flat Program, or one in integers.
        name: What all names in it begin with.
        wanted: The format of kernels, and how Winograd's come to be.

    Returns:
        The files.

    Raises:
        DeployError: A step cannot be expressed, or is too large.
    """
    if isinstance(program, IntegerProgram):
        return to_c_int8(program, name=name)
    assert wanted.dtype != "int8", "such a program is in integers"
    return to_c(program, name=name, winograd=wanted.winograd or "init", dtype=wanted.dtype)


def write_c(program: Program | IntegerProgram, path: Path, compare: Callable[[Path], Parity], wanted: Wanted) -> Written:
    """Write NAME.c, NAME.h and NAME_example.c, and if wanted the shared library NAME.so, all or none.

    Args:
        program: A flat Program, or one in integers.
        path: Of the source; its name is what all names in it begin with.
        compare: Compares a shared library with the network, and refuses what is too far from it.
        wanted: How they shall be.

    Returns:
        What was written.

    Raises:
        DeployError: The file's name is no name in C, there is no compiler or it refuses, the code computes something else,
            or it does not fit the microcontroller.
        CheckpointError: A file cannot be written.
    """
    if path.suffix != ".c":
        raise DeployError(f"{path}: a source of C is called NAME.c: call it {path.with_suffix('.c').name}")
    files = files_of(program, identifier(path.stem), wanted)
    others = [path.with_suffix(".h"), path.with_name(f"{path.stem}_example.c")]
    with ExitStack() as stack:
        beside = [stack.enter_context(replacing(other)) for other in (path, *others)]
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dacnn-")))
        built = folder / "net.so"
        if wanted.build:
            others.append(path.with_suffix(".so"))
            built = stack.enter_context(replacing(others[-1]))
        build(files, built)
        parity = compare(built)
        size = footprint(files, wanted.target) if wanted.target else None
        if size:
            check_budget(size, wanted.flash_budget, wanted.ram_budget, str(path))
        done = signed(files, program, parity, wanted.dtype)
        for place, text in zip(beside, (done.source, done.header, done.example), strict=True):
            place.write_bytes(text.encode("ascii"))
    return Written(parity, tuple(others), files.workspace_bytes, files.context_bytes, size)

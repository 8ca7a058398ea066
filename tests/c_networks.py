"""Networks as C: compiled with every warning an error and under sanitizers, run, and compared with their interpreter."""

import dataclasses
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import integer_interpreter
from dacnn.config import NetworkConfig
from dacnn.deploy.c.build import write
from dacnn.deploy.c.integer_source import to_c_int8
from dacnn.deploy.c.source import CSource, FloatDtype, Winograd, to_c
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.integers.quantize import quantize
from dacnn.deploy.program import IMAGES, Add, KernelStep, Program, Step, operands
from dacnn.networks.network import Network
from dacnn.networks.plan import Input
from dacnn.networks.zoo import plan_of
from interpreter import run
from reference import randomise

HARNESS = Path(__file__).parent / "deploy" / "c_harness.c"
STRICT = ("-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror")
# unoptimised: most of the time goes into compiling, and what optimisers do is for the tests of the fast code
SANITIZED = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
PATHS = ("portable", "vector", "avx2", "avx512", "vnni")
ARM64 = "aarch64-linux-gnu-gcc"
COUNT = 2
# of the largest logit: random deep plans err by 1e-4 in float32 itself, and Winograd's convolution by a few times that
TOLERANCE = 1e-3


def network_of(name: str, classes: tuple[str, ...], input: Input = Input(), seed: int = 0, **settings: Any) -> Network:  # noqa: B008
    """A network of the zoo, away from its start, with classes and images of one's own."""
    plan = plan_of(NetworkConfig(name=name, **settings), input, classes)
    return randomise(Network(plan, torch.Generator().manual_seed(seed)), seed).eval()


def tool(name: str) -> str:
    """A program that a test needs; without it the test is skipped, but fails where all must be there."""
    found = shutil.which(name)
    if found is None:
        said = f"{name} is missing: apt-get install what apt.txt lists"
        if os.environ.get("DACNN_REQUIRE_TOOLS"):
            pytest.fail(said)
        pytest.skip(said)
    return found


def command_of(binary: Path, cc: str) -> tuple[str, ...]:
    """How to run what a compiler made; for other processors than this one, emulated."""
    return (tool("qemu-aarch64"), str(binary)) if cc == ARM64 else (str(binary),)


def files_of(
    program: Program | IntegerProgram, name: str, winograd: Winograd = "init", dtype: FloatDtype = "float32"
) -> CSource:
    if isinstance(program, IntegerProgram):
        return to_c_int8(program, name=name)
    return to_c(program, name=name, winograd=winograd, dtype=dtype)


def with_rounded_kernels(program: Program) -> Program:
    """The program with kernels of bfloat16, rounded by PyTorch."""
    kernels = {str(step.kernel.tensor) for step in program.operations() if isinstance(step, KernelStep)}
    rounded = {name: torch.tensor(program.tensors[name]).bfloat16().float().numpy() for name in kernels}
    return dataclasses.replace(program, tensors={**program.tensors, **rounded})


def compiled(
    programs: Sequence[Program | IntegerProgram],
    folder: Path,
    cc: str = "gcc",
    flags: Sequence[str] = SANITIZED,
    winograd: Winograd = "init",
    dtype: FloatDtype = "float32",
) -> Path:
    """One executable that runs all of them."""
    names = [f"net{index}" for index in range(len(programs))]
    files = [files_of(program, name, winograd, dtype) for name, program in zip(names, programs, strict=True)]
    sources = [write(one, folder).name for one in files]
    lines = [f'#include "{name}.h"' for name in names]
    (folder / "networks.h").write_text("\n".join([*lines, f"#define NETWORKS(X) {' '.join(f'X({name})' for name in names)}\n"]))
    words = [tool(cc), *STRICT, *flags, f"-DIMAGES={COUNT}", f"-I{folder}", "-o", "networks", *sources, str(HARNESS), "-lm"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    return folder / "networks"


def executed(
    programs: Sequence[Program | IntegerProgram], images: Sequence[NDArray[np.uint8]], command: Sequence[str]
) -> list[dict[str, NDArray[np.float32]]]:
    """For each program the logits by each path that this processor has."""
    stdin = b"".join(part.tobytes() for part in images)
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[:4000]
    rest, found = done.stdout, []
    for program in programs:
        logits: dict[str, NDArray[np.float32]] = {}
        for path in PATHS:
            there, rest = rest[0], rest[1:]
            if there:
                size = 4 * COUNT * len(program.classes)
                logits[path] = np.frombuffer(rest[:size], np.float32).reshape(COUNT, -1)
                rest = rest[size:]
        found.append(logits)
    assert rest == b""
    return found


def side_by_side(programs: Iterable[Program]) -> Program:
    """One program that runs all of them on the same images, which must be of one kind, and adds their logits up."""
    steps: list[Step] = []
    tensors: dict[str, NDArray[np.float32]] = {}
    total = ""
    for number, of in enumerate(programs):
        names = {name: name if name == IMAGES else f"{number}.{name}" for step in of.steps for name in operands(step)}
        names |= {step.out: f"{number}.{step.out}" for step in of.steps}
        tensors |= {f"{number}.{name}": tensor for name, tensor in of.tensors.items()}
        steps += [_renamed(step, names, f"{number}.") for step in of.steps]
        if total:
            steps.append(Add(f"sum{number}", total, names[of.result]))
        total = f"sum{number}" if total else names[of.result]
    return dataclasses.replace(of, steps=tuple(steps), tensors=tensors, result=total)


def _renamed(step: Any, names: Mapping[str, str], prefix: str) -> Any:
    """A step with other names of values and tensors."""
    changes: dict[str, Any] = {field: names[getattr(step, field)] for field in ("out", "x", "y") if hasattr(step, field)}
    for field in ("scale", "shift"):
        if getattr(step, field, None) is not None:
            changes[field] = prefix + getattr(step, field)
    if hasattr(step, "kernel"):
        tensors = {item.name: prefix + getattr(step.kernel, item.name) for item in dataclasses.fields(step.kernel)}
        changes["kernel"] = dataclasses.replace(step.kernel, **tensors)
    return dataclasses.replace(step, **changes)


def images_for(program: Program | IntegerProgram, seed: int = 0) -> NDArray[np.uint8]:
    of = program.input
    shape = (COUNT, of.height, of.width, of.channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def check(
    programs: Mapping[str, Program],
    cc: str = "gcc",
    flags: Sequence[str] = SANITIZED,
    winograd: Winograd = "init",
    relative: float = TOLERANCE,
    paths: tuple[str, ...] | None = None,
    dtype: FloatDtype = "float32",
) -> None:
    """Every path of every program against the interpreter; `paths` are those that there must be, None: the plain one."""
    of = list(programs.values())
    images = [images_for(program) for program in of]
    with tempfile.TemporaryDirectory() as folder:
        found = executed(of, images, command_of(compiled(of, Path(folder), cc, flags, winograd, dtype), cc))
    for name, program, part, logits_by in zip(programs, of, images, found, strict=True):
        expected = run(program if dtype == "float32" else with_rounded_kernels(program), part)
        assert "portable" in logits_by if paths is None else paths == tuple(logits_by)
        for path, logits in logits_by.items():
            error = np.abs(logits - expected).max() / np.abs(expected).max()
            assert error <= relative, f"{name}, {path}: {error:.1e}"


def integers_of(program: Program) -> IntegerProgram:
    """In int8, calibrated on noise."""
    return quantize(program, calibrate(program, torch.from_numpy(images_for(program, 1))))


def check_int8(
    programs: Mapping[str, IntegerProgram],
    cc: str = "gcc",
    flags: Sequence[str] = SANITIZED,
    paths: tuple[str, ...] | None = None,
) -> None:
    """Every path of every program gives the interpreter's bits; `paths` are those that there must be, None: the plain one."""
    of = list(programs.values())
    images = [images_for(one) for one in of]
    with tempfile.TemporaryDirectory() as folder:
        found = executed(of, images, command_of(compiled(of, Path(folder), cc, flags), cc))
    for name, one, part, logits_by in zip(programs, of, images, found, strict=True):
        expected = integer_interpreter.run(one, part)
        assert "portable" in logits_by if paths is None else paths == tuple(logits_by)
        for path, logits in logits_by.items():
            np.testing.assert_array_equal(logits, expected, err_msg=f"{name}, {path}")

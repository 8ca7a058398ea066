"""A network as a WebAssembly module, for browsers and whatever else runs such: the generated C, compiled for that machine.

NAME.wasm holds each kernel once and needs nothing, neither imports nor a runtime; NAME.mjs loads it.
"""

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from dacnn import __version__
from dacnn.checkpoint import replacing
from dacnn.deploy.c.build import compile_with, found, write
from dacnn.deploy.c.files import Wanted, Written, files_of
from dacnn.deploy.c.literals import comment
from dacnn.deploy.c.provenance import weights_hash
from dacnn.deploy.c.source import CSource, render
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.parity import Parity
from dacnn.deploy.program import Program
from dacnn.errors import DeployError

# N images, H rows, W columns, C channels, K classes

# every browser has its vectors of four floats, since 2021 (Safari: 2023). -O2 would save 5 % of the bytes, and cost int8 a
# quarter of its speed
FLAGS = ("--target=wasm32-wasi", "-std=c99", "-O3", "-msimd128", "-nostdlib", "-Wl,--no-entry", "-Wl,--strip-all")
_REMEDY = (
    "it compiles for WebAssembly: install clang, lld and a C library for it (on Debian: apt-get install clang lld wasi-libc), "
    "or name the folder of a WASI SDK in the environment variable WASI_SDK_PATH"
)
# in the generated C; a module's names are its own
_NAME = "net"


def build_wasm(files: CSource, module: Path) -> None:
    """Compile generated C to a WebAssembly module.

    Args:
        files: The C.
        module: Where it shall stand; an older one is overwritten.

    Raises:
        DeployError: There is no compiler for it, or it refuses.
    """
    kit = os.environ.get("WASI_SDK_PATH")
    compiler = found(str(Path(kit) / "bin" / "clang") if kit else "clang", _REMEDY)
    if not kit:
        found("wasm-ld", _REMEDY)
    with tempfile.TemporaryDirectory(prefix="dacnn-") as name:
        folder = Path(name)
        source, shown = write(files, folder), folder / "wasm.c"
        shown.write_text(render("wasm.c.jinja", {"name": files.name, "header_name": f"{files.name}.h"}), encoding="ascii")
        compile_with([compiler, *FLAGS, "-o", str(module.resolve()), source.name, shown.name, "-lm", "-lc"], folder)


class Module:
    """A WebAssembly module, run in wasmtime on NumPy arrays."""

    def __init__(self, path: Path, classes: int) -> None:
        """Load it.

        Args:
            path: The module.
            classes: How many its network tells apart.

        Raises:
            DeployError: wasmtime is missing.
        """
        try:
            import wasmtime
        except ImportError:
            raise DeployError(
                "a WebAssembly module is checked in wasmtime, which is missing: pip install 'dacnn[export]'"
            ) from None
        self._store = wasmtime.Store()
        module = wasmtime.Module(self._store.engine, path.read_bytes())
        instance: Any = wasmtime.Instance(self._store, module, [])
        self._shown = instance.exports(self._store)
        self._shown["init"](self._store)
        self._image, self._logits = (cast(int, self._shown[name](self._store)) for name in ("image", "logits"))
        self._classes = classes

    @property
    def memory_bytes(self) -> int:
        """Of the module's memory, all of it: kernels, activations, stack."""
        return int(self._shown["memory"].data_len(self._store))

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits, shape (N, K), of uint8 images, shape (N, H, W, C)."""
        memory, logits = self._shown["memory"], []
        for image in images:
            memory.write(self._store, bytearray(image.tobytes()), self._image)
            self._shown["run"](self._store)
            read = memory.read(self._store, self._logits, self._logits + 4 * self._classes)
            logits.append(np.frombuffer(read, np.float32))
        return np.stack(logits)


def write_wasm(program: Program | IntegerProgram, path: Path, compare: Callable[[Path], Parity], wanted: Wanted) -> Written:
    """Write NAME.wasm and NAME.mjs, both or none.

    Args:
        program: A flat Program, or one in integers.
        path: Of the module.
        compare: Compares the module with the network, and refuses what is too far from it.
        wanted: The format of kernels, and how Winograd's come to be.

    Returns:
        What was written.

    Raises:
        DeployError: The file is not called NAME.wasm, there is no compiler or it refuses, or the code computes something else.
        CheckpointError: A file cannot be written.
    """
    if path.suffix != ".wasm":
        raise DeployError(f"{path}: a WebAssembly module is called NAME.wasm: call it {path.with_suffix('.wasm').name}")
    files, loader = files_of(program, _NAME, wanted), path.with_suffix(".mjs")
    with ExitStack() as stack:
        module, beside = (stack.enter_context(replacing(place)) for place in (path, loader))
        built = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dacnn-"))) / "net.wasm"
        build_wasm(files, built)
        parity = compare(built)
        # not moved: a linker makes it a program that can be executed
        module.write_bytes(built.read_bytes())
        beside.write_text(_loader(program, path.stem, parity, wanted.dtype), encoding="utf-8")
    return Written(parity, (loader,), files.workspace_bytes, files.context_bytes, None)


def _loader(program: Program | IntegerProgram, file: str, parity: Parity, dtype: str) -> str:
    about = (
        f"{comment(program.name)}, written by dacnn {__version__}; weights: SHA-256 {weights_hash(program.tensors)[:16]}...;\n"
        f"   kernels are in {dtype}; "
        f"checked on {parity.images} images: largest error {parity.max_error:.1e} of the largest logit, the same class for "
        f"{parity.top1_agreement:.2%}."
    )
    # as in a URL, which has no quotation marks
    values = {"about": about, "file": quote(file), "input": program.input, "classes": json.dumps(list(program.classes))}
    return render("wasm.mjs.jinja", values)

"""A trained network as a file that other runtimes load, each kernel in it once, checked before it takes its place."""

import copy
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dacnn import runtime
from dacnn.checkpoint import check_place, replacing, stored_once
from dacnn.deploy.c.files import Dtype, Wanted, write_c
from dacnn.deploy.c.same_bits import check_bits, check_same
from dacnn.deploy.c.source import Winograd
from dacnn.deploy.c.target import Footprint, Microcontroller
from dacnn.deploy.c.wasm import Module, write_wasm
from dacnn.deploy.integers.calibrate import calibrate
from dacnn.deploy.integers.program import IntegerProgram
from dacnn.deploy.integers.quantize import quantize
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.parity import Parity, Runner, check, check_rounded, measure, noise_images, reference_logits
from dacnn.deploy.program import Program
from dacnn.deploy.pt2 import to_pt2
from dacnn.deploy.roll import roll
from dacnn.errors import ConfigError, DeployError, ShapeError, UnknownNameError
from dacnn.networks.classifier import Classifier, as_network

# N images, H rows, W columns, C channels, K classes

Target = Literal["onnx", "onnx-loop", "pt2", "c", "wasm"]
Form = Literal["small", "fast"]
# images of noise that are compared where none are given
_NOISE = 16


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        target: What it is.
        path: Where it stands.
        file_bytes: Its size.
        stored_bytes: Bytes of the network's parameters and buffers, each once.
        parity: How far it is from the network, as its runtime computes it.
        others: Files that belong to it: of C the header, an example, the compiled library; of WebAssembly the loader.
        workspace_bytes: Of C and WebAssembly: memory that one call needs.
        context_bytes: Of both: memory that all calls share.
        footprint: Of C: memory of a microcontroller.
    """

    target: Target
    path: Path
    file_bytes: int
    stored_bytes: int
    parity: Parity
    others: tuple[Path, ...] = ()
    workspace_bytes: int | None = None
    context_bytes: int | None = None
    footprint: Footprint | None = None

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values; those of C only where there are any."""
        table = {name: value for name, value in asdict(self).items() if value is not None and value != ()}
        return {**table, "path": str(self.path)} | ({"others": [str(path) for path in self.others]} if self.others else {})


def export(
    network: Classifier,
    to: Target,
    out: str | Path,
    *,
    float_input: bool = False,
    dtype: Dtype = "float32",
    calibration: Tensor | None = None,
    form: Form | None = None,
    winograd: Winograd | None = None,
    build: bool = False,
    target: Microcontroller | None = None,
    flash_budget: int | None = None,
    ram_budget: int | None = None,
    images: Tensor | None = None,
) -> Exported:
    """Write a network for another runtime and compare what that computes with what the network computes.

    Args:
        network: The network.
        to: `onnx`: an ONNX graph; `onnx-loop`: one whose layers are turns of loops, so that a runtime packs each kernel once;
            `pt2`: what `torch.export.load` reads, without this library; `c`: one source of C99, its header and an example;
            `wasm`: a WebAssembly module that needs no runtime, and the ES module that loads it.
        out: The file, of C its source, NAME.c; an older one is replaced as a whole.
        float_input: Take normalised floats N x C x H x W instead of uint8 images N x H x W x C.
        dtype: Of `c` and `wasm`: `bfloat16` rounds kernels, to half the bytes, and computes in float32; `int8` rounds kernels
            and values to eight bits. How far that is from the network is told; the code must compute what the rounded numbers
            give in float64, or the same bits as the integers evaluated in Python.
        calibration: Of int8: images from which the ranges of values are found, uint8, shape (N, H, W, C); some hundreds of
            those that the network was trained on. None: the ranges that it learnt when it was trained in int8.
        form: Of `onnx-loop`: `small` takes the least memory in ONNX Runtime, `fast` the least time; None: small.
        winograd: Of `c` and `wasm`: where the kernels of Winograd's convolution come from: `init` computes them at the start,
            `file` has them in the file, `off` does without that convolution; None: init.
        build: Of `c`: also write a shared library, NAME.so, which `dacnn.runtime.load` calls.
        target: Of `c`: a microcontroller, for which it is also compiled, and measured.
        flash_budget: Bytes of its flash that the network may take; None: any.
        ram_budget: Bytes of its RAM, likewise.
        images: What to compare on, uint8, shape (N, H, W, C); None: noise.

    Returns:
        What was written.

    Raises:
        UnknownNameError: There is no such target or form.
        ConfigError: Something was given that this target does not have, or no images.
        ShapeError: The images are of another shape or type.
        DeployError: The network has a step that cannot be expressed, a package or a compiler is missing, or the file computes
            something else, or more than it may take.
        CheckpointError: The file cannot be written.

    Example:
        >>> import dacnn, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = dacnn.export(dacnn.create("dacnn3", width=8), "onnx", folder + "/net.onnx")
        >>> done.parity.top1_agreement
        1.0
    """
    wanted = Wanted(dtype, winograd, build, target, flash_budget, ram_budget)
    check_settings(to, float_input=float_input, form=form, wanted=wanted)
    if dtype != "int8" and calibration is not None:
        raise ConfigError(f"calibration is given, but {dtype} has nothing to calibrate: leave it out, or set dtype to 'int8'")
    path = Path(out)
    check_place(path)
    network = as_network(network)
    images = noise_images(network.input, _NOISE) if images is None else images
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
        found = f"{images.dtype}, {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ShapeError(f"images are {found}: expected a uint8 tensor, N x H x W x C: torch.from_numpy makes one of an array")
    if len(images) == 0:
        raise ConfigError("images has none in it: expected some to compare on, or None for noise")
    expected = _Expected(path, images, reference_logits(network, images))
    if to in ("c", "wasm"):
        return _export_code(network, to, expected, wanted, calibration)
    return _export_graph(network, to, expected, float_input, form or "small")


@dataclass(frozen=True)
class _Expected:
    """What a file has to compute: the logits, N x K in float64, of images, uint8, N x H x W x C."""

    path: Path
    images: Tensor
    logits: NDArray[np.float64]

    def checked(self, run: Runner) -> Parity:
        """The distance, which rounding of float32 must explain."""
        parity = self.measured(run)
        check(parity, f"{self.path}: what was exported")
        return parity

    def measured(self, run: Runner) -> Parity:
        return measure(run, self.images, self.logits)


def _export_code(network: Classifier, to: Target, expected: _Expected, wanted: Wanted, calibration: Tensor | None) -> Exported:
    """Write C, or WebAssembly, which is made of C."""
    program = integers_of(network, calibration) if wanted.dtype == "int8" else lower(network)

    def compared(code: Path) -> Parity:
        compiled = runtime.load(code) if to == "c" else Module(code, len(program.classes))
        run: Runner = lambda part: compiled(part.numpy())  # noqa: E731
        if isinstance(program, Program):
            if wanted.dtype == "float32":
                return expected.checked(run)
            return check_rounded(program, run, expected.images, expected.logits, str(expected.path))
        if to == "c":
            check_bits(program, code, expected.images, str(expected.path))
        else:
            check_same(program, compiled, expected.images, str(expected.path))
        return expected.measured(run)

    done = (write_c if to == "c" else write_wasm)(program, expected.path, compared, wanted)
    sizes = (done.workspace_bytes, done.context_bytes, done.footprint)
    file_bytes = expected.path.stat().st_size
    return Exported(to, expected.path, file_bytes, _stored_bytes(network), done.parity, done.others, *sizes)


def _export_graph(network: Classifier, to: Target, expected: _Expected, float_input: bool, form: Form) -> Exported:
    """Write what a runtime interprets."""
    with replacing(expected.path) as beside:
        run = _WRITERS[to](network, beside, float_input, form)
        normalize = copy.deepcopy(network.normalize).to("cpu", torch.float32)
        parity = expected.checked(lambda part: run(normalize(part).contiguous() if float_input else part))
        file_bytes = beside.stat().st_size
    return Exported(to, expected.path, file_bytes, _stored_bytes(network), parity)


def _stored_bytes(network: Classifier) -> int:
    return sum(tensor.nbytes for tensor in stored_once(network.state_dict()).values())


def integers_of(network: Classifier, calibration: Tensor | None) -> IntegerProgram:
    """A network in integers.

    Args:
        network: The network.
        calibration: Images, uint8, shape (N, H, W, C); None: the network has learnt its ranges.

    Returns:
        The integer program.

    Raises:
        DeployError: There are no ranges, or they cannot be found, or the network cannot be expressed.
    """
    program = lower(network)
    ranges = network.ranges if calibration is None else calibrate(program, calibration)
    if ranges is None:
        raise DeployError(
            f"'{program.name}' has no ranges of its values, which int8 needs: give images as calibration "
            "(--calibrate SOURCE), or train it in int8"
        )
    return quantize(program, ranges)


def check_settings(to: Target, *, float_input: bool, form: Form | None, wanted: Wanted) -> None:
    """Refuse names that do not exist, and what the target does not have.

    Args:
        to: As `export` takes it, and the others likewise.
        float_input: See there.
        form: See there.
        wanted: Of C and WebAssembly.

    Raises:
        UnknownNameError: There is no such target, form or dtype.
        ConfigError: Something was given that this target does not have.
    """
    known = (
        ("target", to, Target),
        ("dtype", wanted.dtype, Dtype),
        ("form", form, Form),
        ("winograd", wanted.winograd, Winograd),
        ("microcontroller", wanted.target, Microcontroller),
    )
    for kind, word, names in known:
        if word is not None and word not in get_args(names):
            raise UnknownNameError(kind, word, get_args(names))
    if form is not None and to != "onnx-loop":
        raise ConfigError(f"form is '{form}', but '{to}' has no forms: leave it out, or export to 'onnx-loop'")
    given = [item.name for item in fields(Wanted) if getattr(wanted, item.name) != item.default]
    for name in given:
        takes = ("c", "wasm") if name in ("dtype", "winograd") else ("c",)
        if to not in takes:
            raise ConfigError(
                f"{name} is '{getattr(wanted, name)}', which '{to}' does not take: leave it out, or export to "
                + " or ".join(f"'{one}'" for one in takes)
            )
    budgets = [name for name in given if name.endswith("_budget")]
    if budgets and wanted.target is None:
        raise ConfigError(f"{budgets[0]} is given, but not of what: name the microcontroller as target")
    if float_input and to in ("c", "wasm"):
        raise ConfigError("input is 'float', but the C code takes uint8 images: leave it out")
    if wanted.dtype == "int8" and wanted.winograd is not None:
        raise ConfigError(f"winograd is '{wanted.winograd}', but int8 chooses its convolutions itself: leave it out")


def _write_onnx(network: Classifier, path: Path, float_input: bool, form: Form) -> Runner:
    path.write_bytes(to_onnx(lower(network), float_input=float_input).SerializeToString())
    return _onnx_runner(path)


def _write_onnx_loop(network: Classifier, path: Path, float_input: bool, form: Form) -> Runner:
    model = to_onnx_loop(roll(lower(network)), float_input=float_input, form=form)
    path.write_bytes(model.SerializeToString())
    return _onnx_runner(path)


def _onnx_runner(path: Path) -> Runner:
    try:
        import onnxruntime
    except ImportError:
        raise DeployError("an ONNX file is checked in ONNX Runtime, which is missing: pip install 'dacnn[export]'") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    return lambda images: np.asarray(session.run(None, {name: images.numpy()})[0])


def _write_pt2(network: Classifier, path: Path, float_input: bool, form: Form) -> Runner:
    content = to_pt2(network, float_input=float_input)
    path.write_bytes(content)
    loaded = torch.export.load(io.BytesIO(content)).module()
    return lambda images: loaded(images).detach().numpy()


_WRITERS: dict[Target, Callable[[Classifier, Path, bool, Form], Runner]] = {
    "onnx": _write_onnx,
    "onnx-loop": _write_onnx_loop,
    "pt2": _write_pt2,
}

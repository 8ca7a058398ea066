"""Who runs in the bench: for each back end, what writes its artefact, what loads it, and what has to be installed for that.

Nothing here imports a runtime: a contender names functions, which are imported in the process that calls them.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from dacnn.errors import UnknownNameError

# N images, C channels, H rows, W columns, K classes

# the network as it is, and the twin that computes the same with a kernel of its own for every layer
Side = Literal["shared", "twin"]
SIDES: tuple[Side, Side] = ("shared", "twin")
Takes = Literal["uint8", "float"]


@dataclass(frozen=True)
class Artefact:
    """What was written for a back end, and how it shall be run.

    Attributes:
        folder: Where it stands, alone.
        threads: Threads that may work on it.
        into: FILE.py:factory of the layers, where a network of somebody else's is loaded from its weights.
    """

    folder: Path
    threads: int
    into: str | None = None


@dataclass(frozen=True)
class Loaded:
    """A back end that is ready to run.

    Attributes:
        run: From what `prepare` gives to the logits, N x K. This is what is timed.
        prepare: From images as they are stored to what the runtime takes.
    """

    run: Callable[[Any], Any]
    prepare: Callable[[NDArray[Any]], Any] = lambda images: images


@dataclass(frozen=True)
class Contender:
    """A back end: a runtime and what is written for it.

    Attributes:
        name: What it is called in the table and behind --only.
        about: What it is, in a few words.
        write: `module:function` that takes a network, an empty folder and the largest batch, and writes the artefact.
        load: `module:function` from an `Artefact` to a `Loaded`.
        takes: What images it is given: uint8 N x H x W x C, or normalised float32 N x C x H x W.
        modules: What has to be there to import.
        package: The distribution whose version is told.
        extra: The extras of this library that bring it; empty where none does.
    """

    name: str
    about: str
    write: str
    load: str
    takes: Takes = "float"
    modules: tuple[str, ...] = ()
    package: str = "torch"
    extra: str = "export"

    def missing(self) -> str | None:
        """What has to be installed first; None where everything is there."""
        absent = ", ".join(module.replace("_", "-") for module in self.modules if not _is_there(module))
        remedy = f"pip install 'dacnn[{self.extra}]'" if self.extra else f"pip install {absent.replace(',', '')}"
        return f"not installed: {absent}: {remedy}" if absent else None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


_OWN, _TORCH, _ONNX, _PEERS = (f"dacnn.bench.{name}" for name in ("own", "torch_backends", "onnx_backends", "peers"))


def _onnx(name: str, about: str, write: str, load: str, *, takes: Takes, runtime: str, writers: tuple[str, ...]) -> Contender:
    """A contender whose artefact is an ONNX file."""
    extra = "export" if runtime == "onnxruntime" else "export,peers"
    return Contender(name, about, write, f"{_ONNX}:{load}", takes, (*writers, runtime), runtime, extra)


def _own_onnx(name: str, about: str, write: str, load: str = "load_onnxruntime", runtime: str = "onnxruntime") -> Contender:
    return _onnx(name, about, f"{_OWN}:{write}", load, takes="uint8", runtime=runtime, writers=("onnx",))


def _exported(name: str, about: str, load: str, runtime: str = "onnxruntime", write: str = "write") -> Contender:
    writers = ("onnx", "onnxscript")
    return _onnx(name, about, f"{_ONNX}:{write}", load, takes="float", runtime=runtime, writers=writers)


_ALL = (
    Contender(
        "dacnn-c", "`--to c`, compiled by the system's compiler", f"{_OWN}:write_c", f"{_OWN}:load_c", "uint8", package="dacnn"
    ),
    Contender(
        "dacnn-c-bfloat16",
        "`--to c --dtype bfloat16`: kernels in half the bytes, sums in float32",
        f"{_OWN}:write_c_bfloat16",
        f"{_OWN}:load_c",
        "uint8",
        package="dacnn",
    ),
    Contender(
        "dacnn-c-int8",
        "`--to c --dtype int8`, calibrated on noise: its time counts, not its accuracy",
        f"{_OWN}:write_c_int8",
        f"{_OWN}:load_c",
        "uint8",
        package="dacnn",
    ),
    Contender("dacnn-pack", "dacnn.pack in float32", f"{_TORCH}:write", f"{_OWN}:load_packed", "uint8"),
    Contender("dacnn-pack-bfloat16", "dacnn.pack in bfloat16", f"{_TORCH}:write", f"{_OWN}:load_packed_bfloat16", "uint8"),
    Contender("dacnn-pt2", "`--to pt2` in PyTorch", f"{_OWN}:write_pt2", f"{_OWN}:load_pt2", "uint8"),
    _own_onnx("dacnn-onnx", "`dacnn export --to onnx` in ONNX Runtime", "write_onnx"),
    _own_onnx("dacnn-loop-small", "`--to onnx-loop`, small form, in ONNX Runtime", "write_loop_small"),
    _own_onnx("dacnn-loop-fast", "`--to onnx-loop`, fast form, in ONNX Runtime", "write_loop_fast"),
    _own_onnx("dacnn-onnx-openvino", "`--to onnx` in OpenVINO", "write_onnx", "load_openvino", "openvino"),
    _own_onnx("dacnn-loop-small-openvino", "the small loop in OpenVINO", "write_loop_small", "load_openvino", "openvino"),
    _own_onnx("dacnn-loop-fast-openvino", "the fast loop in OpenVINO", "write_loop_fast", "load_openvino", "openvino"),
    Contender("pytorch", "PyTorch, channels-last where the network allows it", f"{_TORCH}:write", f"{_TORCH}:load_eager"),
    Contender("torch-compile", "torch.compile, one graph a batch size", f"{_TORCH}:write", f"{_TORCH}:load_compiled"),
    _exported("onnxruntime", "ONNX Runtime as it comes, on the file of torch.onnx.export", "load_onnxruntime"),
    _exported("onnxruntime-off", "the same, graph optimisation off", "load_onnxruntime_off"),
    _exported(
        "onnxruntime-int8",
        "the same, quantized by ONNX Runtime, calibrated on noise: its time counts, not its accuracy",
        "load_onnxruntime",
        write="write_int8",
    ),
    _exported("openvino", "OpenVINO in float32, on the file of torch.onnx.export", "load_openvino", "openvino"),
    Contender(
        "executorch",
        "ExecuTorch with XNNPACK",
        f"{_PEERS}:write_executorch",
        f"{_PEERS}:load_executorch",
        modules=("executorch",),
        package="executorch",
        extra="peers",
    ),
    Contender(
        "litert",
        "LiteRT with XNNPACK, an image at a time",
        f"{_PEERS}:write_litert",
        f"{_PEERS}:load_litert",
        modules=("litert_torch", "ai_edge_litert"),
        package="ai-edge-litert",
        extra="",
    ),
    Contender(
        "ncnn",
        "ncnn in float32, Winograd on, an image at a time",
        f"{_PEERS}:write_ncnn",
        f"{_PEERS}:load_ncnn",
        modules=("pnnx", "ncnn"),
        package="ncnn",
        extra="peers",
    ),
)
CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in _ALL}


def chosen(only: Iterable[str]) -> tuple[Contender, ...]:
    """The contenders that are named.

    Args:
        only: Their names; none: all.

    Returns:
        The contenders, in the order of the registry.

    Raises:
        UnknownNameError: There is no contender of such a name.
    """
    names = set(only)
    for name in sorted(names - CONTENDERS.keys()):
        raise UnknownNameError("contender", name, CONTENDERS)
    return tuple(contender for name, contender in CONTENDERS.items() if name in names or not names)

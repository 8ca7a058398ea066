"""How each runtime loads an artefact and runs it once: what `memory_added` calls in a fresh process."""

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

from dacnn import runtime
from dacnn.checkpoint import load, save, weights_path
from dacnn.errors import ArtefactError, DacnnError
from dacnn.measure.artefacts import KNOWN, format_of, read_artefact
from dacnn.measure.copies import group_copies
from dacnn.measure.memory_added import MemoryAdded, holding, memory_added
from dacnn.measure.onnx_arrays import import_onnx
from dacnn.measure.process import Held, held_by
from dacnn.measure.pt2 import code_in
from dacnn.networks.network import Network, create

# what stands in for a dimension that an artefact leaves open: images of a common size, one at a time
_OPEN_BATCH, _OPEN_SIDE = 1, 32
# endings of shared libraries
_LIBRARIES = (".so", ".dylib", ".dll")


def _tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)).eval()


def _loaded_network(path: Path) -> Network:
    loaded = load(path)
    of = loaded.plan.input
    with torch.no_grad():
        loaded(torch.zeros(_OPEN_BATCH, of.channels, of.height, of.width))
    return loaded


def network(path: Path | None) -> tuple[object, str]:
    """A network of ours, in PyTorch."""
    torch.set_num_threads(1)
    if path is not None:
        return _loaded_network(path), "the network in PyTorch, one thread, run once on zeros"
    with tempfile.TemporaryDirectory() as folder:
        # the first network that is loaded brings parts of PyTorch with it
        save(create("dacnn3", width=8), Path(folder) / "tiny.safetensors")
        return _loaded_network(Path(folder) / "tiny.safetensors"), ""


def tensors(path: Path | None) -> tuple[object, str]:
    """A file of tensors, with nothing that runs them."""
    if path is None:
        content = io.BytesIO()
        torch.save({"tiny": torch.zeros(8)}, content)
        content.seek(0)
        return torch.load(content, weights_only=True), ""
    if format_of(path) == "safetensors":
        # a clone is private memory, which is what a module copies them into; the file itself is only mapped
        return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}, "the tensors, not run"
    return torch.load(path, map_location="cpu", weights_only=True), "the tensors, not run"


def exported_program(path: Path | None) -> tuple[object, str]:
    """What `torch.export.save` wrote, in PyTorch."""
    torch.set_num_threads(1)
    if path is None:
        with tempfile.TemporaryDirectory() as folder:
            tiny = Path(folder) / "tiny.pt2"
            torch.export.save(torch.export.export(_tiny(), (torch.zeros(1, 3, 32, 32),)), tiny)
            return _exported(tiny)
    # PyTorch's loader is not given what might run code of its own
    if reason := code_in(path):
        raise ArtefactError(f"{path}: is not loaded, since it may run code: {reason}")
    return _exported(path)


def _exported(path: Path) -> tuple[object, str]:
    program = torch.export.load(path)
    module = program.module()
    held: tuple[Any, Any] = (program, module)
    if program.example_inputs is None:
        return held, "the exported program in PyTorch, not run: it has no example inputs"
    inputs, keywords = program.example_inputs
    with torch.no_grad():
        module(*inputs, **keywords)
    return held, "the exported program in PyTorch, one thread, run once on its example inputs"


def _tiny_onnx() -> bytes:
    onnx = import_onnx()
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(np.ones((16, 16, 3, 3), np.float32), "weight")
    nodes = [helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1, 1, 1, 1]), helper.make_node("Relu", ["y"], ["z"])]
    ends = [helper.make_tensor_value_info(name, kind, [1, 16, 8, 8]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "tiny", ends[:1], ends[1:], [weight])
    content: bytes = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    return content


def onnx_runtime(path: Path | None) -> tuple[object, str]:
    """An ONNX file in ONNX Runtime: its default optimisation, one thread."""
    try:
        import onnxruntime
    except ImportError:
        raise ArtefactError("ONNX Runtime is missing: pip install 'dacnn[export]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    source = _tiny_onnx() if path is None else str(path)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    try:
        session.run(None, {item.name: _zeros(item) for item in session.get_inputs()})
    except Exception as error:  # ONNX Runtime's errors share no class; a model that takes no zeros is loaded all the same
        return session, f"a session of ONNX Runtime, not run: {(str(error) or type(error).__name__).splitlines()[0]}"
    return session, "a session of ONNX Runtime, one thread, run once on zeros"


def _zeros(item: Any) -> Any:
    onnx = import_onnx()
    kind = item.type.removeprefix("tensor(").removesuffix(")").upper()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind))
    open_sides = [_OPEN_BATCH] + [_OPEN_SIDE] * len(item.shape)
    return np.zeros(
        [size if isinstance(size, int) else side for size, side in zip(item.shape, open_sides, strict=False)], dtype
    )


def compiled_c(path: Path | None) -> tuple[object, str]:
    """A library of the C that this library writes, by its runtime."""
    if path is None:
        # the compiler's runtime and NumPy are there already, and nothing else comes with it
        return None, ""
    library = runtime.load(path)
    library(np.zeros((_OPEN_BATCH, *library.input_shape), np.uint8))
    return library, "the compiled C, one thread, run once on zeros"


def _loader_of(path: Path) -> str:
    kind = format_of(path)
    loaders = {"onnx": onnx_runtime, "pt2": exported_program, "bytes": compiled_c}
    loader = network if kind == "safetensors" and _is_ours(path) else loaders.get(kind, tensors)
    if loader is compiled_c and path.suffix not in _LIBRARIES:
        raise ArtefactError(
            f"{path}: nothing here loads it: expected {KNOWN}, or a library of compiled C ({', '.join(_LIBRARIES)}); "
            "audit it without --memory"
        )
    return f"{__name__}:{loader.__name__}"


def artefact_memory(path: Path) -> MemoryAdded:
    """Measure what loading an artefact in its runtime adds to a process.

    Args:
        path: A run directory or a file. `.onnx` is loaded by ONNX Runtime with its default optimisation and one thread, a
            library of compiled C by `dacnn.runtime`, all else by PyTorch; a `.pt2` file that might run code is refused.

    Returns:
        The memory that was added.

    Raises:
        ArtefactError: This is not Linux, or the artefact cannot be loaded.
        CheckpointError: A directory holds no weights.
    """
    path = weights_path(path)
    return memory_added(_loader_of(path), path)


def artefact_copies(path: Path, against: Path | None = None) -> tuple[Held, ...]:
    """Count the copies of each kernel in the memory of a process that has loaded an artefact and run it once.

    Args:
        path: As in `artefact_memory`.
        against: Whose kernels are looked for; None: those of the artefact itself.

    Returns:
        What was found in memory that belongs to no file, and where the artefact itself is mapped.

    Raises:
        ArtefactError: This is not Linux, or the artefact cannot be loaded.
        CheckpointError: A directory holds no weights.
    """
    path = weights_path(path)
    arrays = read_artefact(against or path).arrays
    kernels = [arrays[group.first] for group in group_copies(arrays)]
    # of an ONNX file, kernels may stand in files beside it
    beside = [file for file in path.parent.iterdir() if file.is_file()] if format_of(path) == "onnx" else []
    with holding(_loader_of(path), path) as pid:
        return held_by(pid, kernels, [path, *beside])


def _is_ours(path: Path) -> bool:
    try:
        load(path)
    except DacnnError:
        return False
    return True

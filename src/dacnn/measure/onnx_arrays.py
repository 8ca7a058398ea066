"""The arrays of an ONNX file: initialisers, constants in nodes, loop bodies, branches, functions, external data."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.errors import ArtefactError
from dacnn.measure.stored import StoredArray, may_be_kernel

# operators that read a kernel themselves, so that their number is the number of layers that read it
_READERS = {"Conv", "ConvTranspose", "FusedConv", "Gemm", "MatMul", "FusedGemm", "FusedMatMul"}
_BLOCKED_DOMAIN = "com.microsoft.nchwc"


def import_onnx() -> Any:
    """The `onnx` package.

    Raises:
        ArtefactError: It is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise ArtefactError("an ONNX file needs the onnx package, which is missing: pip install 'dacnn[export]'") from None
    return onnx


def _graphs(graph: Any, where: str) -> Iterator[tuple[Any, str]]:
    """A graph or function and everything nested in it, each with what to call it."""
    yield graph, where
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _graphs(inner, f"{node.op_type} {attribute.name}")


def _tensors(graph: Any, where: str) -> Iterator[tuple[str, str, Any]]:
    """Name, place and TensorProto of everything that one graph holds itself."""
    inside = f" in {where}" if where else ""
    for tensor in getattr(graph, "initializer", ()):
        yield tensor.name, f"initialiser{inside}", tensor
    for node in graph.node:
        for attribute in node.attribute:
            for tensor in [attribute.t] if attribute.HasField("t") else attribute.tensors:
                yield node.output[0] if node.output else node.name, f"{node.op_type} node{inside}", tensor


def _uses(graphs: Iterable[tuple[Any, str]]) -> tuple[dict[str, int | None], set[str]]:
    """How many layers read each name (None: that cannot be counted), and the names that are read as blocked filters."""
    counts: dict[str, int | None] = {}
    blocked: set[str] = set()
    for graph, where in graphs:
        for node in graph.node:
            for name in node.input:
                # a loop runs its nodes many times, and what another operator makes of a kernel may be read by many layers
                before = counts.get(name, 0)
                counts[name] = before + 1 if not where and node.op_type in _READERS and before is not None else None
                if node.domain == _BLOCKED_DOMAIN:
                    blocked.add(name)
    return counts, blocked


class _Reader:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.onnx = import_onnx()
        try:
            self.model = self.onnx.load(path, load_external_data=False)
        except Exception as error:  # protobuf's own errors share no class
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ArtefactError(f"{path}: not a readable ONNX file: {reason}: export it anew") from None
        if not self.model.HasField("graph") or not self.model.opset_import:
            raise ArtefactError(f"{path}: not a readable ONNX file: it holds no graph: export it anew")

    def graphs(self) -> list[tuple[Any, str]]:
        found = list(_graphs(self.model.graph, ""))
        for function in self.model.functions:
            found += _graphs(function, f"function {function.name}")
        return found

    def _external(self, tensor: Any, dtype: "np.dtype[Any]") -> tuple[tuple[object, ...], NDArray[Any]]:
        """What identifies the bytes of a tensor in another file, and its values."""
        entries = {entry.key: entry.value for entry in tensor.external_data}
        folder = self.path.resolve().parent
        location = Path(entries.get("location", ""))
        file = (folder / location).resolve()
        where = f"{self.path}: tensor '{tensor.name}'"
        if location.is_absolute() or not file.is_relative_to(folder):
            raise ArtefactError(f"{where} lies outside the folder, in '{location}': not read: keep the data beside the model")
        count = int(np.prod(tensor.dims, dtype=np.int64))
        try:
            offset = int(entries.get("offset", 0))
            values = np.fromfile(file, dtype, count, offset=offset)
        except (OSError, ValueError) as error:
            raise ArtefactError(f"{where} cannot be read from '{location}': {error}: keep the data beside the model") from None
        if values.size != count:
            raise ArtefactError(f"{where}: '{location}' is too short: {values.size} of {count} values: export it anew")
        return (file, offset, values.nbytes), values.reshape(tensor.dims)

    def values(self, tensor: Any) -> tuple[tuple[object, ...], NDArray[Any]]:
        """What identifies the bytes of a tensor, and its values."""
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            return self._external(tensor, dtype)
        try:
            # an object of its own: no other tensor has these bytes
            return (object(),), self.onnx.numpy_helper.to_array(tensor)
        except (ValueError, TypeError) as error:
            raise ArtefactError(f"{self.path}: tensor '{tensor.name}' is damaged: {error}: export it anew") from None

    def arrays(self) -> tuple[StoredArray, ...]:
        graphs = self.graphs()
        counts, blocked = _uses(graphs)
        found: dict[tuple[object, ...], tuple[list[str], str, str, NDArray[Any]]] = {}
        for graph, where in graphs:
            for name, place, tensor in _tensors(graph, where):
                dtype = self.onnx.TensorProto.DataType.Name(tensor.data_type).lower()
                if not may_be_kernel(tensor.dims, dtype):
                    continue
                key, values = self.values(tensor)
                found.setdefault(key, ([], place, dtype, values))[0].append(name)
        return tuple(
            StoredArray(
                tuple(names),
                place,
                _computable(values),
                "float32" if dtype == "float" else "float64" if dtype == "double" else dtype,
                values.nbytes,
                _sum(counts.get(name, 0) for name in names),
                any(name in blocked for name in names),
            )
            for names, place, dtype, values in found.values()
        )

    def writer(self) -> str:
        """Which tool left its traces."""
        names = [tensor.name for tensor in self.model.graph.initializer]
        if any(entry.domain == _BLOCKED_DOMAIN for entry in self.model.opset_import):
            return "onnxruntime"
        if any(name.startswith(("ConvBnFusion_", "ConvMulFusion_")) for name in names):
            return "onnxruntime"
        return "legacy-onnx" if any(name.startswith("onnx::") for name in names) else ""


def _computable(values: NDArray[Any]) -> NDArray[Any]:
    """The values in a type that NumPy computes with: bfloat16 and its like come as types of another package."""
    return values if values.dtype.kind in "fiu" else values.astype(np.float32)


def _sum(counts: Iterable[int | None]) -> int | None:
    known = list(counts)
    return None if None in known else sum(count or 0 for count in known)


def read_onnx(path: Path) -> tuple[tuple[StoredArray, ...], str]:
    """Read an ONNX file and the data beside it.

    Args:
        path: The file.

    Returns:
        Its arrays, and the tool that wrote it: `onnxruntime`, `legacy-onnx` or empty.

    Raises:
        ArtefactError: It is damaged, its data is missing or lies outside its folder, or `onnx` is not installed.
    """
    reader = _Reader(path)
    return reader.arrays(), reader.writer()

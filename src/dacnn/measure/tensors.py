"""PyTorch tensors -> stored arrays: names that hold the same memory are one array."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor, nn

from dacnn.errors import ArtefactError, DacnnError
from dacnn.measure.stored import StoredArray, may_be_kernel
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan

# NumPy has no name for these: they are widened, which changes no value
_WIDENED = {"bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"}

_LAYOUTS = (torch.strided, torch._mkldnn)  # type: ignore[attr-defined]


def _memory(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common exactly if they are the same bytes, whatever shape or order they are viewed in."""
    if tensor.layout is not torch.strided or tensor.untyped_storage().data_ptr() == 0:
        return (id(tensor),)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (str(tensor.device), tensor.data_ptr(), span * tensor.element_size())


def _stored_part(tensor: Tensor) -> Tensor:
    """The tensor without what `expand` repeats: a dimension of stride 0 holds its numbers once."""
    for dimension in reversed(range(tensor.ndim)):
        if tensor.stride(dimension) == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.select(dimension, 0)
    return tensor


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _values(tensor: Tensor, where: str) -> Tensor:
    """The numbers of a tensor as an ordinary one."""
    if tensor.is_meta:
        raise ArtefactError(f"{where}: has no values, it is on the meta device: load the weights first")
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor.int_repr() if tensor.is_quantized else _stored_part(tensor)


def to_arrays(
    items: Iterable[tuple[str, str, Tensor]], label: str, readers: Mapping[str, int] | None = None
) -> tuple[StoredArray, ...]:
    """Turn tensors into stored arrays.

    Args:
        items: Name, place and tensor.
        label: What to call the artefact in an error.
        readers: How many layers read a tensor of this name, where that is known.

    Returns:
        One array for all names that hold the same memory; of what cannot be a kernel, none.

    Raises:
        ArtefactError: A tensor has no values.
    """
    # the tensors stay here, so that no memory is freed and given to another one while addresses are compared
    found: dict[tuple[object, ...], tuple[list[str], str, Tensor]] = {}
    for name, place, tensor in items:
        # a sparse tensor is no kernel that a convolution reads, and writing it out can take any amount of memory
        if may_be_kernel(tensor.shape, _dtype_name(tensor)) and tensor.layout in _LAYOUTS:
            names, _, _ = found.setdefault(_memory(tensor), ([], place, tensor.detach()))
            names.append(name)
    arrays = []
    for names, place, tensor in found.values():
        plain = _values(tensor, f"{label}: {names[0]}")
        dtype = _dtype_name(plain)
        if may_be_kernel(plain.shape, dtype):
            values = (plain.float() if dtype in _WIDENED else plain).cpu().contiguous().numpy()
            counts = [readers[name] for name in names if name in readers] if readers else []
            nbytes = math.prod(plain.shape) * plain.element_size()
            arrays.append(StoredArray(tuple(names), place, values, dtype, nbytes, sum(counts) if counts else None))
    return tuple(arrays)


def plan_readers(plan: Plan) -> dict[str, int]:
    """How many layers read each tensor of a network of ours, by its name in the state dict."""
    return {f"anchors.{name}": len(layers) for name, layers in plan.readers().items()}


def read_safetensors(path: Path) -> tuple[tuple[StoredArray, ...], str | None]:
    """Read a `.safetensors` file.

    Args:
        path: The file.

    Returns:
        Its arrays, and the `dacnn` entry of its metadata, where it has one.

    Raises:
        ArtefactError: It is no such file, or is damaged.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            plan = (file.metadata() or {}).get("dacnn")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
    except (OSError, safetensors.SafetensorError) as error:
        raise ArtefactError(f"{path}: not a readable .safetensors file: {error}: write it anew") from None
    readers = plan_readers_of_metadata(plan)
    return to_arrays(((name, "tensor", tensor) for name, tensor in tensors.items()), str(path), readers), plan


def plan_readers_of_metadata(metadata: str | None) -> dict[str, int] | None:
    """`plan_readers` of the plan that a file of ours carries; None where it carries none."""
    try:
        return plan_readers(Plan.from_json(json.dumps(json.loads(metadata or "")["plan"])))
    except (ValueError, KeyError, TypeError, RecursionError, DacnnError):
        return None


def _nested(value: object, name: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in dicts, lists and tuples, however deep, each by its path."""
    if isinstance(value, Tensor):
        yield name, value
        return
    children: Iterable[tuple[object, object]] = ()
    if isinstance(value, Mapping):
        children = value.items()
    elif isinstance(value, list | tuple):
        children = enumerate(value)
    if id(value) in seen:
        return
    seen.add(id(value))
    for key, child in children:
        yield from _nested(child, f"{name}.{key}" if name else str(key), seen)


def read_pt(path: Path) -> tuple[StoredArray, ...]:
    """Read what `torch.save` wrote: tensors in dicts and lists, and nothing that would run code.

    Args:
        path: The file.

    Returns:
        Its arrays; names that were saved with common memory are one.

    Raises:
        ArtefactError: It is damaged, or holds more than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile pickle makes of the reader
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ArtefactError(
            f"{path}: not read: {reason.rstrip('.')}: expected tensors alone, as torch.save(module.state_dict(), path) writes"
        ) from None
    return to_arrays(((name, "tensor", tensor) for name, tensor in _nested(content, "", set())), str(path))


def _module_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Everything that a module holds: what has a name in its state dict first, since copies are named after the first one."""
    parts = [(f"{prefix}." if prefix else "", vars(part)) for prefix, part in module.named_modules(remove_duplicate=False)]
    for place, where in (("parameter", "_parameters"), ("buffer", "_buffers")):
        for start, held in parts:
            yield from ((start + name, place, tensor) for name, tensor in _nested(held[where], "", set()))
    for start, held in parts:
        attributes = {name: value for name, value in held.items() if name not in {"_parameters", "_buffers", "_modules"}}
        yield from ((start + name, "attribute", tensor) for name, tensor in _nested(attributes, "", set()))


def _calls(module: nn.Module) -> dict[str, int]:
    """How many nodes of a traced module's graph read each kernel."""
    counts: dict[str, int] = {}
    if isinstance(module, torch.fx.GraphModule):
        for node in module.graph.nodes:
            if node.op == "call_module":
                counts[f"{node.target}.weight"] = counts.get(f"{node.target}.weight", 0) + 1
            elif node.op == "get_attr":
                counts[str(node.target)] = counts.get(str(node.target), 0) + len(node.users)
    return counts


def read_module(module: nn.Module) -> tuple[StoredArray, ...]:
    """Read a live module: parameters, buffers and tensors that are plain attributes.

    Args:
        module: The module.

    Returns:
        Its arrays; names that hold the same memory are one.

    Raises:
        ArtefactError: A tensor has no values.
    """
    readers = plan_readers(module.plan) if isinstance(module, Network) else _calls(module)
    return to_arrays(_module_tensors(module), type(module).__name__, readers)

"""What of a foreign module can share a kernel: its convolutions and linear layers, and what one forward pass shows of them."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dacnn.errors import PlanError
from dacnn.sharing.anchors import Anchors

Layer = _ConvNd | nn.Linear
Example = Tensor | tuple[Any, ...] | dict[str, Any]

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Survey:
    """The layers of a module.

    Attributes:
        layers: Those that can share a kernel, by name, in the module's order.
        refused: Why others cannot, by name.
    """

    layers: dict[str, Layer]
    refused: dict[str, str]


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        stages: Of every layer that ran: how often the resolution had changed before, and the layer's own resolution.
        norms: Names of the batch norms that alone take what a layer gives, by name of the layer.
    """

    stages: dict[str, tuple[int, tuple[int, ...]]]
    norms: dict[str, str]


def kernel_kind(layer: Layer) -> tuple[Hashable, ...]:
    """What two layers must have in common to read one kernel."""
    weight = layer.weight
    family = "linear" if isinstance(layer, nn.Linear) else "transposed" if isinstance(layer, _ConvTransposeNd) else "conv"
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return family, tuple(weight.shape), groups, weight.dtype, weight.device, weight.requires_grad


def survey(module: nn.Module) -> Survey:
    """Find the layers that can share a kernel.

    Args:
        module: Any module; left as it is.

    Returns:
        The layers.

    Raises:
        PlanError: The module is wrapped, compiled, scripted, or shares by anchors already.
    """
    holders = Counter(id(parameter) for part in module.modules() for parameter in part._parameters.values())
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    for name, part in module.named_modules():
        _refuse_wrapper(name, part)
        reason = _reason_against(part, holders)
        if reason:
            refused[name] = reason
        elif isinstance(part, _ConvNd | nn.Linear):
            layers[name] = part
    return Survey(layers, refused)


def _refuse_wrapper(name: str, part: nn.Module) -> None:
    kind = type(part).__name__
    where = f"module '{name}'" if name else "the module"
    if kind in _WRAPPERS or kind.startswith("FSDP"):
        raise PlanError(f"{where} is wrapped in {kind}: share the kernels of the module inside, then wrap the result")
    if kind == "OptimizedModule":
        raise PlanError(f"{where} is compiled: share the kernels of the module inside, then compile the result")
    if isinstance(part, torch.jit.ScriptModule):
        raise PlanError(f"{where} is a script: share the kernels of the Python module that it was made from")
    if isinstance(part, Anchors):
        raise PlanError(f"{where} holds anchors already: start from the module that they were made from")


def _reason_against(part: nn.Module, holders: Counter[int]) -> str | None:
    """Why a layer cannot share; None where it can, or is no layer of a kind that shares."""
    if "quantized" in type(part).__module__ and hasattr(part, "weight") and not isinstance(part, _ConvNd | nn.Linear):
        return "is quantised: share before quantising"
    if not isinstance(part, _ConvNd | nn.Linear):
        return None
    if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
        return "is lazy and has no shape yet: run the module once"
    if parametrize.is_parametrized(part, "weight"):
        return "has a weight that a parametrization computes: remove it first"
    weight = part._parameters.get("weight")
    if weight is None:
        return "has no weight of its own: something else computes it"
    if holders[id(weight)] > 1:
        return "holds a weight that other layers hold too: untie it first"
    return None


def regulated_past(module: nn.Module) -> dict[str, str]:
    """Layers behind which a regulator would be passed by, and why."""
    past: dict[str, str] = {}
    for name, part in module.named_modules():
        if isinstance(part, NonDynamicallyQuantizableLinear):
            past[name] = "is read by its attention without being called, so a regulator would be left out"
        if isinstance(part, nn.TransformerEncoderLayer):
            for inner in ("linear1", "linear2"):
                past[f"{name}.{inner}".lstrip(".")] = (
                    "is read without being called when its encoder layer is evaluated, so a regulator would be left out"
                )
    return past


class _Uses(TorchFunctionMode):
    """Counts the operations that make tensors from given ones."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}
        self.counts: Counter[int] = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            self.counts.update({id(leaf) for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.watched})
        return result


@dataclass
class _Record:
    """What the hooks of a traced forward pass write down."""

    uses: _Uses = field(default_factory=_Uses)
    calls: list[tuple[str, Layer, tuple[int, ...]]] = field(default_factory=list)
    outputs: dict[int, str] = field(default_factory=dict)
    norm_of: dict[str, list[str]] = field(default_factory=dict)
    norm_calls: Counter[str] = field(default_factory=Counter)

    def layer(self, name: str) -> Callable[..., None]:
        def hook(layer: Layer, inputs: Any, output: Tensor) -> None:
            sizes = output.shape[1:-1] if isinstance(layer, nn.Linear) else output.shape[2:]
            self.calls.append((name, layer, tuple(sizes)))
            # kept alive: nothing else may get its address
            self.uses.watched[id(output)] = output
            self.outputs[id(output)] = name

        return hook

    def norm(self, name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.norm_calls[name] += 1
            if id(inputs[0]) in self.outputs:
                self.norm_of.setdefault(self.outputs[id(inputs[0])], []).append(name)

        return hook


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, and afterwards every part in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@torch.no_grad()
def trace(module: nn.Module, layers: dict[str, Layer], example: Example) -> Trace:
    """Run a module once and watch its layers.

    Args:
        module: The module; its parameters, buffers and modes are afterwards as before.
        layers: The layers to watch.
        example: What the module takes: a tensor, a tuple of arguments, or named arguments.

    Returns:
        What was seen.

    Raises:
        PlanError: The forward pass fails.
    """
    record = _Record()
    hooks = [layer.register_forward_hook(record.layer(name)) for name, layer in layers.items()]
    for name, part in module.named_modules():
        if isinstance(part, _BatchNorm):
            hooks.append(part.register_forward_pre_hook(record.norm(name)))
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    try:
        with _evaluating(module), record.uses:
            module(*args, **(example if isinstance(example, dict) else {}))
    except Exception as error:
        raise PlanError(f"the module does not run on the example: {type(error).__name__}: {error}") from error
    finally:
        for handle in hooks:
            handle.remove()
    return Trace(_stages(record), _following_norms(record))


def _stages(record: _Record) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The stage of every layer that ran, by its first call."""
    stages: dict[str, tuple[int, tuple[int, ...]]] = {}
    stage, current = 0, None
    for name, layer, resolution in record.calls:
        # what works on one pixel (squeeze and excitation) stands beside the path of the image, and a linear layer may see
        # channels for pixels (token mixing): neither begins a stage
        if isinstance(layer, _ConvNd) and math.prod(resolution) > 1:
            stage += current not in (None, resolution)
            current = resolution
        stages.setdefault(name, (stage, resolution))
    return stages


def _following_norms(record: _Record) -> dict[str, str]:
    """Layers and norms that meet once, and nobody else between them."""
    calls = Counter(name for name, _, _ in record.calls)
    uses = {record.outputs[key]: record.uses.counts[key] for key in record.outputs}
    return {
        layer: norms[0]
        for layer, norms in record.norm_of.items()
        if calls[layer] == 1 and uses[layer] == 1 and len(norms) == 1 and record.norm_calls[norms[0]] == 1
    }

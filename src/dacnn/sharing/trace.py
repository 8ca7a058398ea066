"""What one forward pass shows of a foreign module: where the resolution changes, and which norm follows which layer."""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedBuffer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dacnn.errors import PlanError
from dacnn.sharing.survey import Layer, parameter_holders

Example = Tensor | tuple[Any, ...] | Mapping[str, Any]

# what an operation may tell of a tensor without using the numbers in it
_METADATA = (bool, int, torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format)
# layers that give the image of their kernel plus their bias, and nothing else: k times the kernel, k times the image
_PROPORTIONAL = {kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)}
_CONVOLVE = {kind._conv_forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)}


@dataclass(frozen=True)
class Trace:
    """What one forward pass showed.

    Attributes:
        stages: Of every layer that ran: how often the resolution had changed before, and the layer's own resolution.
        norms: Names of the batch norms that can take up gains of what a layer gives, by name of the layer.
    """

    stages: dict[str, tuple[int, tuple[int, ...]]]
    norms: dict[str, str]


@dataclass
class _Output:
    """What a layer gave, and who took it."""

    layer: str
    # not the tensor: one that outlives the forward pass is kept by somebody
    tensor: "weakref.ref[Tensor]"
    norms: list[str] = field(default_factory=list)
    batch_norm_uses: int = 0
    other_uses: int = 0

    def goes_to_one_norm_alone(self) -> bool:
        kept = self.tensor() is not None
        return not kept and len(self.norms) == 1 and (self.batch_norm_uses, self.other_uses) == (1, 0)


class _Uses(TorchFunctionMode):
    """Counts the operations that use what layers gave."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[int, _Output] = {}

    def of(self, tensor: object) -> _Output | None:
        output = self.latest.get(id(tensor))
        # a tensor that is gone may have left its address to another
        return output if output is not None and output.tensor() is tensor else None

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used = {id(leaf): self.of(leaf) for leaf in tree_leaves((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for output in used.values():
            if output is not None and not isinstance(result, _METADATA):
                output.batch_norm_uses += func is F.batch_norm
                output.other_uses += func is not F.batch_norm
        return result


@dataclass
class _Record:
    """What the hooks of a traced forward pass write down."""

    uses: _Uses = field(default_factory=_Uses)
    calls: list[tuple[str, Layer, tuple[int, ...]]] = field(default_factory=list)
    outputs: list[_Output] = field(default_factory=list)
    norm_calls: Counter[str] = field(default_factory=Counter)

    def layer(self, name: str) -> Callable[..., None]:
        def hook(layer: Layer, inputs: Any, output: object) -> None:
            if not isinstance(output, Tensor):
                return
            dimensions = 0 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
            sizes = output.shape[-dimensions:] if dimensions else output.shape[1:-1]
            self.calls.append((name, layer, tuple(sizes)))
            # a norm takes dimension 1 for channels: behind a linear layer over tokens that is the tokens
            if output.ndim == dimensions + 2:
                self.outputs.append(_Output(name, weakref.ref(output)))
                self.uses.latest[id(output)] = self.outputs[-1]

        return hook

    def norm(self, name: str) -> Callable[..., None]:
        def hook(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.norm_calls[name] += 1
            output = self.uses.of(next(iter((*args, *kwargs.values())), None))
            if output is not None:
                output.norms.append(name)

        return hook


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy.

    Args:
        module: Any module.

    Returns:
        The copy.

    Raises:
        PlanError: It cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        reason = _reason_against_copying(module) or f"{type(error).__name__}: {error}"
        raise PlanError(f"the module cannot be copied, and is not changed itself: {reason}") from error


def _reason_against_copying(module: nn.Module) -> str | None:
    for name, part in module.named_modules():
        if any(isinstance(buffer, UninitializedBuffer) for buffer in part._buffers.values()):
            return f"'{name}' is lazy and has no shape yet: run the module once"
        for key, value in part.__dict__.items():
            if isinstance(value, Tensor) and not value.is_leaf:
                return f"'{key}' of '{name}' is computed from other tensors (by weight norm or pruning, say): remove that first"
    return None


@torch.no_grad()
def trace(module: nn.Module, names: Iterable[str], example: Example) -> Trace:
    """Run a copy of a module once, as it is evaluated, and watch its layers.

    Args:
        module: The module; left as it is.
        names: The layers to watch.
        example: What the module takes: a tensor, a tuple of arguments, or named arguments.

    Returns:
        What was seen.

    Raises:
        PlanError: The forward pass fails.
    """
    module = copy_of(module).eval()
    layers = {name: module.get_submodule(name) for name in names}
    proportional = {name for name, layer in layers.items() if _is_proportional(layer)}
    capable = {name for name, norm in _batch_norms(module) if _takes_gains(norm, parameter_holders(module))}
    record = _Record()
    for name, layer in layers.items():
        layer.register_forward_hook(record.layer(name))
    for name, norm in _batch_norms(module):
        norm.register_forward_pre_hook(record.norm(name), with_kwargs=True)
    args = example if isinstance(example, tuple) else () if isinstance(example, Mapping) else (example,)
    try:
        # the random numbers that it may draw are drawn again by whoever comes next
        with torch.random.fork_rng(devices=[]), record.uses:
            given = module(*args, **(example if isinstance(example, Mapping) else {}))
    except Exception as error:
        raise PlanError(f"the module does not run on the example: {type(error).__name__}: {error}") from error
    pairs = _pairs(record)
    # until here, for an output that outlives the forward pass is seen by the caller
    del given
    norms = {layer: norm for layer, norm in pairs.items() if layer in proportional and norm in capable}
    return Trace(_stages(record), norms)


def _batch_norms(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, _BatchNorm)]


def _is_proportional(layer: nn.Module) -> bool:
    """Whether a kernel k times as large, and nothing else, makes what it gives but its bias k times as large."""
    kind = type(layer)
    own_way = getattr(kind, "_conv_forward", None)
    return kind.forward in _PROPORTIONAL and (own_way is None or own_way in _CONVOLVE) and not layer._forward_hooks


def _takes_gains(norm: _BatchNorm, holders: Counter[int]) -> bool:
    """Whether a norm has statistics and a scale of its own to take up gains and signs."""
    scale = norm._parameters.get("weight")
    return type(scale) is nn.Parameter and holders[id(scale)] == 1


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


def _pairs(record: _Record) -> dict[str, str]:
    """Layers and norms that meet once, and nobody else between them."""
    calls = Counter(name for name, _, _ in record.calls)
    return {
        output.layer: output.norms[0]
        for output in record.outputs
        if calls[output.layer] == 1 and output.goes_to_one_norm_alone() and record.norm_calls[output.norms[0]] == 1
    }

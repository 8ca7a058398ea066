"""What of a foreign module can share a kernel: its convolutions and linear layers, and why others cannot."""

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from dacnn.errors import PlanError
from dacnn.sharing.anchors import Anchors

Layer = _ConvNd | nn.Linear

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel")


@dataclass(frozen=True)
class Survey:
    """The layers of a module.

    Attributes:
        layers: Those that can share a kernel, by name, in the module's order.
        refused: Why others cannot, by name.
        aliases: Further names of layers that stand at several places, and the name above.
    """

    layers: Mapping[str, Layer]
    refused: Mapping[str, str]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def without(self, reasons: Mapping[str, str]) -> "Survey":
        """The same but for some layers.

        Args:
            reasons: Why they cannot share, by name; names of no layer are passed over.

        Returns:
            The other layers.
        """
        layers = {name: layer for name, layer in self.layers.items() if name not in reasons}
        refused = {name: why for name, why in reasons.items() if name in self.layers}
        return Survey(layers, {**self.refused, **refused}, self.aliases)


def kernel_kind(layer: Layer) -> tuple[Hashable, ...]:
    """What two layers must have in common to read one kernel."""
    weight = layer.weight
    family = "linear" if isinstance(layer, nn.Linear) else "transposed" if isinstance(layer, _ConvTransposeNd) else "conv"
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    return family, tuple(weight.shape), groups, weight.dtype, weight.device, weight.requires_grad


def survey(module: nn.Module, regulator: str | None = None) -> Survey:
    """Find the layers that can share a kernel.

    Args:
        module: Any module; left as it is.
        regulator: What shall stand behind them, if anything.

    Returns:
        The layers.

    Raises:
        PlanError: It is no module, or is wrapped, compiled, scripted, or shares by anchors already.
    """
    if not isinstance(module, nn.Module):
        raise PlanError(f"got {type(module).__name__}: expected an nn.Module whose layers shall share kernels")
    holders = parameter_holders(module)
    names: dict[nn.Module, str] = {}
    layers: dict[str, Layer] = {}
    refused: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        if part in names:
            aliases[name] = names[part]
            continue
        names[part] = name
        _refuse_wrapper(name, part)
        reason = _reason_against(part, holders)
        if reason:
            refused[name] = reason
        elif isinstance(part, _ConvNd | nn.Linear):
            layers[name] = part
    found = Survey(layers, refused, aliases)
    return found if regulator is None else found.without(dict(_past_regulators(module, regulator)))


def parameter_holders(module: nn.Module) -> Counter[int]:
    """How many parts of a module hold each parameter, by the parameter's id."""
    return Counter(id(parameter) for part in module.modules() for parameter in part._parameters.values())


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
    if "forward" in part.__dict__:
        return "has had its forward replaced: take the replacement off first"
    weight = part._parameters.get("weight")
    if weight is None:
        return "has no weight of its own: something else computes it"
    # subclasses of Parameter stand for something else: packed integers, the shards of several processes
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return f"holds a {type(weight).__name__} of {weight.dtype}: expected a Parameter of floating-point numbers"
    if holders[id(weight)] > 1:
        return "holds a weight that other layers hold too: untie it first"
    return None


def _past_regulators(module: nn.Module, regulator: str) -> Iterator[tuple[str, str]]:
    """Layers behind which a regulator would be passed by or cannot stand, and why."""
    for name, part in module.named_modules():
        if isinstance(part, NonDynamicallyQuantizableLinear):
            yield name, "is read by its attention without being called, so that a regulator would be left out"
        elif isinstance(part, nn.TransformerEncoderLayer):
            reason = "is read without being called when its encoder layer is evaluated, so that a regulator would be left out"
            yield from ((f"{name}.{inner}".lstrip("."), reason) for inner in ("linear1", "linear2"))
        if regulator == "depthwise" and not isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            yield name, "is no 2-d convolution, and a depthwise regulator stands behind those alone: use pointwise"

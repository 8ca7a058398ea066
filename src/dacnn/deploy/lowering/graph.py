"""What a network computes, as `torch.export` sees it: nodes, the layers that they come from, and what is known beforehand."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from dacnn.errors import DacnnError, DeployError, told
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.sharing.trace import copy_of

# N images, C channels, H rows, W columns, K classes

Shape = tuple[int, ...]
# what identifies a stored tensor, whatever its names: where it lies and how
_Place = tuple[int, int, Shape, Shape, torch.dtype]
# two: with one image, what belongs to the batch and what is left over would look alike
_BATCH = 2


class _Logits(nn.Module):
    """What is exported; parameters are called as the network calls them, behind `network.`."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.logits(x)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """What the exporter would print while it fails is said in one line by whoever catches its error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # of attributes that a forward pass sets on its module, which is a copy here
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _export(network: Classifier) -> ExportedProgram:
    of = network.input
    with torch.no_grad(), _quietly():
        # no argument may share memory with another: a network may write over its images
        return torch.export.export(_Logits(network).eval(), (torch.zeros(_BATCH, of.channels, of.height, of.width),))


def _place(tensor: Tensor) -> _Place:
    return (
        tensor.untyped_storage().data_ptr(),
        int(tensor.storage_offset()),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def _first_places(network: Classifier) -> dict[_Place, str]:
    """Where the stored tensors lie, each by the first name that it has."""
    names: dict[_Place, str] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            names.setdefault(_place(tensor), name)
    return names


def _first_names(network: Classifier) -> dict[str, str]:
    """For every name of a stored tensor the first one that the tensor has."""
    names = _first_places(network)
    stored = network.state_dict(keep_vars=True)
    return {name: names[_place(tensor)] for name, tensor in stored.items() if isinstance(tensor, Tensor)}


@dataclass(frozen=True)
class Operation:
    """What a node does.

    Attributes:
        name: Of the ATen operation, without the underscore of one that works in place.
        overload: Which form of it.
        in_place: Whether it writes over its first argument.
        arguments: By name, defaults filled in.
    """

    name: str
    overload: str
    in_place: bool
    arguments: dict[str, Any]


def shape_of(node: Node) -> Shape:
    """Shape of what a node gives, for a batch of two; none where it gives no tensor."""
    value = node.meta.get("val")
    return tuple(map(int, value.shape)) if isinstance(value, Tensor) else ()


def operation_of(node: Node) -> Operation | None:
    """What a node does; None where it is no operation of ATen."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
        return None
    schema = node.target._schema
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    name = schema.name.removeprefix("aten::")
    return Operation(name.removesuffix("_"), schema.overload_name, schema.is_mutable, defaults | given)


class Graph:
    """The nodes of a network's layers, in evaluation mode, on one image size.

    Attributes:
        network: The copy of the network that was exported, float32 on the CPU.
        nodes: All of them, each behind those that it takes from.
        images: The node of the normalised images.
        logits: The node of what comes out.
        stored: The tensors that the network stores or writes as numbers, by name.
    """

    def __init__(self, network: Classifier) -> None:
        """Export a network; it stays as it is.

        Args:
            network: The network.

        Raises:
            DeployError: The export fails.
            PlanError: The network cannot be copied.
            ShapeError: It gives no logits.
        """
        self.network = cast(Classifier, copy_of(network)).to(device="cpu", dtype=torch.float32).eval()
        try:
            exported = _export(self.network)
        except DacnnError:
            raise
        except Exception as error:
            raise DeployError(
                f"{self.kind} cannot be exported: {told(error)}: expected a forward pass of tensor operations alone, "
                "in which no number of an image decides what is computed"
            ) from error
        signature = exported.graph_signature
        targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        targets |= signature.inputs_to_lifted_tensor_constants
        tensors = {**exported.state_dict, **exported.constants}
        self.nodes: Sequence[Node] = tuple(exported.graph.nodes)
        # what is stored under several names is called by the first of them; a copy may tie fewer of them than the network does
        first = _first_names(network)
        names = {place: first[name] for place, name in _first_places(self.network).items()}
        self.stored: dict[str, Tensor] = {}
        self._sources: dict[Node, frozenset[str] | None] = {}
        for node in self.nodes:
            target = targets.get(node.name) if node.op == "placeholder" else None
            if target is not None:
                tensor = tensors[target].detach()
                name = names.get(_place(tensor), target.removeprefix("network."))
                self.stored[name] = tensor
                self._sources[node] = frozenset({name})
        self.images = next(node for node in self.nodes if node.op == "placeholder" and node not in self._sources)
        (outputs,) = self.nodes[-1].args
        self.logits = cast(tuple[Node, ...], outputs)[0]
        self._changed = dict(self._writes())

    def _writes(self) -> Iterator[tuple[Node, Node]]:
        """Stored tensors that are written over, such as a counter, and the nodes that do it."""
        for node in self.nodes:
            operation = operation_of(node)
            # `detach_` stands behind tensors that a forward pass writes as numbers
            if operation and operation.in_place and operation.name != "detach":
                yield cast(Node, node.args[0]), node

    @property
    def kind(self) -> str:
        """What the user calls the network."""
        module = self.network.module if isinstance(self.network, Adapted) else self.network
        return type(module).__name__

    def layer(self, node: Node) -> str:
        """Name of the innermost module that a node comes from, in the network's own words; empty for the network itself."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path = str(stack[-1][0]) if stack else ""
        # a layer that is called again is numbered
        return re.sub(r"@\d+", "", path).removeprefix("network").removeprefix(".")

    def refusal(self, node: Node, reason: str) -> DeployError:
        """The error of a node that cannot be expressed.

        Args:
            node: The node.
            reason: Why it cannot, and what to do.
        """
        layer = self.layer(node)
        if isinstance(self.network, Adapted):
            layer = layer.removeprefix("module").removeprefix(".")
        operation = operation_of(node)
        done = f"aten.{operation.name}" if operation else str(node.target)
        where = f"layer '{layer}'" if layer else f"{self.kind} itself"
        return DeployError(f"{where}: {done} (node '{node.name}') cannot be a step of a Program: {reason}")

    def sources(self, node: Node) -> frozenset[str] | None:
        """Names of the stored tensors that a node's value follows from; None where it follows from the images."""
        if node not in self._sources:
            self._sources[node] = self._traced(node)
        return self._sources[node]

    def _traced(self, node: Node) -> frozenset[str] | None:
        if not isinstance(node.target, torch._ops.OpOverload):
            return None
        # what is drawn is not known
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        sources = [self.sources(argument) for argument in node.all_input_nodes]
        return None if None in sources else frozenset[str]().union(*cast(list[frozenset[str]], sources))

    def value(self, node: Node) -> Tensor:
        """The value of a node that follows from stored tensors alone, floats in float64.

        Raises:
            DeployError: It changes stored tensors, or cannot be evaluated.
        """
        # kept for this value alone: together, the kernels of a bank's readers take far more than the bank
        return self._value(node, {})

    def _value(self, node: Node, known: dict[Node, Tensor]) -> Tensor:
        if node not in known:
            known[node] = self._evaluated(node, known)
        return known[node]

    def _evaluated(self, node: Node, known: dict[Node, Tensor]) -> Tensor:
        if node in self._changed:
            raise self.refusal(self._changed[node], "it changes what is stored: let the forward pass leave that as it is")
        if node.op == "placeholder":
            (name,) = cast(frozenset[str], self.sources(node))
            stored = self.stored[name]
            return stored.double() if stored.is_floating_point() else stored
        args, kwargs = tree_map_only(Node, lambda argument: self._value(argument, known), (node.args, node.kwargs))
        try:
            value = cast(Any, node.target)(*args, **kwargs)
        except Exception as error:
            raise self.refusal(node, f"it cannot be evaluated in float64: {told(error)}") from error
        if not isinstance(value, Tensor):
            raise self.refusal(node, "it gives several tensors: give the kernel to its layer as one")
        return value.double() if value.is_floating_point() else value

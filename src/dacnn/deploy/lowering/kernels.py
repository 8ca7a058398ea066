"""The tensors of a Program under their names, and the expression by which each layer reads its kernel."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.fx import Node

from dacnn.deploy.lowering.graph import Graph
from dacnn.deploy.program import CombinedKernel, Kernel, RepeatedKernel, StoredKernel
from dacnn.sharing.anchors import Combine, Expression, Repeat, Stored, parameter_name

# evaluating an expression here and in the graph may sum in another order, both in float64
_RELATIVE_ERROR = 1e-9


class Kernels:
    """Which stored tensor, or which expression over stored tensors, a node is.

    Attributes:
        tensors: What the steps name so far.
    """

    def __init__(self, graph: Graph) -> None:
        """Know the network's owner of kernels."""
        self.graph = graph
        self.tensors: dict[str, NDArray[np.float32]] = {}
        # kernels that are neither stored nor an expression of ours: names by their bytes
        self._computed: dict[tuple[tuple[int, ...], bytes], str] = {}
        self._expressions: dict[frozenset[str], tuple[Expression, tuple[str, ...]]] = {}
        owner = graph.network.owner
        if owner is None:
            return
        home = next(name for name, part in graph.network.named_modules() if part is owner)
        for reader, expression in owner.expressions.items():
            own = [f"{home}.own.{parameter_name(reader)}.{key}" for key in owner.own_tensors(reader)]
            names = (f"{home}.{expression.anchor}", *own)
            if not isinstance(expression, Stored):
                self._expressions[frozenset(names)] = expression, names

    def put(self, name: str, tensor: Tensor) -> str:
        """Take a tensor in.

        Args:
            name: What it shall be called.
            tensor: The tensor; rounded to float32.

        Returns:
            What it is called: where another has the name already, with a number behind it.
        """
        # a copy of its own, in rows: what is stored may be a part of something larger, or lie in another order
        array = np.array(tensor.detach().to(torch.float32).numpy(), order="C")
        unique, number = name, 1
        while unique in self.tensors:
            if np.array_equal(self.tensors[unique], array, equal_nan=True):
                return unique
            number += 1
            unique = f"{name}.{number}"
        self.tensors[unique] = array
        return unique

    def _put_stored(self, name: str) -> str:
        return name if name in self.tensors else self.put(name, self.graph.stored[name])

    def kernel(self, weight: Node, reader: Node) -> Kernel:
        """The kernel that a layer reads.

        Args:
            weight: The node of the kernel.
            reader: The node that reads it.

        Raises:
            DeployError: The kernel follows from the images.
        """
        sources = self.graph.sources(weight)
        if sources is None:
            raise self.graph.refusal(reader, "its kernel follows from the images: expected one that is stored")
        value = self.graph.value(weight)
        if sources in self._expressions:
            expression, names = self._expressions[sources]
            stored = (self.graph.stored[name].double() for name in names)
            if _alike(value, expression.evaluate(*stored)):
                return _expressed(expression, [self._put_stored(name) for name in names])
        if len(sources) == 1:
            (name,) = sources
            if weight.op == "placeholder" or torch.equal(value, self.graph.stored[name].double()):
                return StoredKernel(self._put_stored(name))
        return StoredKernel(self._put_computed(f"{self.graph.layer(reader)}.kernel".removeprefix("."), value))

    def _put_computed(self, name: str, value: Tensor) -> str:
        """A kernel that the network computes in its own way, such as a standardised one: once for all who compute the same."""
        key = tuple(value.shape), value.to(torch.float32).numpy().tobytes()
        if key not in self._computed:
            self._computed[key] = self.put(name, value)
        return self._computed[key]

    def name_of(self, tensor: Tensor, node: object) -> str | None:
        """Name of the stored tensor that a node is made from, where `tensor` has its numbers, as they are; else None."""
        sources = self.graph.sources(node) if isinstance(node, Node) else None
        if sources is None or len(sources) != 1:
            return None
        (name,) = sources
        return name if torch.equal(tensor.flatten(), self.graph.stored[name].double().flatten()) else None


def _alike(value: Tensor, other: Tensor) -> bool:
    if value.shape != other.shape:
        return False
    largest = float(other.abs().max())
    return torch.allclose(value, other, rtol=_RELATIVE_ERROR, atol=_RELATIVE_ERROR * largest, equal_nan=True)


def _expressed(expression: Expression, names: list[str]) -> Kernel:
    if isinstance(expression, Combine):
        tensor, coefficients = names
        return CombinedKernel(tensor, coefficients)
    assert isinstance(expression, Repeat)
    tensor, gain, steepness = names
    return RepeatedKernel(tensor, gain, steepness)

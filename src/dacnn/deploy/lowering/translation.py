"""From the nodes of a graph to steps, one after the other.

A value of the Program may be seen by nodes in other shapes that hold the same numbers in the same order: reshapes are no steps
until an operation wants N x F of what is N x C x H x W. Padding waits for the convolution that it belongs to. A node that is no
step is an error only where the logits follow from it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dacnn.deploy.lowering.drafts import Affine, Draft, Unflatten
from dacnn.deploy.lowering.graph import Graph, Operation, Shape, operation_of, shape_of
from dacnn.deploy.lowering.kernels import Kernels
from dacnn.deploy.program import IMAGES, Flatten, Normalize
from dacnn.errors import DeployError

# N images, C channels, H rows, W columns, F features

Padding = tuple[int, int, int, int]
_NONE: Padding = (0, 0, 0, 0)


@dataclass(frozen=True)
class Value:
    """What a node gives.

    Attributes:
        name: Of the Program's value that holds its numbers.
        shape: The shape that the value has there.
        memory: What lies in the same memory has the same number, and changes with it.
        padding: What is still to be put around it.
        fill: Of which number.
        padder: The node that wants it padded.
    """

    name: str
    shape: Shape
    memory: int
    padding: Padding = _NONE
    fill: float = 0.0
    padder: Node | None = None


class Translation:
    """Goes through the nodes of a graph.

    Attributes:
        graph: The graph.
        kernels: The tensors that the steps name.
        steps: The steps so far, some of which the logits may not need.
        shapes: Of what they give, by name, for a batch of two.
    """

    def __init__(self, graph: Graph, table: "Mapping[str, Step]") -> None:
        """Begin with the images.

        Args:
            graph: What to translate.
            table: For every operation that is a step, or none at all: what translates it.
        """
        self.graph = graph
        self._table = table
        self.kernels = Kernels(graph)
        self.steps: list[Draft] = []
        self.shapes: dict[str, Shape] = {}
        self._values: dict[Node, Value | DeployError] = {}
        # values by another number of dimensions than they have
        self._turned: dict[tuple[str, Shape], Value] = {}
        self._count = 0

    def run(self) -> Value:
        """Translate every node.

        Returns:
            The logits, N x K.

        Raises:
            DeployError: They follow from a node that no step can express.
        """
        for node in self.graph.nodes:
            if node is self.graph.images:
                self._values[node] = self.emit(node, lambda out: Normalize(out, IMAGES))
            elif node.op not in ("placeholder", "output") and self.graph.sources(node) is None:
                self._translate(node)
        return self.as_seen(self.graph.logits, self.graph.logits)

    def _translate(self, node: Node) -> None:
        operation = operation_of(node)
        try:
            result: Value | DeployError = self._step(node, operation)
        except DeployError as error:
            # raised once more for everything that follows from it
            result = error.with_traceback(None)
        if operation is not None and operation.in_place:
            result = self._written_over(node, result)
        self._values[node] = result

    def _step(self, node: Node, operation: Operation | None) -> Value:
        for argument in node.all_input_nodes:
            found = self._values.get(argument)
            if isinstance(found, DeployError):
                raise found
        if operation is None or operation.name not in self._table:
            raise self.graph.refusal(node, "no step does this: replace the layer, or run the network in PyTorch")
        return self._table[operation.name](self, node, operation.arguments)

    def _written_over(self, node: Node, result: Value | DeployError) -> Value | DeployError:
        """Let everything that lies in the memory of the first argument be what was written there."""
        target = node.args[0]
        before = self._values.get(target) if isinstance(target, Node) else None
        if isinstance(result, DeployError) or not isinstance(before, Value):
            # nobody knows what was changed
            error = result if isinstance(result, DeployError) else before
            assert isinstance(error, DeployError)
            self._values = dict.fromkeys(self._values, error)
            return error
        result = dataclasses.replace(result, memory=before.memory)
        for other, value in self._values.items():
            if isinstance(value, Value) and value.memory == before.memory:
                self._values[other] = result
        return result

    def new_memory(self) -> int:
        """A number for memory of its own."""
        self._count += 1
        return self._count

    def emit(self, node: Node, make: Callable[[str], Draft], shape: Shape | None = None) -> Value:
        """Add a step.

        Args:
            node: The node that it comes from.
            make: From the name of what it gives to the step.
            shape: Of what it gives; None: that of what the node gives.
        """
        shape = shape_of(node) if shape is None else shape
        name = f"v{len(self.shapes)}"
        self.steps.append(make(name))
        self.shapes[name] = shape
        return Value(name, shape, self.new_memory())

    def refuse(self, node: Node, reason: str) -> DeployError:
        """The error of a node."""
        return self.graph.refusal(node, reason)

    def seen(self, node: Node, argument: object) -> Value:
        """An argument that follows from the images, its numbers in whatever shape."""
        value = self._values.get(argument) if isinstance(argument, Node) else None
        if isinstance(value, DeployError):
            raise value
        if value is None:
            raise self.refuse(node, "it takes nothing that follows from the images: leave it out, or store its value")
        return value

    def as_seen(self, node: Node, argument: object, padded: bool = False) -> Value:
        """An argument that follows from the images, in the shape in which the node sees it.

        Args:
            node: The node that takes it.
            argument: The argument.
            padded: Whether padding may still stand out.
        """
        value = self.seen(node, argument)
        assert isinstance(argument, Node)
        shape = shape_of(argument)
        if value.padder is not None:
            if not padded:
                raise self.refuse(value.padder, f"only a convolution can take it in, but '{node.name}' reads it")
            return value
        if value.shape == shape:
            return value
        turned = self._turned.get((value.name, shape)) or self._turn(node, value, shape)
        self._turned[value.name, shape] = turned
        return dataclasses.replace(value, name=turned.name, shape=shape)

    def _turn(self, node: Node, value: Value, shape: Shape) -> Value:
        """Between N x C x H x W and N x F, or N x C x 1 x 1 and N x C."""
        if len(value.shape) == 4 and shape == (value.shape[0], math.prod(value.shape[1:])):
            return self.emit(node, lambda out: Flatten(out, value.name), shape)
        if shape == (*value.shape, 1, 1):
            return self.emit(node, lambda out: Unflatten(out, value.name, node), shape)
        raise self.refuse(
            node, f"it takes {written(shape)} of what is {written(value.shape)}: leave the images' order as it is"
        )

    def known(self, node: object) -> Tensor | None:
        """A tensor or a number that does not follow from the images, in float64; None for what does."""
        if isinstance(node, Node):
            return self.graph.value(node).double() if self.graph.sources(node) is not None else None
        return torch.tensor(float(node), dtype=torch.float64) if isinstance(node, (int, float)) else None

    def per_channel(self, node: Node, tensor: Tensor, shape: Shape) -> Tensor:
        """A known tensor as one number for each channel of a value, shape (C,)."""
        ones = (1,) * (len(shape) - tensor.ndim)
        spread = (*ones, *tensor.shape)
        if len(spread) != len(shape) or any(size != 1 for index, size in enumerate(spread) if index != 1):
            raise self.refuse(
                node, f"{written(tuple(tensor.shape))} numbers on {written(shape)}: expected one for each channel"
            )
        return tensor.flatten().expand(shape[1]).contiguous()

    def affine(
        self, node: Node, x: Value, scale: Tensor | None, shift: Tensor | None, *, base: str | None = None, **names: Any
    ) -> Value:
        """Add a scale and shift of every channel."""
        base = self.graph.layer(node) if base is None else base
        return self.emit(node, lambda out: Affine(out, x.name, scale, shift, base, **names))


def written(shape: Shape) -> str:
    """A shape in the words of an error."""
    return " x ".join(["N", *map(str, shape[1:])]) if shape else "a number"


def pair(numbers: Any) -> tuple[int, int]:
    """Rows and columns, of one number or two."""
    listed = list(numbers) if isinstance(numbers, (list, tuple)) else [numbers]
    rows, columns = listed * 2 if len(listed) == 1 else listed
    return int(rows), int(columns)


Arguments = dict[str, Any]
Step = Callable[[Translation, Node, Arguments], Value]

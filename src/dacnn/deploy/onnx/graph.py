"""What an ONNX model is written with: graphs in graphs, names that are unique, each tensor stored once."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dacnn.deploy.onnx.shapes import Shape, Shapes
from dacnn.deploy.program import KernelStep, Program, Reference, Row
from dacnn.errors import ArtefactError, DeployError
from dacnn.measure.onnx_arrays import import_onnx

# `small`: every kernel stands in the outermost graph. `fast`: one that a single body reads stands in that
Form = Literal["small", "fast"]


class Model:
    """What all graphs of a model have in common.

    Attributes:
        onnx: The package.
        program: What is written.
        shapes: Shapes of the program's values.
        form: Where kernels stand; None: the program is written for runtimes to optimise as they like.
        stored: Shapes in which the tensors are stored that are written already.
        of_shared_kernels: The values that are made with a kernel that several operations read.
    """

    def __init__(self, program: Program, shapes: Shapes, form: Form | None, reserved: Sequence[str]) -> None:
        """Begin a model.

        Args:
            program: What is to be written.
            shapes: Shapes of its values.
            form: Where kernels stand, or None.
            reserved: Names of the model's input and output.

        Raises:
            DeployError: The onnx package is missing.
        """
        try:
            self.onnx = import_onnx()
        except ArtefactError as error:
            raise DeployError(str(error)) from None
        self.program = program
        self.shapes = shapes
        self.form = form
        self.stored: dict[str, tuple[int, ...]] = {}
        readers = program.readers()
        self.of_shared_kernels = {
            step.out
            for step in program.operations()
            if isinstance(step, KernelStep) and readers.get(str(step.kernel.tensor), 0) > 1
        }
        # tensors keep the names that the program gives them
        self._taken = {*reserved, *program.tensors}

    def name(self, wish: str) -> str:
        """A name that nothing else in the model has: the wished one, or that with a number."""
        name, number = wish, 1
        while name in self._taken:
            name, number = f"{wish}.{number}", number + 1
        self._taken.add(name)
        return name

    def typed(self, name: str, shape: Shape) -> Any:
        """Name, type and shape of a float value; the number of images is N."""
        helper = self.onnx.helper
        return helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, ["N", *shape[1:]])


class Graph:
    """A graph while it is written: the model's own, a loop's body, or one side of a branch.

    Attributes:
        model: What it belongs to.
        outer: The graph that it stands in.
        nodes: What it does, in order.
        initializers: What it stores.
        values: Names here of the program's values that became known here.
    """

    def __init__(self, model: Model, number: "Callable[[Graph], str]", outer: "Graph | None" = None) -> None:
        """Begin a graph.

        Args:
            model: What it belongs to.
            number: Adds to the graph what computes the number of its current turn, and names that.
            outer: The graph that it stands in.
        """
        self.model = model
        self.outer = outer
        self._number = number
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.values: dict[str, str] = {}

    def value(self, name: str) -> str:
        """The name that a value of the program has in the model."""
        if name in self.values:
            return self.values[name]
        assert self.outer is not None, f"value '{name}' is read before it is made"
        return self.outer.value(name)

    @property
    def outermost(self) -> "Graph":
        """The model's own graph."""
        return self.outer.outermost if self.outer else self

    @cached_property
    def turn(self) -> str:
        """Name of the number of the current turn, computed here for whatever asks for it."""
        return self._number(self)

    def node(self, operator: str, inputs: Sequence[str], wish: str, **attributes: Any) -> str:
        """Add a node of one output.

        Args:
            operator: Name of the ONNX operator.
            inputs: Names of what it takes.
            wish: What to call the result.
            attributes: Those of the operator.

        Returns:
            The name of the result.
        """
        name = self.model.name(wish)
        self.add(operator, inputs, [name], **attributes)
        return name

    def add(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add a node whose outputs are named already."""
        # a node is called like what it gives
        self.nodes.append(self.model.onnx.helper.make_node(operator, inputs, outputs, name=outputs[0], **attributes))

    def constant(self, numbers: object, wish: str, dtype: "type[np.generic]" = np.float32) -> str:
        """Store a few numbers of the structure in this graph, where runtimes see that they are constant."""
        name = self.model.name(wish)
        self.store(name, np.asarray(numbers, dtype))
        return name

    def store(self, name: str, values: "NDArray[Any]") -> None:
        """Store an array in this graph."""
        # as raw bytes, whatever memory it comes in
        self.initializers.append(self.model.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))

    def tensor(self, reference: Reference, shape: Sequence[int]) -> str:
        """Read a tensor of the program, or the current turn's row of one.

        Args:
            reference: Which.
            shape: The shape in which it is wanted: other than its own where that spares a step.

        Returns:
            Its name.
        """
        if isinstance(reference, Row):
            return self._row(reference.table, self.model.program.tensors[reference.table].shape[0], shape, self.turn)
        return self._reshaped(reference, self._stored(reference, shape), shape)

    def unfolded(self, reference: Reference, shape: Sequence[int]) -> str:
        """Read a tensor so that a runtime cannot take it for constant, and compute a kernel from it in advance.

        A flat program is left to the runtime.

        Args:
            reference: Which.
            shape: The shape in which it is wanted; where it is no row, the first side is 1.

        Returns:
            Its name.
        """
        if isinstance(reference, Row) or self.model.form is None:
            return self.tensor(reference, shape)
        # a table of one row, whose number is 0 whatever the images are
        return self._row(reference, 1, shape, self.outermost.turn)

    def _row(self, table: str, rows: int, shape: Sequence[int], turn: str) -> str:
        stored = self._stored(table, (rows, *shape))
        return self._reshaped(self.node("Gather", [table, turn], f"{table}.row", axis=0), stored[1:], shape)

    def _stored(self, tensor: str, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape in which a tensor is stored, which its first reader chooses."""
        if tensor not in self.model.stored:
            self.outermost.take_in(tensor, shape)
        return self.model.stored[tensor]

    def _reshaped(self, name: str, found: Sequence[int], shape: Sequence[int]) -> str:
        if tuple(found) == tuple(shape):
            return name
        return self.node("Reshape", [name, self.constant(shape, "shape", np.int64)], f"{name}.reshaped")

    def take_in(self, tensor: str, shape: Sequence[int]) -> None:
        """Store a tensor of the program in this graph, for all graphs in it to read."""
        self.store(tensor, self.model.program.tensors[tensor].reshape(shape))
        self.model.stored[tensor] = tuple(shape)

    def finish(self, name: str, inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
        """The graph as ONNX writes it."""
        return self.model.onnx.helper.make_graph(self.nodes, name, inputs, outputs, self.initializers)

"""Loops and branches of a Program as `Loop` and `If` of ONNX, whose bodies are graphs of their own."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from dacnn.deploy.onnx.graph import Graph
from dacnn.deploy.onnx.steps import write
from dacnn.deploy.program import Branch, KernelStep, Loop, Step, StoredKernel


def write_steps(graph: Graph, steps: Sequence[Step]) -> None:
    """Add the nodes of steps, loops and branches among them.

    Args:
        graph: Where they are added.
        steps: The steps, in order.
    """
    for step in steps:
        if isinstance(step, Loop):
            _write_loop(graph, step)
        elif isinstance(step, Branch):
            _write_branch(graph, step)
        else:
            graph.values[step.out] = write(graph, step)


def _looked_up(graph: Graph, numbers: Sequence[Any], wish: str, dtype: "type[np.generic]" = np.int64) -> str:
    """The number that belongs to the current turn of a graph; of one number, that, and no turn is asked for."""
    if len(numbers) == 1:
        return graph.constant(numbers[0], wish, dtype)
    return graph.node("Gather", [graph.constant(numbers, f"{wish}s", dtype), graph.turn], wish, axis=0)


def _write_loop(graph: Graph, loop: Loop) -> None:
    model, helper = graph.model, graph.model.onnx.helper
    passed, going, goes_on = model.name("turn"), model.name("going"), model.name("goes_on")
    before = [0, *itertools.accumulate(loop.counts)][:-1]

    def number(body: Graph) -> str:
        if len(before) == 1:
            return passed
        # numbered from the first turn on, through all times that the loop is entered
        return body.node("Add", [_looked_up(graph, before, "turns_before"), passed], "turn")

    body = Graph(model, number, graph)
    body.values = {one.name: model.name(one.name) for one in loop.carried}
    _take_in_kernels(body, loop.steps)
    begins = [model.typed(body.values[one.name], model.shapes[one.name]) for one in loop.carried]
    write_steps(body, loop.steps)
    body.add("Identity", [going], [goes_on])
    ends = [model.typed(name, model.shapes[one.next]) for one, name in zip(loop.carried, _given(body, loop), strict=True)]
    integer, boolean = model.onnx.TensorProto.INT64, model.onnx.TensorProto.BOOL
    inner = body.finish(
        "turns",
        [helper.make_tensor_value_info(passed, integer, []), helper.make_tensor_value_info(going, boolean, []), *begins],
        [helper.make_tensor_value_info(goes_on, boolean, []), *ends],
    )
    count = _looked_up(graph, loop.counts, "count")
    starts = [graph.value(one.start) for one in loop.carried]
    names = [model.name(one.name) for one in loop.carried]
    graph.add("Loop", [count, "", *starts], names, body=inner)
    graph.values |= dict(zip((one.name for one in loop.carried), names, strict=True))


def _given(body: Graph, loop: Loop) -> list[str]:
    """Names of what a turn gives to the next: made in the body, each its own."""
    names: list[str] = []
    for one in loop.carried:
        name = body.value(one.next)
        if name in names or not any(name in node.output for node in body.nodes):
            name = body.node("Identity", [name], f"{one.name}.next")
        names.append(name)
    return names


def _write_branch(graph: Graph, branch: Branch) -> None:
    runs_before = [0, *itertools.accumulate(branch.runs)][:-1]
    runs = _looked_up(graph, branch.runs, "runs", np.bool_)
    then = Graph(graph.model, lambda body: _looked_up(graph, runs_before, "turn"), graph)
    _take_in_kernels(then, branch.steps)
    write_steps(then, branch.steps)
    otherwise = Graph(graph.model, lambda side: graph.turn, graph)
    sides = [_side(then, branch.value, "runs"), _side(otherwise, branch.otherwise, "does_not_run")]
    name = graph.model.name(branch.out)
    graph.add("If", [runs], [name], then_branch=sides[0], else_branch=sides[1])
    graph.values[branch.out] = name


def _side(graph: Graph, value: str, name: str) -> Any:
    """A side of a branch, which must make what it gives."""
    given = graph.value(value)
    if not any(given in node.output for node in graph.nodes):
        given = graph.node("Identity", [given], f"{value}.kept")
    return graph.finish(name, [], [graph.model.typed(given, graph.model.shapes[value])])


def _take_in_kernels(body: Graph, steps: Sequence[Step]) -> None:
    """In the form `fast`, store in a body the kernels that nothing outside it reads, for a runtime to pack them once.

    One that several bodies read stays outside, so that the file holds it once.
    """
    if body.model.form != "fast":
        return
    readers = body.model.program.readers()
    here = Counter(
        step.kernel.tensor
        for step in steps
        if isinstance(step, KernelStep) and isinstance(step.kernel, StoredKernel) and isinstance(step.kernel.tensor, str)
    )
    for tensor, times in here.items():
        if times == readers[tensor]:
            body.take_in(tensor, body.model.program.tensors[tensor].shape)

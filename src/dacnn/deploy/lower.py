"""A trained network, ours or a foreign one, as a flat Program: from its `torch.export` graph, one way for all."""

from dataclasses import replace

import numpy as np
import torch

from dacnn.deploy.integers.floats import run
from dacnn.deploy.lowering.drafts import Affine, Draft, Unflatten, living, merged, renamed
from dacnn.deploy.lowering.graph import Graph, shape_of
from dacnn.deploy.lowering.kernels import Kernels
from dacnn.deploy.lowering.pixels import as_pixels
from dacnn.deploy.lowering.pointwise import POINTWISE
from dacnn.deploy.lowering.reshapes import RESHAPES
from dacnn.deploy.lowering.translation import Translation
from dacnn.deploy.lowering.weighted import WEIGHTED
from dacnn.deploy.lowering.windows import WINDOWS
from dacnn.deploy.program import IMAGES, Operation, Program, ScaleShift, references
from dacnn.deploy.shapes import flat_steps
from dacnn.errors import DeployError
from dacnn.networks.classifier import Classifier, as_network
from dacnn.networks.network import Network

# of the largest logit: what rounding alone makes, and a pixel of padding does not
_SAME = 1e-3


@torch.no_grad()
def lower(network: Classifier) -> Program:
    """Turn a network, as it is in evaluation mode, into steps and the tensors that they name.

    Kernels are those that the network stores, bit for bit, each once however many layers read it; batch norms and biases
    become scales and shifts behind the convolutions, computed in float64 and rounded to float32.

    Args:
        network: A network of this library, or a foreign one adapted by it; it stays as it is. A foreign network may compute
            from the size of its images how they are padded: the Program is that of the size in `network.input`, and says
            whether it holds for others.

    Returns:
        The Program, without loops.

    Raises:
        DeployError: An operation of the network is no step of a Program, the network cannot be exported, or its values are no
            numbers.
        ConfigError: This is no network.
        PlanError: It cannot be copied.
        ShapeError: It gives no logits.
    """
    network = as_network(network)
    graph = Graph(network)
    translation = Translation(graph, WEIGHTED | WINDOWS | POINTWISE | RESHAPES)
    logits = translation.run()
    if len(shape_of(graph.logits)) != 2:
        raise graph.refusal(graph.logits, "the network gives no logits, N x K")
    drafts, result = as_pixels(living(translation.steps, logits.name), logits.name, translation)
    drafts = merged(drafts, result)
    names = {IMAGES: IMAGES} | {step.out: f"x{index}" for index, step in enumerate(drafts)}
    steps = tuple(_rounded(renamed(step, names), translation.kernels) for step in drafts)
    read = {str(name) for step in steps for name in references(step)}
    tensors = {name: tensor for name, tensor in translation.kernels.tensors.items() if name in read}
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise DeployError(f"'{name}' has values that are no numbers (NaN, infinite): the training went astray: train again")
    name = network.plan.name if isinstance(network, Network) else graph.kind
    program = Program(name, network.input, network.classes, steps, names[result], tensors)
    return program if isinstance(network, Network) else replace(program, any_size=_holds_for_others(program, graph.network))


def _holds_for_others(program: Program, network: Classifier) -> bool:
    """Whether the steps give what the network gives on larger images too, of odd sides: what was computed from a size shows."""
    of, random = program.input, torch.Generator().manual_seed(0)
    x = torch.randn(2, of.channels, 2 * of.height + 1, 2 * of.width + 3, generator=random)
    tensors = {name: torch.from_numpy(tensor) for name, tensor in program.tensors.items()}
    try:
        expected = network.logits(x.clone())
        found = run(flat_steps(program), program.result, x, of, tensors)
    except Exception:  # whatever somebody else's forward pass makes of such images
        return False
    return found.shape == expected.shape and bool((found - expected).abs().max() <= _SAME * expected.abs().max())


def _rounded(step: Draft, kernels: Kernels) -> Operation:
    assert not isinstance(step, Unflatten)
    if not isinstance(step, Affine):
        return step
    scale, shift = (
        None if tensor is None else kernels.put(name, tensor)
        for name, tensor in zip(step.names, (step.scale, step.shift), strict=True)
    )
    return ScaleShift(step.out, step.x, scale, shift)

"""What a network stores, what it uses, what it computes."""

import copy
import math
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dacnn.checkpoint import stored_once
from dacnn.networks.classifier import Classifier
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan


@dataclass(frozen=True)
class Counts:
    """The size of a network.

    Attributes:
        stored_parameters: Parameters in memory and in a file: each kernel once.
        used_parameters: The same with each kernel counted for every layer that reads it.
        stored_bytes: Bytes of parameters and buffers in float32.
        macs: Multiply-adds of convolutions and the linear layer for one image of the plan's input size.
    """

    stored_parameters: int
    used_parameters: int
    stored_bytes: int
    macs: int

    def to_table(self) -> dict[str, int]:
        """The fields as plain values."""
        return asdict(self)


def count(network: Classifier | Plan) -> Counts:
    """Count what a network stores, uses and computes.

    Args:
        network: A network, or the plan of one, which is not built for this. A foreign one is run once, on one image.

    Returns:
        The counts.

    Example:
        >>> import dacnn
        >>> counts = dacnn.count(dacnn.create("dacnn14", num_classes=100))
        >>> counts.stored_parameters, counts.used_parameters
        (167140, 1789156)
    """
    if isinstance(network, Plan | Network):
        with torch.device("meta"):
            twin: Classifier = Network(network if isinstance(network, Plan) else network.plan)
    else:
        twin = copy.deepcopy(network)
    input, device = twin.input, next(twin.parameters()).device
    images = torch.zeros(1, input.channels, input.height, input.width, device=device)
    stored = sum(parameter.numel() for parameter in twin.parameters())
    again = 0
    if twin.owner is not None:
        # what a reader stores for itself is in its kernel already
        evaluated = sum(map(math.prod, twin.owner.kernel_shapes.values()))
        again = evaluated - sum(parameter.numel() for parameter in twin.owner.parameters())
    twin.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(images)
    return Counts(
        stored_parameters=stored,
        used_parameters=stored + again,
        stored_bytes=sum(tensor.numel() * tensor.element_size() for tensor in stored_once(twin.state_dict()).values()),
        # PyTorch counts a multiply-add as two operations
        macs=counter.get_total_flops() // 2,
    )

"""What a network stores, what it uses, what it computes."""

import math
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

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


def count(network: Network | Plan) -> Counts:
    """Count what a network stores, uses and computes.

    Args:
        network: A network, or the plan of one, which is not built for this.

    Returns:
        The counts.

    Example:
        >>> import dacnn
        >>> counts = dacnn.count(dacnn.create("dacnn14", num_classes=100))
        >>> counts.stored_parameters, counts.used_parameters
        (167140, 1789156)
    """
    plan = network if isinstance(network, Plan) else network.plan
    with torch.device("meta"):
        twin = Network(plan).eval()
        images = torch.empty(1, plan.input.channels, plan.input.height, plan.input.width)
    stored = sum(parameter.numel() for parameter in twin.parameters())
    # what a reader stores for itself is in its kernel already
    evaluated = sum(math.prod(layer.kernel_shape) for layer in plan.layers())
    again = evaluated - sum(parameter.numel() for parameter in twin.anchors.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(images)
    return Counts(
        stored_parameters=stored,
        used_parameters=stored + again,
        stored_bytes=sum(tensor.numel() * tensor.element_size() for tensor in twin.state_dict().values()),
        # PyTorch counts a multiply-add as two operations
        macs=counter.get_total_flops() // 2,
    )

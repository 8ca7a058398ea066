"""What a network stores, what it uses, what it computes, what it holds while it computes."""

import copy
import math
from dataclasses import asdict, dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from dacnn.checkpoint import stored_once
from dacnn.measure.live import LiveTensors
from dacnn.networks.classifier import Classifier, as_network
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan


@dataclass(frozen=True)
class Counts:
    """The size of a network.

    Attributes:
        stored_parameters: Parameters in memory and in a file: each kernel once.
        used_parameters: The same with each kernel counted for every layer that reads it.
        stored_bytes: Bytes of parameters and buffers (the norms' running statistics and counters) in float32.
        bfloat16_bytes: The same if every float among them took two bytes.
        int8_bytes: The same if every float took one; scales, which integers need as well, are not counted.
        macs: Multiply-adds of convolutions and the linear layer for one image of the plan's input size.
        activation_peak_bytes: Most bytes of tensors beside the weights, the image included, that live at a time while
            PyTorch classifies one image in float32.
    """

    stored_parameters: int
    used_parameters: int
    stored_bytes: int
    bfloat16_bytes: int
    int8_bytes: int
    macs: int
    activation_peak_bytes: int

    def to_table(self) -> dict[str, int]:
        """The fields as plain values."""
        return asdict(self)


def count(network: Classifier | Plan) -> Counts:
    """Count what a network stores, uses, computes and holds.

    Args:
        network: A network, or the plan of one, which is not built for this. A foreign one is run once, on one image.

    Returns:
        The counts.

    Raises:
        ConfigError: This is no network.

    Example:
        >>> import dacnn
        >>> counts = dacnn.count(dacnn.create("dacnn14", num_classes=100))
        >>> counts.stored_parameters, counts.used_parameters
        (167140, 1789156)
    """
    network = network if isinstance(network, Plan) else as_network(network)
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
    with FlopCounterMode(display=False) as operations, LiveTensors() as live, torch.no_grad():
        live.label("weights", (*twin.parameters(), *twin.buffers()))
        live.label("activations", [images])
        twin(images)
    return Counts(
        stored_parameters=stored,
        used_parameters=stored + again,
        stored_bytes=_stored_bytes(twin, torch.float32),
        bfloat16_bytes=_stored_bytes(twin, torch.bfloat16),
        int8_bytes=_stored_bytes(twin, torch.int8),
        # PyTorch counts a multiply-add as two operations
        macs=operations.get_total_flops() // 2,
        activation_peak_bytes=live.peak()["activations"],
    )


def _stored_bytes(network: Classifier, dtype: torch.dtype) -> int:
    """Bytes of what the state dict holds, its floats stored as another type; counters keep theirs."""
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        for tensor in stored_once(network.state_dict()).values()
    )

"""What a network stores, what it uses, what it computes, what it holds while it computes."""

import contextlib
import copy
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dacnn.checkpoint import stored_once
from dacnn.measure.live import LiveTensors
from dacnn.networks.classifier import Classifier, as_network
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan

_ATEN = torch.ops.aten
# attention on a CPU has a name of its own
_FORMULAS = flop_registry | {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention]
}


@dataclass(frozen=True)
class Counts:
    """The size of a network.

    Attributes:
        stored_parameters: Parameters in memory and in a file: each kernel once.
        used_parameters: The same with each kernel counted for every layer that reads it.
        stored_bytes: Bytes of parameters and buffers (the norms' running statistics and counters) in float32.
        bfloat16_bytes: The same if every float among them took two bytes.
        int8_bytes: The same if every float took one; scales, which integers need as well, are not counted.
        macs: Multiply-adds of convolutions, linear layers and attention for one image of the network's input size; recurrent
            layers are not counted.
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


# there, operators would come whole that are made of those with formulas
@torch.inference_mode(False)
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
    products = _MultiplyAdds()  # type: ignore[no-untyped-call]
    with LiveTensors() as live, products, torch.no_grad(), _attention_in_parts():
        live.label("weights", (*twin.parameters(), *twin.buffers()))
        live.label("activations", [images])
        twin(images)
    return Counts(
        stored_parameters=stored,
        used_parameters=stored + again,
        stored_bytes=_stored_bytes(twin, torch.float32),
        bfloat16_bytes=_stored_bytes(twin, torch.bfloat16),
        int8_bytes=_stored_bytes(twin, torch.int8),
        macs=products.total,
        activation_peak_bytes=live.peak()["activations"],
    )


@contextlib.contextmanager
def _attention_in_parts() -> Iterator[None]:
    """Within this context PyTorch's attention is made of operators with formulas, in evaluation too."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _MultiplyAdds(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that adds up the multiply-adds of operators, by PyTorch's own formulas.

    PyTorch's `FlopCounterMode` takes every operator apart that it has no formula for, in Python, which takes most of the time;
    and it has none for attention on a CPU.
    """

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        if formula := _FORMULAS.get(func._overloadpacket):
            # a multiply-add is two operations there
            self.total += formula(*args, **(kwargs or {}), out_val=results) // 2
        return results


def _stored_bytes(network: Classifier, dtype: torch.dtype) -> int:
    """Bytes of what the state dict holds, its floats stored as another type; counters keep theirs."""
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize)
        for tensor in stored_once(network.state_dict()).values()
    )

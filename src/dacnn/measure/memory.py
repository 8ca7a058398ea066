"""What a training takes in memory: predicted without running it, and measured.

Both follow the library's own training loop through two steps (an optimiser's state comes with the first). For the
prediction its tensors have no values, so it takes a second or two and no memory; to what the tensors take is added
what the CPU's operators take beside them (`workspace.py`). The measurement is the allocator's own.
"""

import contextlib
import copy
import dataclasses
import functools
import gc
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from dacnn.config import TrainingConfig
from dacnn.data.imageset import MemoryImages
from dacnn.data.sources import Splits
from dacnn.measure.live import LiveTensors, Workspace
from dacnn.measure.workspace import cpu_workspace_bytes
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier, as_network
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan
from dacnn.sharing.parts import first_part_alone
from dacnn.training.loop import Loop
from dacnn.training.precision import Execution, best_device, choose

_STEPS = 2
# PyTorch's allocator for GPUs hands out multiples of this
_GPU_GRANULE_BYTES = 512


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes at the worst moment of a training step. The data set is not counted, a batch of it is.

    Attributes:
        weight_bytes: Parameters and buffers.
        gradient_bytes: Gradients of parameters that are there at that moment (the others are not yet, or no more).
        optimizer_bytes: The optimiser's state.
        activation_bytes: All other tensors: the batch, what the layers gave, gradients on their way.
        workspace_bytes: What the operator that runs at that moment takes for itself.
    """

    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    workspace_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of them together."""
        return sum(asdict(self).values())

    def to_table(self) -> dict[str, int]:
        """The fields as plain values, and their sum."""
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def predict_training_memory(
    network: Network | Plan | Adapted, training: TrainingConfig | None = None, execution: Execution | None = None
) -> TrainingMemory:
    """Predict what training a network takes, without training it.

    Args:
        network: A network, or the plan of one, which is not built for this.
        training: Batch size, optimiser and all else that a step depends on; None: the defaults.
        execution: Device, precision, memory format; None: what the training would choose here. A compiled step is
            predicted as if it were not.

    Returns:
        The bytes at the worst moment. For networks of the zoo within 10 % of what a CPU's allocator hands out (more for
        contiguous images of less than 16 channels, which oneDNN fills up or not, and for depthwise convolutions); on a
        GPU what cuDNN takes for itself is missing.

    Raises:
        ConfigError: The recipe crops more than an image has.

    Example:
        >>> import dacnn
        >>> network = dacnn.create("dacnn14", width=8)
        >>> memory = dacnn.predict_training_memory(network, dacnn.TrainingConfig(batch_size=16))
        >>> memory.activation_bytes > 10 * memory.weight_bytes
        True
    """
    network = _counted(network)
    training, execution = _settled(network, training, execution)
    workspace: Workspace | None = None
    if execution.device == "cpu":
        layout = execution.memory_format == "channels_last"
        workspace = functools.partial(cpu_workspace_bytes, threads=execution.threads, channels_last=layout)
    live = LiveTensors(workspace, granule_bytes=1 if execution.device == "cpu" else _GPU_GRANULE_BYTES)
    device = torch.device(execution.device)
    hollow = _without_values(network)
    # a foreign module may hold tensors that are neither parameters nor buffers
    with FakeTensorMode(allow_non_fake_inputs=True), live, first_part_alone():
        _fill_in(hollow, device)
        # it is where it shall be, and a fake parameter cannot be moved in its place
        hollow.to = lambda *_: hollow  # type: ignore[method-assign]
        live.label("weights", (*hollow.parameters(), *hollow.buffers()))
        for parameter in (one for one in hollow.parameters() if one.requires_grad):
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda owner: live.label("gradients", _present(owner.grad))
            )
        loop = _loop(hollow, training, execution)
        for _ in _steps(loop):
            states = (value for state in loop.optimizer.state.values() for value in state.values())
            live.label("optimizer", _present(*states))
        # behind the last step the gradients are gone, and everything that is left has its label
        peak = live.peak()
    kinds = ("weights", "gradients", "optimizer", "activations", "workspace")
    return TrainingMemory(*(peak.get(kind, 0) for kind in kinds))


def _fill_in(hollow: nn.Module, device: torch.device) -> None:
    """Put tensors on a device in the places of those on the meta device, without a look at the latter, which are no fakes."""
    parameters: dict[int, nn.Parameter] = {}
    for part in hollow.modules():
        for name, tensor in part._parameters.items():
            if tensor is not None:
                fresh = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device=device), tensor.requires_grad)
                # one for all places of a tied one
                part._parameters[name] = parameters.setdefault(id(tensor), fresh)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def measure_training_memory(
    network: Network | Plan | Adapted, training: TrainingConfig | None = None, execution: Execution | None = None
) -> int:
    """Measure what training a network takes: two steps, on random weights and black images.

    Args:
        network: A network, which is left as it is, or the plan of one.
        training: Batch size, optimiser and all else that a step depends on; None: the defaults.
        execution: Device, precision, memory format; None: what the training would choose here. The step is not compiled.

    Returns:
        The most bytes that were handed out at a time by PyTorch's allocator, to tensors and to operators, beyond those
        before the network was there.

    Raises:
        ConfigError: The recipe crops more than an image has.
    """
    network = _counted(network)
    training, execution = _settled(network, training, execution)

    def run() -> None:
        fresh = copy.deepcopy(network) if isinstance(network, Adapted) else Network(_plan_of(network))
        for _ in _steps(_loop(fresh, training, execution)):
            pass

    # what others left behind shall not be given back in the middle
    gc.collect()
    if execution.device == "cpu":
        return _cpu_peak_bytes(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class _Alone:
    """What the loop needs of an `Accelerator` where one process trains; the real one would settle the device for good."""

    num_processes, process_index = 1, 0

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def prepare_model(self, network: nn.Module) -> nn.Module:
        return network

    def no_sync(self, network: nn.Module) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def reduce(self, sums: Tensor, how: str) -> Tensor:
        return sums


def _counted(network: Network | Plan | Adapted) -> Network | Plan | Adapted:
    """Refuse what is neither a network nor a plan."""
    return network if isinstance(network, Plan) else cast(Network | Adapted, as_network(network))


def _plan_of(network: Network | Plan) -> Plan:
    return network if isinstance(network, Plan) else network.plan


def _without_values(network: Network | Plan | Adapted) -> Classifier:
    """The network on the meta device."""
    if isinstance(network, Adapted):
        return copy.deepcopy(network).to("meta")
    with torch.device("meta"):
        hollow = Network(_plan_of(network))
    if isinstance(network, Network):
        for own, empty in zip(network.parameters(), hollow.parameters(), strict=True):
            empty.requires_grad_(own.requires_grad)
    return hollow


def _settled(
    network: Network | Plan | Adapted, training: TrainingConfig | None, execution: Execution | None
) -> tuple[TrainingConfig, Execution]:
    """The defaults filled in."""
    training = training or TrainingConfig()
    if execution is None:
        execution = choose(training, "cpu" if training.device == "cpu" else best_device(), foreign=isinstance(network, Adapted))
    return dataclasses.replace(training, epochs=1), dataclasses.replace(execution, compiled=False)


def _loop(network: Classifier, training: TrainingConfig, execution: Execution) -> Loop:
    """A training of a few steps on black images."""
    input, classes, count = network.input, network.classes, _STEPS * training.batch_size * training.accumulate
    # one image that stands for all of them: the data set takes no memory
    images = torch.zeros((1, input.height, input.width, input.channels), dtype=torch.uint8)
    labels = torch.zeros(1, dtype=torch.int64)
    train = MemoryImages(images.expand(count, -1, -1, -1), labels.expand(count), classes)
    empty = MemoryImages(images[:0], labels[:0], classes)
    splits = Splits(train, empty, empty, input, classes, "black images")
    return Loop(network, splits, training, cast(Accelerator, _Alone(execution.device)), execution)


def _steps(loop: Loop) -> Iterator[int]:
    threads = torch.get_num_threads()
    torch.set_num_threads(loop.execution.threads)
    try:
        yield from loop.train_epoch()
    finally:
        torch.set_num_threads(threads)


def _present(*values: Any) -> list[Tensor]:
    """The tensors among some values."""
    return [value for value in values if isinstance(value, Tensor)]


def _cpu_peak_bytes(run: Callable[[], None]) -> int:
    """The most bytes that PyTorch's CPU allocator has out at a time while something runs, beyond those before.

    The allocator keeps no such number; the profiler notes every block that is taken or given back.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    notes: list[dict[str, int]] = [event["args"] for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    # those of the same time stand in the order of their numbers
    notes.sort(key=lambda note: note["Ev Idx"])
    return max(itertools.accumulate(note["Bytes"] for note in notes))

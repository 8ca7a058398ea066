"""The state of a training in one file, from which it goes on as if nothing had happened.

One `.safetensors` file, replaced as a whole: weights, optimiser, position, sums of the epoch so far, PyTorch's
generators. No pickle.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dacnn.checkpoint import load_tensors, ranges_of, save_tensors, stored_once
from dacnn.errors import CheckpointError
from dacnn.training.loop import Loop

_FORMAT = 1


def save_state(loop: Loop, path: Path) -> None:
    """Write the state of a training, between two steps.

    Args:
        loop: The training.
        path: The file; replaced atomically.

    Raises:
        CheckpointError: The file cannot be written.
    """
    tensors = {f"network.{name}": tensor for name, tensor in stored_once(loop.network.state_dict()).items()}
    for index, values in loop.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors["totals"] = loop.totals
    tensors["generator.cpu"] = torch.get_rng_state()
    if loop.device.type == "cuda":
        tensors["generator.cuda"] = torch.cuda.get_rng_state(loop.device)
    position = {"epoch": loop.epoch, "step": loop.step, "best_top1": loop.best_top1}
    metadata = {
        "format": _FORMAT,
        "position": position,
        "execution": loop.execution.to_table(),
        "torch": torch.__version__,
        "data": loop.splits.identity(),
    }
    if loop.quantized is not None:
        metadata["ranges"] = loop.quantized.network.ranges
    save_tensors(path, tensors, metadata)


def read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state.

    Args:
        path: What `save_state` wrote.

    Returns:
        The tensors, and the metadata: `position`, `execution`, `torch`, and `data` unless an earlier version wrote them.

    Raises:
        CheckpointError: The file holds something else.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("format") != _FORMAT or not {"position", "execution", "torch"} <= metadata.keys():
        raise CheckpointError(f"{path}: is no state that this version can resume: start the run again")
    return tensors, metadata


def restore_state(loop: Loop, tensors: dict[str, Tensor], metadata: dict[str, Any], path: Path) -> None:
    """Bring a fresh training to where a saved one stood.

    Args:
        loop: The training, made from the same config.
        tensors: From `read_state`.
        metadata: From `read_state`.
        path: Where both came from, for error messages.

    Raises:
        CheckpointError: The state is of another network, of other images, or of a training that ran in another way, whose
            bits would differ.
    """
    now, then = loop.execution.to_table(), metadata["execution"]
    # whatever is made again, its bits are those of what was kept
    del now["recompute"]
    different = [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]
    if metadata["torch"] != torch.__version__:
        different.append(f"PyTorch was {metadata['torch']}, is {torch.__version__}")
    if different:
        raise CheckpointError(
            f"{path}: cannot go on with the same bits: {'; '.join(different)}: "
            "resume on a machine like the first one, or start a new run"
        )
    images, before = loop.splits.identity(), metadata.get("data", {})
    changed = [name for name, value in before.items() if images.get(name) != value]
    if changed:
        raise CheckpointError(
            f"{path}: '{loop.splits.name}' is not what it was when this run began: other {', '.join(changed)}: "
            "bring the images back as they were, or start a new run"
        )
    network = {name.removeprefix("network."): tensor for name, tensor in tensors.items() if name.startswith("network.")}
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".", 2)
            moments.setdefault(int(index), {})[key] = tensor
    optimizer = loop.optimizer.state_dict()
    optimizer["state"] = moments
    try:
        if network.keys() != stored_once(loop.network.state_dict()).keys():
            raise KeyError("it has other tensors")
        loop.network.load_state_dict(network, strict=False)
        loop.optimizer.load_state_dict(optimizer)
        loop.totals.copy_(tensors["totals"])
        torch.set_rng_state(tensors["generator.cpu"])
        if loop.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["generator.cuda"], loop.device)
    except (RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: does not fit this run's network: {error}") from None
    if loop.quantized is not None:
        loop.quantized.network.ranges = ranges_of(metadata, path)
    position = metadata["position"]
    loop.epoch, loop.step, loop.best_top1 = int(position["epoch"]), int(position["step"]), float(position["best_top1"])

"""PyTorch as it is, and compiled: the artefact is the file of weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from dacnn.bench.contenders import Artefact, Loaded
from dacnn.checkpoint import load, save
from dacnn.networks.classifier import Classifier

_WEIGHTS = "network.safetensors"


def write(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Write the weights, each kernel once."""
    save(network, folder / _WEIGHTS)


def load_network(artefact: Artefact) -> Classifier:
    """The network that `write` wrote, without gradients; PyTorch has the artefact's threads from then on."""
    torch.set_num_threads(artefact.threads)
    return load(artefact.folder / _WEIGHTS, artefact.into).requires_grad_(False)


def _prepared(network: Classifier) -> Callable[[NDArray[Any]], Tensor]:
    return lambda images_nchw: torch.from_numpy(images_nchw).contiguous(memory_format=network.memory_format)


def load_eager(artefact: Artefact) -> Loaded:
    """The network, an operator after the other."""
    network = load_network(artefact)
    return Loaded(torch.inference_mode()(network.logits), _prepared(network))


def load_compiled(artefact: Artefact) -> Loaded:
    """The network as `torch.compile` makes it."""
    network = load_network(artefact)
    # a graph for each batch size, as one would compile it for a server: sizes that may vary cost speed
    return Loaded(torch.no_grad()(torch.compile(network.logits, dynamic=False)), _prepared(network))

"""What each way of sharing would save, and the least of it that fits a budget."""

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dacnn.errors import ConfigError, PlanError
from dacnn.networks.classifier import Classifier
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

# fields of a NetworkConfig
Settings = Mapping[str, Any]
# the network, or its plan, with such settings
Make = Callable[[Settings], Classifier | Plan]

# every way to share, each once; `repeat` is for networks of the zoo
SCHEMES: tuple[Settings, ...] = (
    {"share": "none"},
    {"share": "isomorphic"},
    {"share": "stage"},
    {"share": "template", "templates": 4},
    {"share": "template", "templates": 2},
    {"share": "all"},
    {"share": "repeat"},
)


@dataclass(frozen=True)
class Proposal:
    """A way of sharing, and what a network stores with it.

    Attributes:
        settings: Fields of `NetworkConfig`: `share`, `groups`, `templates`.
        kernels: Kernels, or banks, that several layers read.
        readers: Layers that read them.
        stored_parameters: Parameters in memory and in a file.
        stored_bytes: Bytes of parameters and buffers, floats in the format that was asked for.
    """

    settings: Settings
    kernels: int
    readers: int
    stored_parameters: int
    stored_bytes: int

    @property
    def flags(self) -> str:
        """The settings as words of a command line."""
        words = []
        for name, value in self.settings.items():
            values = " ".join(f"'{item}'" for item in value) if isinstance(value, tuple) else str(value)
            words.append(f"--{name} {values}")
        return " ".join(words)


def proposals(make: Make, schemes: Iterable[Settings], bytes_per_value: int = 4) -> list[Proposal]:
    """Try ways of sharing.

    Args:
        make: Makes the network.
        schemes: Settings to try.
        bytes_per_value: 4, 2 or 1.

    Returns:
        A proposal for each that is possible, the largest first.
    """
    found = []
    for settings in schemes:
        # a bank may have more templates than any group has layers
        with contextlib.suppress(PlanError):
            found.append(_measured(make, settings, bytes_per_value))
    return sorted(found, key=lambda proposal: -proposal.stored_bytes)


def fitting(make: Make, found: Sequence[Proposal], budget_bytes: int, bytes_per_value: int = 4) -> Proposal:
    """The least sharing that fits a budget: of whole schemes, and of single groups, those that save most first.

    Args:
        make: Makes the network.
        found: What `proposals` gave.
        budget_bytes: What may be stored.
        bytes_per_value: 4, 2 or 1.

    Returns:
        The largest proposal that fits.

    Raises:
        ConfigError: Not even the smallest fits.
    """
    fit = [proposal for proposal in found if proposal.stored_bytes <= budget_bytes]
    if not fit:
        least = found[-1]
        raise ConfigError(
            f"a budget of {budget_bytes:,} bytes: {least.flags} is the smallest and stores {least.stored_bytes:,}: "
            "use a narrower network, fewer bytes per value, or a larger budget"
        )
    if fit[0] is not found[0]:
        for share in ("stage", "all"):
            fit += [one for one in _partial(make, share, bytes_per_value) if one.stored_bytes <= budget_bytes]
    return max(fit, key=lambda proposal: proposal.stored_bytes)


def _partial(make: Make, share: str, bytes_per_value: int) -> Iterator[Proposal]:
    """The groups of a scheme one by one, added up, until all of them share."""
    groups = _groups(make({"share": share}))
    for count in range(1, len(groups)):
        yield _measured(make, {"groups": tuple("+".join(group) for group in groups[:count])}, bytes_per_value)


def _groups(network: Classifier | Plan) -> list[tuple[str, ...]]:
    """Groups of layers, those that save most first."""
    sizes: list[tuple[int, tuple[str, ...]]] = []
    if isinstance(network, Plan):
        shapes = network.kernels()
        named = {name: [layer.name for layer in layers] for name, layers in network.readers().items()}
    elif network.owner is not None:
        shapes = {name: tuple(network.owner[name].shape) for name in network.owner}
        named = network.owner.readers()
    else:
        return []
    for name, readers in named.items():
        if len(readers) > 1:
            sizes.append((math.prod(shapes[name]) * (len(readers) - 1), tuple(readers)))
    return [readers for _, readers in sorted(sizes, reverse=True)]


def _measured(make: Make, settings: Settings, bytes_per_value: int) -> Proposal:
    network = make(settings)
    if isinstance(network, Plan):
        shared = [layers for layers in network.readers().values() if len(layers) > 1]
        kernels, readers = len(shared), sum(map(len, shared))
        with torch.device("meta"):
            network = Network(network)
    else:
        of_anchors = list(network.owner.readers().values()) if network.owner else []
        kernels, readers = len(of_anchors), sum(map(len, of_anchors))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    stored = sum(
        tensor.numel() * (bytes_per_value if tensor.is_floating_point() else tensor.element_size())
        for tensor in network.state_dict().values()
    )
    return Proposal(settings, kernels, readers, parameters, stored)


def parse_bytes(text: str) -> int:
    """Read a size such as `100kB`, `64 KiB`, `1.5MB` or `20000`.

    Args:
        text: A number and a unit; kB is 1,000 bytes, KiB 1,024.

    Returns:
        Bytes.

    Raises:
        ConfigError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b?)\s*", text, flags=re.IGNORECASE)
    unit = match[2].lower() if match else ""
    unit = unit + "b" * (unit in ("k", "m", "g", "ki", "mi", "gi"))
    if match is None or unit not in _UNITS or float(match[1]) == 0:
        raise ConfigError(f"a budget of {text!r}: expected a size such as 100kB, 64KiB or 1.5MB")
    return int(float(match[1]) * _UNITS[unit])

"""What each way of sharing would save, and the least of it that fits a budget."""

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from dacnn.checkpoint import stored_once
from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError, PlanError
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapted_as, is_factory, make_module
from dacnn.networks.network import Network
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import plan_of

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}

# fields of a NetworkConfig
Settings = Mapping[str, Any]
# the network, or its plan, with such settings
Make = Callable[[Settings], Classifier | Plan]

# those of them that a proposal is about
SHARING = ("share", "groups", "templates", "base_width")
UNSHARED: Settings = {"share": "none"}
# every other way to share, each once; `repeat` is for networks of the zoo
_SCHEMES: tuple[Settings, ...] = (
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
        settings: Fields of `NetworkConfig`: `share`, `groups`, `templates`, `base_width`.
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
            words.append(f"--{name.replace('_', '-')} {values}")
        return " ".join(words)

    def to_table(self) -> dict[str, Any]:
        """The fields and the flags as plain values."""
        return {**dataclasses.asdict(self), "flags": self.flags}


def maker(config: NetworkConfig, input: Input, classes: tuple[str, ...]) -> Make:
    """What makes a network, each time with other settings of sharing.

    Args:
        config: The network, and what else is changed in it; a factory is called once.
        input: What the network takes.
        classes: Names of the classes it tells apart.

    Returns:
        From settings to the network, or its plan; a regulator stands behind shared kernels, where there are any.

    Raises:
        ConfigError: The factory cannot be called.
        ShapeError: The module does not run on such images, or does not give a logit for every class.
    """
    # where kernels begin changes no size
    config = dataclasses.replace(config, start=None)
    module = None
    if is_factory(config.name):
        module = make_module(config.name, num_classes=len(classes), in_channels=input.channels)
        # it is copied for every way: lazy layers have their shapes first
        Adapted(module, input, classes).try_out()

    def build(config: NetworkConfig) -> Classifier | Plan:
        return plan_of(config, input, classes) if module is None else adapted_as(config, input, classes, module)

    def make(settings: Settings) -> Classifier | Plan:
        asked = dataclasses.replace(config, **settings)
        if config.regulator in (None, "none"):
            return build(asked)
        plain = build(dataclasses.replace(asked, regulator="none", regulator_place=None, regulator_rank=None))
        return build(asked) if _shared(plain) else plain

    return make


def propose_sharing(
    config: NetworkConfig, input: Input, classes: tuple[str, ...], *, budget_bytes: int | None = None, bytes_per_value: int = 4
) -> tuple[list[Proposal], Proposal | None]:
    """Find out what each way of sharing would store.

    Args:
        config: The network. Where it says how to share, that is compared with sharing nothing, else every way is.
        input: What the network takes.
        classes: Names of the classes it tells apart.
        budget_bytes: What may be stored; None: anything.
        bytes_per_value: 4, 2 or 1.

    Returns:
        A proposal for every way that is possible, the largest first; and, where a budget is given, the least sharing that fits,
        which may be a part of the groups of one of them.

    Raises:
        ConfigError: A setting does not fit, or not even the smallest proposal fits the budget.
    """
    named = {name: getattr(config, name) for name in SHARING if getattr(config, name) is not None}
    bare: dict[str, Any] = dict.fromkeys(SHARING)
    make = maker(dataclasses.replace(config, **bare), input, classes)
    found = [_measured(make, UNSHARED, bytes_per_value)]
    if named:
        found += [_measured(make, named, bytes_per_value)] if named != UNSHARED else []
    else:
        found += _possible(make, bytes_per_value, foreign=is_factory(config.name))
    chosen = _fitting(make, found, budget_bytes, bytes_per_value) if budget_bytes is not None else None
    return sorted(found, key=lambda proposal: -proposal.stored_bytes), chosen


def _possible(make: Make, bytes_per_value: int, *, foreign: bool) -> Iterator[Proposal]:
    """A proposal for every way to share that this network has."""
    for way in _SCHEMES:
        if foreign and way["share"] == "repeat":
            continue
        # a bank may have more templates than any group has layers
        with contextlib.suppress(PlanError):
            yield _measured(make, way, bytes_per_value)


def _fitting(make: Make, found: Sequence[Proposal], budget_bytes: int, bytes_per_value: int) -> Proposal:
    """The largest proposal that fits; the first shares nothing, and no other is looked for where that one fits."""
    unshared, *shared = found
    if unshared.stored_bytes <= budget_bytes:
        return unshared
    parts = [part for way in shared for part in _parts(make, way.settings, bytes_per_value)]
    fit = [proposal for proposal in (*shared, *parts) if proposal.stored_bytes <= budget_bytes]
    if not fit:
        least = min(found, key=lambda proposal: proposal.stored_bytes)
        raise ConfigError(
            f"a budget of {budget_bytes:,} bytes: {least.flags} is the smallest and stores {least.stored_bytes:,}: "
            "use a narrower network, fewer bytes per value, or a larger budget"
        )
    return max(fit, key=lambda proposal: proposal.stored_bytes)


def _parts(make: Make, settings: Settings, bytes_per_value: int) -> Iterator[Proposal]:
    """The groups of a way of sharing one by one, those that save most first, until all but one share."""
    if settings.get("share") not in ("stage", "all"):
        return
    groups = [readers for _, readers in sorted(_shared(make(settings)), reverse=True)]
    for count in range(1, len(groups)):
        yield _measured(make, {"groups": tuple("+".join(group) for group in groups[:count])}, bytes_per_value)


def _shared(network: Classifier | Plan) -> list[tuple[int, tuple[str, ...]]]:
    """For every kernel that several layers read: the parameters that they save, and the layers."""
    if isinstance(network, Plan):
        shapes = network.kernels()
        readers = {name: [layer.name for layer in layers] for name, layers in network.readers().items()}
    elif network.owner is not None:
        shapes = {name: tuple(network.owner[name].shape) for name in network.owner}
        readers = network.owner.readers()
    else:
        return []
    several = {name: tuple(layers) for name, layers in readers.items() if len(layers) > 1}
    return [(math.prod(shapes[name]) * (len(layers) - 1), layers) for name, layers in several.items()]


def _measured(make: Make, settings: Settings, bytes_per_value: int) -> Proposal:
    network = make(settings)
    groups = [layers for _, layers in _shared(network)]
    if isinstance(network, Plan):
        with torch.device("meta"):
            network = Network(network)
    stored = sum(
        tensor.numel() * (bytes_per_value if tensor.is_floating_point() else tensor.element_size())
        for tensor in stored_once(network.state_dict()).values()
    )
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return Proposal(settings, len(groups), sum(map(len, groups)), parameters, stored)


def parse_bytes(text: str) -> int:
    """Read a size such as `100kB`, `64 KiB`, `1.5MB` or `20000`.

    Args:
        text: A number and a unit; kB is 1,000 bytes, KiB 1,024.

    Returns:
        Whole bytes.

    Raises:
        ConfigError: It is no size.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*((?:[kmg]i?)?)b?\s*", text, flags=re.IGNORECASE | re.ASCII)
    size = int(Fraction(match[1]) * _UNITS[match[2].lower()]) if match else 0
    if size == 0:
        raise ConfigError(f"a budget of {text!r}: expected a size such as 100kB, 64KiB or 1.5MB")
    return size

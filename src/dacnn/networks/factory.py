"""A user's own network, named on the command line as FILE.py:factory."""

import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError, DacnnError
from dacnn.networks.adapted import Adapted
from dacnn.networks.plan import Input
from dacnn.sharing.convert import anchor
from dacnn.sharing.readers import owner_of
from dacnn.sharing.rules import Rule

# what of a network of the zoo a foreign module has no use for
_ZOO_ONLY = ("width", "depths", "base_width", "regulator_place")
# templates of a bank where none are named
_TEMPLATES = 4


def is_factory(name: str) -> bool:
    """Whether a network's name is a file and a function in it."""
    return ".py:" in name


def make_module(name: str, *, num_classes: int, in_channels: int) -> nn.Module:
    """Call a factory.

    Args:
        name: `FILE.py:factory`; the file is run, and the function is called.
        num_classes: Given to the factory where it takes an argument of that name.
        in_channels: Likewise.

    Returns:
        The module.

    Raises:
        ConfigError: There is no such file or function, it fails, or gives no module.
    """
    factory = _factory(name)
    try:
        takes = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        takes = {}  # type: ignore[assignment]
    arguments = {key: value for key, value in (("num_classes", num_classes), ("in_channels", in_channels)) if key in takes}
    try:
        module = factory(**arguments)
    except DacnnError:
        raise
    except Exception as error:
        raise ConfigError(f"{name}: the factory failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name}: the factory gave a {type(module).__name__}: expected an nn.Module")
    return module


def _factory(name: str) -> Callable[..., Any]:
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    if path.suffix != ".py" or not path.is_file() or not attribute:
        raise ConfigError(f"{name}: no such file: expected FILE.py:factory, a Python file and a function in it")
    spec = importlib.util.spec_from_file_location(f"dacnn_factory_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    # its classes look for the module that they are defined in, and it may import what stands beside it
    sys.modules[spec.name] = code
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(code)
    except Exception as error:
        raise ConfigError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    factory = getattr(code, attribute, None)
    if not callable(factory):
        there = [key for key, value in vars(code).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"{path}: has no function '{attribute}': expected one of {', '.join(there) or 'its functions'}")
    return factory  # type: ignore[no-any-return]


def rule_of(config: NetworkConfig) -> tuple[Rule, int | None]:
    """What a config says about sharing in a foreign module.

    Args:
        config: `share`, `groups` and `templates`; None shares nothing.

    Returns:
        The rule, and the templates of a bank.

    Raises:
        ConfigError: A setting is only for networks of the zoo, or two of them exclude each other.
    """
    for name in _ZOO_ONLY:
        if getattr(config, name) is not None:
            raise ConfigError(f"network.{name} is {getattr(config, name)}: it changes networks of the zoo, not '{config.name}'")
    if config.share == "repeat":
        raise ConfigError("network.share is 'repeat': only networks of the zoo can tile a kernel: use template, stage or all")
    if config.templates is not None and config.share != "template":
        raise ConfigError(
            f"network.templates is {config.templates}, but network.share is '{config.share}': expected 'template'"
        )
    if config.groups:
        if config.share not in (None, "none"):
            raise ConfigError(f"network.groups is given, and network.share is '{config.share}': leave one of them out")
        return [group.split("+") for group in config.groups], None
    if config.share == "template":
        return "all", config.templates or _TEMPLATES
    return config.share or "none", None


def adapt(config: NetworkConfig, input: Input, classes: tuple[str, ...], module: nn.Module | None = None) -> Adapted:
    """Make a foreign module a network, its kernels shared as a config says.

    Args:
        config: The factory's name, and how to share.
        input: What the network takes.
        classes: Names of the classes it tells apart.
        module: The module, where it is there already; None calls the factory. Left as it is.

    Returns:
        The network.

    Raises:
        ConfigError: The factory cannot be called, or a setting does not fit.
        PlanError: The layers cannot share as they are told to.
        ShapeError: The module does not give a logit for every class.
    """
    rule, templates = rule_of(config)
    if module is None:
        module = make_module(config.name, num_classes=len(classes), in_channels=input.channels)
    if owner_of(module) is None:
        device = next(iter([*module.parameters(), *module.buffers()]), torch.empty(0)).device
        module, _ = anchor(
            module,
            rule,
            regulator=None if config.regulator == "none" else config.regulator,
            regulator_rank=config.regulator_rank,
            templates=templates,
            start=config.start or "first",
            example=torch.zeros(2, input.channels, input.height, input.width, device=device),
        )
    elif rule != "none":
        raise ConfigError(f"network.share is '{config.share}', but the module shares by anchors already: leave it out")
    network = Adapted(module, input, classes)
    training = network.training
    with torch.no_grad():
        network.eval()(
            torch.zeros(
                2, input.height, input.width, input.channels, dtype=torch.uint8, device=next(network.parameters()).device
            )
        )
    return network.train(training)

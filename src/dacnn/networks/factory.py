"""A user's own network, named on the command line as FILE.py:factory."""

import contextlib
import copy
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError, DacnnError, told
from dacnn.networks.adapted import Adapted, count_logits
from dacnn.networks.plan import Input
from dacnn.sharing.convert import anchor
from dacnn.sharing.rules import Rule

# what of a network of the zoo a foreign module has no use for
_ZOO_ONLY = ("width", "depths", "base_width", "regulator_place")
# what says how kernels are shared
_SHARING = ("share", "groups", "templates", "start", "regulator", "regulator_rank")
# templates of a bank where none are named
_TEMPLATES = 4
# classes of a factory that has to be told, where nobody says how many
_CLASSES = 10
# folders of the files that were run
_homes: set[str] = set()


def is_factory(name: str) -> bool:
    """Whether a network's name is a file and a function in it."""
    return re.search(r"\.py(:|$)", name) is not None


def make_module(name: str, *, num_classes: int | None, in_channels: int) -> nn.Module:
    """Call a factory.

    Args:
        name: `FILE.py:factory`; the file is run, and the function is called.
        num_classes: Given to the factory where it takes an argument of that name; None: its own default stays, and where it has
            none, or None, it is told 10.
        in_channels: Likewise.

    Returns:
        The module.

    Raises:
        ConfigError: There is no such file or function, it fails, or gives no module.
    """
    file, _, attribute = name.rpartition(":")
    path = Path(file or name)
    if not path.is_file():
        raise ConfigError(f"{name}: no such file: expected FILE.py:factory, a Python file and a function in it")
    with _at_home(path):
        factory = _function(_run(path), attribute if file else "", path)
        try:
            module = factory(**_taken(factory, num_classes=num_classes, in_channels=in_channels))
        except DacnnError:
            raise
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{name}: the factory failed: {told(error)}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{name}: the factory gave a {type(module).__name__}: expected an nn.Module")
    return module


@contextlib.contextmanager
def _at_home(path: Path) -> Iterator[None]:
    """While a file's code runs it may import what stands beside it, and what it prints does not mix with results."""
    folder = str(path.resolve().parent)
    for sibling in Path(folder).glob("*.py"):
        # what another file imported from beside it under the same name would be taken for this one's
        file = getattr(sys.modules.get(sibling.stem), "__file__", None)
        if file and str(Path(file).parent) in _homes - {folder}:
            del sys.modules[sibling.stem]
    _homes.add(folder)
    sys.path.insert(0, folder)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _run(path: Path) -> ModuleType:
    """Run a file."""
    spec = importlib.util.spec_from_file_location(f"dacnn_factory_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: is no Python file: expected FILE.py:factory")
    code = importlib.util.module_from_spec(spec)
    # its classes look for the module that they are defined in
    sys.modules[spec.name] = code
    try:
        spec.loader.exec_module(code)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{path}: cannot be run: {told(error)}") from error
    return code


def _function(code: ModuleType, name: str, path: Path) -> Callable[..., Any]:
    """A function of a file, or a class."""
    factory = getattr(code, name, None)
    if isinstance(factory, nn.Module):
        raise ConfigError(f"{path}: '{name}' is a module: expected a function that makes one")
    if not callable(factory):
        own = {key: value for key, value in vars(code).items() if getattr(value, "__module__", None) == code.__name__}
        there = ", ".join(key for key, value in own.items() if callable(value) and not key.startswith("_"))
        what = f"has no function '{name}'" if name else "names no function in the file"
        raise ConfigError(f"{path}: {what}: expected {path}:FUNCTION, of {there or 'which it has none'}")
    return factory  # type: ignore[no-any-return]


def _taken(factory: Callable[..., Any], **offered: int | None) -> dict[str, int]:
    """The arguments that a factory takes, of those that there are."""
    try:
        takes = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    wanted = {name: value for name, value in offered.items() if name in takes}
    for name, value in wanted.items():
        if value is None and takes[name].default in (inspect.Parameter.empty, None):
            wanted[name] = _CLASSES
    return {name: value for name, value in wanted.items() if value is not None}


def classes_of(name: str, input: Input) -> tuple[str, ...]:
    """Numbers for the classes that a factory's module tells apart when it is not told how many there are.

    Args:
        name: `FILE.py:factory`.
        input: What the module is run on, black.

    Returns:
        A name for each of its logits.

    Raises:
        ConfigError: The factory cannot be called.
        ShapeError: The module does not run on such images, or gives no logits.
    """
    module = make_module(name, num_classes=None, in_channels=input.channels)
    return tuple(map(str, range(count_logits(module, input))))


def rule_of(config: NetworkConfig) -> tuple[Rule, int | None]:
    """What a config says about sharing in a foreign module.

    Args:
        config: `share`, `groups` and `templates`; None shares nothing.

    Returns:
        The rule, and the templates of a bank.

    Raises:
        ConfigError: A setting is only for networks of the zoo, or two of them exclude each other.
    """
    share = config.share or "none"
    for name in _ZOO_ONLY:
        if getattr(config, name) is not None:
            raise ConfigError(f"network.{name} is {getattr(config, name)}: it changes networks of the zoo, not '{config.name}'")
    if share == "repeat":
        raise ConfigError("network.share is 'repeat': only networks of the zoo can tile a kernel: use template, stage or all")
    if config.templates is not None and share != "template":
        raise ConfigError(f"network.templates is {config.templates}, but network.share is '{share}': expected 'template'")
    if config.groups and share != "none":
        raise ConfigError(f"network.groups is given, and network.share is '{share}': leave one of them out")
    if config.regulator in (None, "none") and config.regulator_rank is not None:
        raise ConfigError(f"network.regulator_rank is {config.regulator_rank}: it needs a network.regulator: name one")
    for name in ("regulator", "start"):
        value = getattr(config, name)
        if value not in (None, "none") and not config.groups and share == "none":
            raise ConfigError(f"network.{name} is '{value}', but nothing is shared: choose network.share or network.groups")
    if config.start is not None and share == "template":
        raise ConfigError(f"network.start is '{config.start}', but templates begin at the best fit: leave it out")
    if config.groups:
        return [group.split("+") for group in config.groups], None
    return ("all", config.templates or _TEMPLATES) if share == "template" else (share, None)


def adapted_as(config: NetworkConfig, input: Input, classes: tuple[str, ...], module: nn.Module | None = None) -> Adapted:
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
        ShapeError: The module does not run on such images, or does not give a logit for every class.
    """
    ours = make_module(config.name, num_classes=len(classes), in_channels=input.channels) if module is None else _copy(module)
    network = Adapted(ours, input, classes)
    if network.owner is not None:
        for name in _SHARING:
            if getattr(config, name) not in (None, "none"):
                raise ConfigError(f"network.{name} is given, but the module shares by anchors already: leave it out")
        return network.try_out()
    rule, templates = rule_of(config)
    network.try_out()
    regulator = None if config.regulator == "none" else config.regulator
    network.module, conversion = anchor(
        ours,
        rule,
        regulator=regulator,
        regulator_rank=config.regulator_rank,
        templates=templates,
        start=config.start or "first",
        example=torch.zeros(2, input.channels, input.height, input.width, device=network.normalize.scale.device),
    )
    if regulator and not conversion.groups:
        raise ConfigError(f"network.regulator is '{regulator}': no layers share a kernel for it to stand behind")
    network.refused = conversion.refused
    return network


def _copy(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ConfigError(f"{type(module).__name__} cannot be copied: {told(error)}") from error

"""What the commands take: the fields of the configs as flags, and the words for everything else."""

import dataclasses
import types
import typing
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from dacnn.config import DataConfig, NetworkConfig, TrainingConfig
from dacnn.errors import ConfigError

FLAG_RULES = ConstructorRegistry()


@FLAG_RULES.primitive_rule
def _left_out_or(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read a flag of type X | None as X: None is a flag that was left out, and no word for its value."""
    choices = typing.get_args(kind.type)
    if kind.type_origin not in (typing.Union, types.UnionType) or types.NoneType not in choices:
        return None
    given = reduce(or_, (choice for choice in choices if choice is not types.NoneType))
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(given, kind.markers))
    if not isinstance(spec, PrimitiveConstructorSpec):
        return None
    return dataclasses.replace(
        spec,
        is_instance=lambda value: value is None or spec.is_instance(value),
        str_from_instance=lambda value: [] if value is None else spec.str_from_instance(value),
    )


def _spelled(kind: Any) -> str:
    """What stands for a value of the annotated type `kind` in --help."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(choices)
    if typing.get_origin(kind) is tuple:
        return f"{_spelled(choices[0])} ..."
    inner = [choice for choice in choices if choice is not type(None)]
    return _spelled(inner[0]) if inner else "TRUE|FALSE" if kind is bool else kind.__name__.upper()


def word(about: str, stands: str | None = None) -> Any:
    """How a flag or a word is described in --help.

    Args:
        about: What it is for.
        stands: What stands for its value.

    Returns:
        Goes into an `Annotated`.
    """
    return arg(help=about, metavar=stands, help_behavior_hint="")


def _optional(kind: Any, *, without: frozenset[str] = frozenset()) -> list[tuple[str, Any, None]]:
    """The fields of a config as optional flags: None leaves the recipe's value."""
    return [
        (item.name, Annotated[cast(Any, item.type) | None, word(item.metadata["help"], _spelled(item.type))], None)
        for item in dataclasses.fields(kind)
        if item.name not in without
    ]


NetworkFlags = dataclasses.make_dataclass("NetworkFlags", _optional(NetworkConfig, without=frozenset({"name"})), frozen=True)
DataFlags = dataclasses.make_dataclass("DataFlags", _optional(DataConfig, without=frozenset({"source"})), frozen=True)
TrainingFlags = dataclasses.make_dataclass("TrainingFlags", _optional(TrainingConfig), frozen=True)
_STEP = {"batch_size", "accumulate", "optimizer", "precision", "memory_format", "convolution"}
_NOT_OF_A_STEP = frozenset(item.name for item in dataclasses.fields(TrainingConfig)) - _STEP
StepFlags = dataclasses.make_dataclass("StepFlags", _optional(TrainingConfig, without=_NOT_OF_A_STEP), frozen=True)
# what a network that is trained leaves open: the images' size, channels and fit are its own
_OF_TRAINING = frozenset({"source", "size", "channels", "fit", "validation"})
TestFlags = dataclasses.make_dataclass("TestFlags", _optional(DataConfig, without=_OF_TRAINING), frozen=True)
for _flags in (NetworkFlags, DataFlags, TrainingFlags, TestFlags):
    # the heading of the group in --help, instead of the generated signature
    _flags.__doc__ = "Over the recipe's values."
StepFlags.__doc__ = "Of the training whose memory is told."

NetworkName = Annotated[str | None, word("network of the zoo (see `dacnn models`), or FILE.py:factory", "[NAME]")]
NetworkOrFile = Annotated[str, word("network of the zoo, run directory, .safetensors file or FILE.py:factory", "NAME")]
Classes = Annotated[
    int | None,
    word(
        "number of classes, for an untrained network (default: of the zoo 100, of a factory its own, or 10)",
        "INT",
    ),
]
InChannels = Annotated[int, arg(help="channels of an image, for an untrained network")]
Size = Annotated[int, arg(help="side of an image in pixels, for an untrained network")]
RunPath = Annotated[Path, word("run directory, or a .safetensors file", "RUN")]
Into = Annotated[str | None, word("FILE.py:factory that makes the layers of a converted network", "FACTORY")]
Source = Annotated[str | None, word("digits, cifar10, cifar100, svhn, a hub data set, or a local folder or archive", "SOURCE")]
Json = Annotated[bool, word("print one JSON object on standard output")]


def settings_of(*flags: object) -> dict[str, Any]:
    """The flags that were given.

    Args:
        *flags: Groups of them.

    Returns:
        Names and values.
    """
    pairs = ((item.name, getattr(group, item.name)) for group in flags for item in dataclasses.fields(group))  # type: ignore[arg-type]
    return {name: value for name, value in pairs if value is not None}


def refuse_settings(trained: str, *flags: object) -> None:
    """Refuse flags that would change a network that is trained already, or its images.

    Args:
        trained: Its name, for the message.
        *flags: Groups of flags.

    Raises:
        ConfigError: One of them was given.
    """
    left_open = {item.name for item in dataclasses.fields(TestFlags)}
    given = ", ".join("--" + name.replace("_", "-") for name in settings_of(*flags) if name not in left_open)
    if given:
        raise ConfigError(f"{trained} is a trained network: it takes no {given}")

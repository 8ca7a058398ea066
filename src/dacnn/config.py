"""What can be chosen: a network, a data set, a training. Read from TOML, written to TOML, checked here and once.

Ranges are checked when a config is made; names (of networks, data sets, regulators) are checked by the
registry that owns them, before any work starts.
"""

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w

from dacnn.errors import ConfigError, UnknownNameError

Share = Literal["all", "stage", "isomorphic", "template", "repeat", "none"]
Start = Literal["mean", "first", "fit"]
RegulatorPlace = Literal["before-norm", "after-norm"]
Fit = Literal["crop", "stretch", "pad"]
Precision = Literal["auto", "float32", "bfloat16"]
MemoryFormat = Literal["auto", "channels_last", "contiguous"]
Convolution = Literal["auto", "plain", "winograd"]
Recompute = Literal["auto", "no", "activations", "segments"]


def setting(default: Any, about: str, *, low: float | None = None, high: float | None = None) -> Any:
    """Declare a field once: its default, its help on the command line and its range.

    Args:
        default: Value where none is given.
        about: One line of help.
        low: Smallest value allowed.
        high: Largest value allowed.

    Returns:
        A dataclass field.
    """
    return field(default=default, metadata={"help": about, "low": low, "high": high})


def _admits(kind: Any, value: object) -> bool:
    """Whether `value` is of the annotated type `kind` (the few kinds that configs use)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(_admits(argument, value) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_admits(arguments[0], item) for item in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _spelled(kind: Any) -> str:
    """The annotated type `kind` in words for an error message."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(f"'{argument}'" for argument in arguments)
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_spelled(argument) for argument in arguments if argument is not type(None))
    if typing.get_origin(kind) is tuple:
        return f"a list of {_spelled(arguments[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, str(kind))


class Checked:
    """Base of the configs: types and ranges of all fields are checked when one is made."""

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ConfigError: A value is of another type or out of range.
        """
        for item in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, item.name)
            where = f"{type(self).__name__.removesuffix('Config').lower()}.{item.name}"
            if not _admits(item.type, value):
                raise ConfigError(f"{where} is {value!r}: expected {_spelled(item.type)}")
            if value == ():
                raise ConfigError(f"{where} is empty: expected {_spelled(item.type)}, or leave it out")
            low, high = item.metadata.get("low"), item.metadata.get("high")
            for number in value if isinstance(value, tuple) else (value,):
                if not isinstance(number, int | float):
                    continue
                if (
                    (isinstance(number, float) and not math.isfinite(number))
                    or (low is not None and number < low)
                    or (high is not None and number > high)
                ):
                    bounds = " and ".join(
                        words
                        for words in (f"at least {low}" * (low is not None), f"at most {high}" * (high is not None))
                        if words
                    )
                    raise ConfigError(f"{where} is {number}: expected a finite number{' of ' * bool(bounds)}{bounds}")

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> Self:
        """Make a config from a TOML table.

        Args:
            table: Field names and values; lists become tuples.
            where: Names the table in error messages.

        Returns:
            The config; fields that the table leaves out keep their defaults.

        Raises:
            ConfigError: A field is unknown, or a value is refused.
        """
        known = {item.name for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in table:
            if name not in known:
                raise ConfigError(f"{where}: unknown setting '{name}': expected one of {', '.join(sorted(known))}")
        try:
            return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None

    def to_table(self) -> dict[str, Any]:
        """The fields that are set, as a TOML table (TOML has no word for None, so those are left out)."""
        pairs = ((item.name, getattr(self, item.name)) for item in dataclasses.fields(self))  # type: ignore[arg-type]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in pairs if value is not None}


@dataclass(frozen=True)
class NetworkConfig(Checked):
    """A network of the zoo, by name, and what is changed in it."""

    name: str = setting("dacnn14", "network of the zoo (see `dacnn models`), or FILE.py:factory")
    width: int | None = setting(None, "channels of the first stage; later stages keep their ratio to it", low=1)
    depths: tuple[int, ...] | None = setting(None, "layers (chain) or blocks (residual) of every stage", low=1)
    share: Share | None = setting(
        None, "all: one kernel per shape; stage: one per stage; template: combined from a bank; repeat: tiled; none"
    )
    groups: tuple[str, ...] | None = setting(
        None,
        "layers that read one kernel, a group a word: names or patterns joined by '+', such as 'stage1.*+stage2.*'",
    )
    templates: int | None = setting(None, "templates of a bank, for --share template (default: 4)", low=1)
    start: Start | None = setting(None, "where shared kernels of a FILE.py:factory begin: first, mean, or fit (default: first)")
    base_width: int | None = setting(None, "channels of the tiled kernel, for --share repeat (default: narrowest stage)", low=1)
    regulator: str | None = setting(None, "pointwise, depthwise, low-rank, shift, or none")
    regulator_place: RegulatorPlace | None = setting(None, "before-norm: behind each shared convolution; after-norm: per block")
    regulator_rank: int | None = setting(None, "rank of the low-rank regulator", low=1)


@dataclass(frozen=True)
class DataConfig(Checked):
    """A data set, and how its images are brought to the network's input."""

    source: str = setting("digits", "digits, cifar10, cifar100, svhn, a hub data set, or a local folder or archive")
    size: int | None = setting(None, "side of the square input in pixels (default: the images' own, at least 32)", low=4)
    fit: Fit = setting("crop", "how images of other sizes are fitted: crop, stretch or pad")
    channels: int | None = setting(None, "1 (grey) or 3 (colour); default: what the data set has", low=1, high=3)
    validation: float = setting(0.1, "share of the training images set aside to choose the best epoch", low=0.0, high=0.9)
    held_out: float = setting(
        0.2, "share of the images held out for testing where the source has no test split", low=0.01, high=0.9
    )
    memory_gigabytes: float = setting(4.0, "decoded images are kept in memory up to this size, else streamed", low=0.0)

    def __post_init__(self) -> None:
        """Check the fields; two channels are no picture."""
        super().__post_init__()
        if self.channels == 2:
            raise ConfigError("data.channels is 2: expected 1 (grey) or 3 (colour)")


@dataclass(frozen=True)
class TrainingConfig(Checked):
    """A training, from the first step to the last."""

    epochs: int = setting(20, "passes over the training images", low=1)
    batch_size: int = setting(128, "images of one forward pass in one process", low=1)
    accumulate: int = setting(1, "forward passes whose gradients are averaged into one step", low=1)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "sgd (Nesterov momentum) or adamw")
    lr: float = setting(0.1, "peak learning rate", low=0.0)
    anchor_lr: float = setting(1.0, "factor on the learning rate of kernels with several readers", low=0.001)
    momentum: float = setting(0.9, "momentum of sgd, first beta of adamw", low=0.0, high=0.9999)
    weight_decay: float = setting(5e-4, "weight decay of kernels and matrices (never of norms and biases)", low=0.0)
    schedule: Literal["cosine", "one-cycle"] = setting("cosine", "cosine, or one-cycle: linear up, linear down to zero")
    warmup: float = setting(0.05, "share of the steps over which the learning rate rises", low=0.0, high=0.99)
    weights: str | None = setting(None, "begin with the weights of this run or .safetensors file instead of drawn ones")
    quantize: Literal["no", "int8"] = setting("no", "int8: round kernels and values as an int8 export does; needs weights")
    label_smoothing: float = setting(0.0, "share of the target spread over all classes", low=0.0, high=0.99)
    clip_norm: float | None = setting(None, "largest norm of the whole gradient", low=0.0)
    crop: int = setting(4, "random shift of each image by up to this many pixels, borders reflected", low=0)
    flip: bool = setting(True, "mirror every second image, left to right")
    cutout: int = setting(0, "side of a square blanked out of each image, in pixels", low=0)
    checkpoint_minutes: float = setting(10.0, "the state to resume from is saved this often, and behind every epoch", low=0.0)
    seed: int = setting(0, "seed of weights, order and augmentation", low=0, high=2**31 - 1)
    precision: Precision = setting("auto", "auto, float32 or bfloat16")
    memory_format: MemoryFormat = setting("auto", "auto, channels_last or contiguous")
    convolution: Convolution = setting(
        "auto", "plain, or winograd for 3x3 kernels with many channels; auto: winograd on a CPU with AVX2 alone, in float32"
    )
    device: Literal["auto", "cpu"] = setting("auto", "auto: a GPU where there is one; cpu")
    compile: Literal["auto", "yes", "no"] = setting("auto", "torch.compile the step; auto: on a GPU")
    recompute: Recompute = setting(
        "auto", "made again for the gradient instead of kept: no, activations, segments (and activations); auto: by device"
    )
    threads: int | None = setting(None, "CPU threads of one process (default: PyTorch's own choice)", low=1)

    def __post_init__(self) -> None:
        """Check the fields; what is made again and what is compiled exclude each other."""
        super().__post_init__()
        if self.recompute in ("activations", "segments") and self.compile == "yes":
            raise ConfigError(
                f"training.recompute is '{self.recompute}' and training.compile 'yes', but a compiler decides for itself what "
                "to keep: leave one of them at 'auto'"
            )


_TABLES: dict[str, type[Checked]] = {"network": NetworkConfig, "data": DataConfig, "training": TrainingConfig}


@dataclass(frozen=True)
class Config:
    """All three together: what `config.toml` of a run holds, and what a recipe sets a part of."""

    network: NetworkConfig = NetworkConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()

    @classmethod
    def from_tables(cls, tables: Mapping[str, Any], where: str) -> Self:
        """Make a config from TOML tables `network`, `data` and `training`, each optional.

        Args:
            tables: The parsed document.
            where: Names the document in error messages.

        Returns:
            The config.

        Raises:
            ConfigError: A table or a field is unknown, or a value is refused.
        """
        for name, table in tables.items():
            if name not in _TABLES:
                raise ConfigError(f"{where}: unknown table '{name}': expected one of {', '.join(_TABLES)}")
            if not isinstance(table, Mapping):
                raise ConfigError(f"{where}: '{name}' is {table!r}: expected a table, [{name}]")
        parts: dict[str, Any] = {
            name: kind.from_table(tables.get(name, {}), f"{where} [{name}]") for name, kind in _TABLES.items()
        }
        return cls(**parts)

    def to_tables(self) -> dict[str, dict[str, Any]]:
        """The config as TOML tables."""
        return {name: getattr(self, name).to_table() for name in _TABLES}

    def to_toml(self) -> str:
        """The config as TOML text that `read_config` takes."""
        return tomli_w.dumps(self.to_tables())

    @staticmethod
    def sorted_into_tables(settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Sort settings by the table that they belong to.

        Args:
            settings: Field names, which are unique over the tables, and values.

        Returns:
            Table name to field name to value.

        Raises:
            UnknownNameError: No table has such a field.
        """
        homes = {item.name: table for table, kind in _TABLES.items() for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
        tables: dict[str, dict[str, Any]] = {table: {} for table in _TABLES}
        for name, value in settings.items():
            if name not in homes:
                raise UnknownNameError("setting", name, homes)
            tables[homes[name]][name] = value
        return tables

    def merged(self, overrides: Mapping[str, Mapping[str, Any]]) -> Self:
        """A copy in which some fields have other values.

        Args:
            overrides: Table name to field name to value; None leaves a field as it is.

        Returns:
            The changed copy.
        """
        changed = {
            name: dataclasses.replace(getattr(self, name), **{key: value for key, value in fields.items() if value is not None})
            for name, fields in overrides.items()
        }
        return dataclasses.replace(self, **changed)


def read_config(path: Path) -> Config:
    """Read a config from a TOML file.

    Args:
        path: The file.

    Returns:
        The config.

    Raises:
        ConfigError: The file cannot be read, is no TOML, or holds a value that is refused.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    return Config.from_tables(tables, str(path))

"""The Plan: which layer reads which kernel, every width, every regulator, the input and the classes. Pure data.

A plan is a value: it can be printed, compared, stored in a checkpoint and drawn. A network is built from it, and
whatever runs the network elsewhere is built from it too.
"""

import dataclasses
import json
import math
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from dacnn.config import Fit, RegulatorPlace
from dacnn.errors import PlanError
from dacnn.sharing.anchors import Combine, Expression, Repeat, Shape, Stored, parameter_name

# more channels or pixels of a kernel than this are a mistake
_LARGEST = 2**20


@dataclass(frozen=True)
class Input:
    """What a network takes: uint8 images, N x H x W x C, and how they are brought to its first layer.

    Attributes:
        height: Rows of an image.
        width: Columns of an image.
        channels: 1 (grey) or 3 (red, green, blue), or what the user feeds.
        mean: Mean of each channel, on the scale 0 to 1.
        std: Standard deviation of each channel, on the scale 0 to 1.
        fit: How an image of another size is brought to this one: `crop` scales the shorter side and cuts the
            middle out, `pad` scales the longer side and fills with black, `stretch` scales both.
    """

    height: int = 32
    width: int = 32
    channels: int = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.25, 0.25, 0.25)
    fit: Fit = "crop"

    def __post_init__(self) -> None:
        """Check that the statistics fit the channels."""
        if min(self.height, self.width, self.channels) < 1:
            raise PlanError(f"input is {self.height}x{self.width} with {self.channels} channels: expected 1 or more of each")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise PlanError(
                f"input has {self.channels} channels, {len(self.mean)} means and {len(self.std)} standard deviations: "
                "give one of each per channel"
            )
        # 1 and 1.0 are equal but are other text
        object.__setattr__(self, "mean", tuple(map(float, self.mean)))
        object.__setattr__(self, "std", tuple(map(float, self.std)))
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise PlanError(f"input.mean is {self.mean}, input.std is {self.std}: expected finite numbers, std positive")


@dataclass(frozen=True)
class Regulator:
    """A small module that lets the place where it stands deviate from the shared kernel.

    Attributes:
        kind: Name in the registry of `dacnn.sharing.regulators`.
        place: Between the convolution and its norm, or behind the norm.
        rank: Rank of a low-rank regulator, else None.
    """

    kind: str
    place: RegulatorPlace = "before-norm"
    rank: int | None = None

    def __post_init__(self) -> None:
        """Check place and rank; the kind is checked by the registry that owns it."""
        if self.place not in typing.get_args(RegulatorPlace):
            raise PlanError(f"regulator.place is {self.place!r}: expected {' or '.join(typing.get_args(RegulatorPlace))}")
        if self.rank is not None and self.rank < 1:
            raise PlanError(f"regulator.rank is {self.rank}: expected 1 or more")


@dataclass(frozen=True)
class Layer:
    """A convolution with its norm: the kernel it reads, its channels, its regulator.

    Attributes:
        name: Unique in the plan.
        kernel: The anchor it reads, by name, or an expression over one; layers that name the same anchor share it.
        in_channels: Channels it takes.
        out_channels: Channels it gives.
        kernel_size: Side of the square kernel in pixels; odd, the image keeps its size.
        regulator: What stands behind the convolution, if anything.
    """

    name: str
    kernel: str | Combine | Repeat
    in_channels: int
    out_channels: int
    kernel_size: int = 3
    regulator: Regulator | None = None

    def __post_init__(self) -> None:
        """Check that a file can say how the kernel is read, and a start be drawn for it."""
        if not isinstance(self.kernel, str | Combine | Repeat):
            raise PlanError(
                f"layer '{self.name}' reads a {type(self.kernel).__name__}: expected the name of a kernel, Combine or Repeat; "
                "whatever else makes a kernel of a stored one can be a parametrization of it (torch.nn.utils.parametrize)"
            )

    @property
    def expression(self) -> Expression:
        """How it reads its kernel."""
        return Stored(self.kernel) if isinstance(self.kernel, str) else self.kernel

    @property
    def anchor(self) -> str:
        """Name of the stored tensor that it reads."""
        return self.expression.anchor

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """Shape of the kernel it reads: output channels, input channels, rows, columns."""
        return (self.out_channels, self.in_channels, self.kernel_size, self.kernel_size)


@dataclass(frozen=True)
class Block:
    """Layers in a row; a residual block adds its input, or what `shortcut` makes of it, before the last ReLU."""

    layers: tuple[Layer, ...]
    residual: bool = False
    shortcut: Layer | None = None

    def __post_init__(self) -> None:
        """Check that there is something to run."""
        if not self.layers:
            raise PlanError("a block has no layers: expected 1 or more")


@dataclass(frozen=True)
class Stage:
    """Blocks of one image size; `pool` halves the image behind them."""

    blocks: tuple[Block, ...]
    pool: bool = True


@dataclass(frozen=True)
class Plan:
    """A whole network: stem, stages, global average pooling, one linear layer.

    Attributes:
        name: What to call it.
        input: What it takes.
        classes: Names of the classes it tells apart.
        stem: The first convolution.
        stages: What follows.
    """

    name: str
    input: Input
    classes: tuple[str, ...]
    stem: Layer
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        """Check that the plan can be built.

        Raises:
            PlanError: Channels do not meet, or readers of one kernel disagree on its shape.
        """
        if not self.classes:
            raise PlanError(f"plan '{self.name}' has no classes: expected 1 or more")
        names = Counter(layer.name for layer in self.layers())
        doubled = [name for name, times in names.items() if times > 1]
        if doubled:
            raise PlanError(f"plan '{self.name}' has several layers named '{doubled[0]}': give each its own name")
        stored: dict[str, str] = {}
        for name in names:
            other = stored.setdefault(parameter_name(name), name)
            if other != name:
                raise PlanError(f"layers '{other}' and '{name}' would be stored under one name: rename one of them")
        for layer in self.layers():
            if not layer.anchor or "." in layer.anchor:
                raise PlanError(f"layer '{layer.name}' reads kernel '{layer.anchor}': expected a name without dots")
            sizes = layer.kernel_shape
            if min(sizes) < 1 or max(sizes) > _LARGEST or layer.kernel_size % 2 == 0:
                raise PlanError(
                    f"layer '{layer.name}' has shape {layer.kernel_shape}: expected channels of 1 or more, an odd size"
                )
        self._check_channels()
        self.kernels()
        if min(self.input.height, self.input.width) < self.smallest_side:
            pools = self._pools()
            raise PlanError(
                f"input of {self.input.height}x{self.input.width} is too small for plan '{self.name}', which halves it "
                f"{pools} times: expected at least {self.smallest_side if pools < 64 else f'2**{pools}'} pixels a side"
            )

    def _check_channels(self) -> None:
        """Walk the plan as an image would."""

        def follow(layer: Layer, channels: int) -> int:
            if layer.in_channels != channels:
                raise PlanError(
                    f"layer '{layer.name}' takes {layer.in_channels} channels, but what stands before it gives {channels}"
                )
            return layer.out_channels

        channels = follow(self.stem, self.input.channels)
        for block in (block for stage in self.stages for block in stage.blocks):
            before = channels
            for layer in block.layers:
                channels = follow(layer, channels)
            around = follow(block.shortcut, before) if block.shortcut else before
            if block.residual and around != channels:
                raise PlanError(f"block of '{block.layers[-1].name}' adds {around} channels to {channels}: give it a shortcut")

    def _pools(self) -> int:
        return sum(stage.pool for stage in self.stages)

    @property
    def smallest_side(self) -> int:
        """Smallest side of an input image, in pixels: one that every pooling can halve."""
        return int(2 ** self._pools())

    def layers(self) -> Iterator[Layer]:
        """All convolutions, in the order in which an image meets them."""
        yield self.stem
        for stage in self.stages:
            for block in stage.blocks:
                yield from block.layers
                if block.shortcut:
                    yield block.shortcut

    @property
    def features(self) -> int:
        """Channels that reach the linear layer."""
        blocks = [block for stage in self.stages for block in stage.blocks]
        return blocks[-1].layers[-1].out_channels if blocks else self.stem.out_channels

    def kernels(self) -> dict[str, Shape]:
        """The tensors that are stored for kernels, by name, with their shapes: a kernel has output and input channels, rows
        and columns, a bank its templates before them.

        Raises:
            PlanError: Readers of one of them disagree on its shape, or a kernel is no tiling of its base.
        """  # noqa: D205
        owners: dict[str, Layer] = {}
        for layer in self.layers():
            first = owners.setdefault(layer.anchor, layer)
            needed, found = (one.expression.stored_shape(one.kernel_shape) for one in (layer, first))
            if needed != found:
                raise PlanError(
                    f"layer '{layer.name}' needs a kernel of {needed}, but '{layer.anchor}' is "
                    f"{found} for '{first.name}': make it a transition, or give it its own kernel"
                )
            try:
                layer.expression.own_shapes(layer.kernel_shape)
            except PlanError as error:
                raise PlanError(f"layer '{layer.name}': {error}") from None
        return {name: layer.expression.stored_shape(layer.kernel_shape) for name, layer in owners.items()}

    def readers(self) -> dict[str, list[Layer]]:
        """For every stored tensor, the layers that read it."""
        readers: dict[str, list[Layer]] = {}
        for layer in self.layers():
            readers.setdefault(layer.anchor, []).append(layer)
        return readers

    def with_kernels(self, kernels: Mapping[str, str | Combine | Repeat]) -> Self:
        """The same layers, some of which read other kernels.

        Args:
            kernels: What they shall read, by name of the layer.

        Returns:
            The plan.

        Raises:
            PlanError: There is no such layer, or the kernels do not fit.
        """
        names = {layer.name for layer in self.layers()}
        for name in kernels:
            if name not in names:
                raise PlanError(f"plan '{self.name}' has no layer '{name}': expected one of {', '.join(sorted(names))}")
        return self.mapped(lambda layer: dataclasses.replace(layer, kernel=kernels.get(layer.name, layer.kernel)))

    def mapped(self, change: Callable[[Layer], Layer]) -> Self:
        """The plan with every layer changed.

        Args:
            change: From a layer to the one in its place.

        Returns:
            The plan.

        Raises:
            PlanError: The layers do not fit any more.
        """

        def mapped_block(block: Block) -> Block:
            around = change(block.shortcut) if block.shortcut else None
            return dataclasses.replace(block, layers=tuple(map(change, block.layers)), shortcut=around)

        stages = tuple(dataclasses.replace(stage, blocks=tuple(map(mapped_block, stage.blocks))) for stage in self.stages)
        return dataclasses.replace(self, stem=change(self.stem), stages=stages)

    def unshared(self) -> Self:
        """The twin of the same shape in which every layer owns its kernel; without regulators, which it has no use for."""
        plan = self.mapped(lambda layer: dataclasses.replace(layer, kernel=parameter_name(layer.name), regulator=None))
        return dataclasses.replace(plan, name=f"{self.name} unshared")

    def for_data(self, input: Input, classes: tuple[str, ...]) -> Self:
        """The same layers for another data set.

        Args:
            input: What the images are; as many channels as the stem takes.
            classes: Names of the classes.

        Returns:
            The plan.

        Raises:
            PlanError: The input does not fit the layers.
        """
        return dataclasses.replace(self, input=input, classes=classes)

    def to_json(self) -> str:
        """The plan as one line of JSON, keys sorted, defaults left out: equal plans give equal text."""
        return json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.

        Returns:
            The plan.

        Raises:
            PlanError: The text is no plan.
        """
        try:
            return from_plain(cls, json.loads(text))  # type: ignore[no-any-return]
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise PlanError(f"not a plan: {error}") from None


def to_plain(value: Any) -> Any:
    """Dataclasses to dicts without the fields at their defaults, tuples to lists."""
    if dataclasses.is_dataclass(value):
        pairs = ((item, getattr(value, item.name)) for item in dataclasses.fields(value))
        return {item.name: to_plain(content) for item, content in pairs if content != item.default}
    return [to_plain(item) for item in value] if isinstance(value, tuple) else value


def _meant(kinds: tuple[Any, ...], value: Any) -> Any:
    """Which of several kinds a value of `to_plain` is of; dataclasses are told apart by their fields."""
    if isinstance(value, dict):
        for kind in filter(dataclasses.is_dataclass, kinds):
            if {item.name for item in dataclasses.fields(kind)} >= value.keys():
                return kind
    return next((kind for kind in kinds if type(value) is kind), kinds[0])


def from_plain(kind: Any, value: Any) -> Any:
    """The inverse of `to_plain` for a value of the annotated type `kind`.

    Raises:
        ValueError: The value is of another type.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None and types.NoneType in arguments else from_plain(_meant(arguments, value), value)
    if origin is tuple and type(value) is list:
        return tuple(from_plain(arguments[0], item) for item in value)
    if origin is Literal and type(value) is str and value in arguments:
        return value
    if dataclasses.is_dataclass(kind) and type(value) is dict:
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise ValueError(f"{getattr(kind, '__name__', kind)} has no field '{name}'")
        return kind(**{name: from_plain(hints[name], content) for name, content in value.items()})  # type: ignore[operator]
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{value!r} stands where {getattr(kind, '__name__', kind)} is expected"[:500])

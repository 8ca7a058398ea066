"""Slow, obvious re-implementations to compare against. Nothing here calls a layer of dacnn.

`Unshared` is the network of a plan in which every layer owns a plain `nn.Conv2d`; `tied_by_hand` fills one with clones of
the kernels of a dacnn network, so that both must compute the same, and the clones' gradients must add up.
"""

import types
import typing
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

from dacnn.networks.network import Network
from dacnn.networks.plan import Block, Input, Layer, Plan, Regulator, Stage

# N images, C channels, H rows, W columns, K classes

REGULATORS = ("pointwise", "depthwise", "low-rank", "shift")
PLACES = ("before-norm", "after-norm")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """In files that import this, PyTorch computes on one thread: the networks are so small that a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rank_of(kind: str) -> int | None:
    """The rank that tests give to a regulator of this kind."""
    return 2 if kind == "low-rank" else None


# ---------------------------------------------------------------- the network, every layer with a kernel of its own


class LowRankRegulator(nn.Module):
    """x plus a matrix of low rank times x, pixel by pixel."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, rank, bias=False)
        self.up = nn.Linear(rank, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.permute(0, 2, 3, 1)
        return x + self.up(self.down(pixels)).permute(0, 3, 1, 2)


class SwapRegulator(nn.Module):
    """Channel 0 moves to the end."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, 1:], x[:, :1]], dim=1)


def plain_regulator(regulator: Regulator | None, channels: int) -> nn.Module:
    """A regulator from plain modules."""
    if regulator is None:
        return nn.Identity()
    if regulator.kind == "pointwise":
        return nn.Conv2d(channels, channels, 1, bias=False)
    if regulator.kind == "depthwise":
        return nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
    if regulator.kind == "low-rank":
        return LowRankRegulator(channels, int(regulator.rank or 0))
    return SwapRegulator()


def plain_layer(layer: Layer) -> nn.ModuleDict:
    """A convolution of its own, its norm, its regulator."""
    side = layer.kernel_size
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(layer.in_channels, layer.out_channels, side, padding=side // 2, bias=False),
            "norm": nn.BatchNorm2d(layer.out_channels),
            "regulator": plain_regulator(layer.regulator, layer.out_channels),
        }
    )


class Unshared(nn.Module):
    """A plan as the paper tells it, with as many convolutions as layers."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        self.places = nn.ModuleDict({layer.name.replace(".", "/"): plain_layer(layer) for layer in plan.layers()})
        self.linear = nn.Linear(plan.features, len(plan.classes))

    def place(self, layer: Layer) -> Any:
        return self.places[layer.name.replace(".", "/")]

    def run(self, layer: Layer, x: Tensor) -> Tensor:
        place = self.place(layer)
        x = place["conv"](x)
        if layer.regulator is not None and layer.regulator.place == "after-norm":
            return place["regulator"](place["norm"](x))
        return place["norm"](place["regulator"](x))

    def forward(self, images_nchw: Tensor) -> Tensor:
        x = self.run(self.plan.stem, images_nchw).clamp(min=0)
        for stage in self.plan.stages:
            for block in stage.blocks:
                y = x
                for number, layer in enumerate(block.layers, start=1):
                    y = self.run(layer, y)
                    if number < len(block.layers):
                        y = y.clamp(min=0)
                if block.residual:
                    y = y + (x if block.shortcut is None else self.run(block.shortcut, x))
                x = y.clamp(min=0)
            if stage.pool:
                x = nn.MaxPool2d(2)(x)
        return self.linear(nn.AdaptiveAvgPool2d(1)(x).flatten(1))

    def kernel_gradients(self) -> dict[str, Tensor]:
        """For every kernel of the plan, the sum of the gradients of its clones."""
        sums: dict[str, Tensor] = {}
        for layer in self.plan.layers():
            gradient = self.place(layer)["conv"].weight.grad
            sums[layer.kernel] = sums[layer.kernel] + gradient if layer.kernel in sums else gradient.clone()
        return sums


def readers_by_name(network: Network) -> dict[str, Any]:
    """The module that stands for each layer of the plan."""
    found: dict[str, Any] = {network.plan.stem.name: network.stem}
    for stage, modules in zip(network.plan.stages, network.stages, strict=True):
        for block, module in zip(stage.blocks, modules, strict=True):  # type: ignore[arg-type]
            found |= {layer.name: reader for layer, reader in zip(block.layers, module.readers, strict=True)}
            if block.shortcut:
                found[block.shortcut.name] = module.shortcut
    return found


@torch.no_grad()
def tied_by_hand(network: Network) -> Unshared:
    """The reference with clones of the network's tensors, in the network's dtype and mode."""
    twin = Unshared(network.plan).to(network.classifier.weight.dtype)
    readers = readers_by_name(network)
    for layer in network.plan.layers():
        place, reader = twin.place(layer), readers[layer.name]
        place["conv"].weight.copy_(network.anchors[layer.kernel])
        place["norm"].load_state_dict(reader.norm.state_dict())
        own = list(place["regulator"].parameters())
        theirs = list(reader.regulator.parameters()) if reader.regulator is not None else []
        for mine, other in zip(own, theirs, strict=True):
            mine.copy_(other.reshape(mine.shape))
    twin.linear.load_state_dict(network.classifier.state_dict())
    return twin.train(network.training)


@torch.no_grad()
def randomise(network: Network, seed: int = 0) -> Network:
    """Bring every tensor away from its start, so that nothing is hidden behind a zero or an identity; in place."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith(("norm.weight", "running_var")):
            tensor.copy_(0.5 + noise)
        elif name.endswith(("norm.bias", "running_mean", "classifier.bias")):
            tensor.copy_(0.5 * (noise - 0.5))
        elif ".regulator." in name:
            tensor.add_(0.4 * (noise - 0.5))
    return network


def images_for(plan: Plan, count: int = 3, side: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normalised random images, N x C x H x W."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = side or plan.input.height, side or plan.input.width
    return torch.randn(count, plan.input.channels, rows, columns, generator=generator, dtype=torch.float64).to(dtype)


def assert_equal_up_to_rounding(actual: Tensor, expected: Tensor, relative: float) -> None:
    """Compare on the scale of the largest value: single values may be differences of large ones."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    scale = max(float(expected.abs().max()), 1e-30)
    assert float((actual - expected).abs().max()) <= relative * scale


# ---------------------------------------------------------------- random plans


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any small plan: depths, widths, kernel sizes, sharing across stages and stem, regulators, shortcuts, poolings."""
    in_channels = draw(st.integers(1, 3))
    names = Counter[str]()

    def layer(kind: str, channels: int, out: int) -> Layer:
        size = draw(st.sampled_from([1, 3, 3, 5]))
        # layers of one shape read one of two kernels, so that any set of them may share
        kernel = f"k{out}x{channels}x{size}_{draw(st.integers(0, 1))}"
        kinds: Any = draw(st.sampled_from([None, None, *REGULATORS]))
        regulator = Regulator(kinds, draw(st.sampled_from(PLACES)), rank_of(kinds)) if kinds else None
        names[kind] += 1
        return Layer(f"{kind}{names[kind]}.conv", kernel, channels, out, size, regulator)

    channels = draw(st.integers(2, 4))
    stem = layer("stem", in_channels, channels)
    stages = []
    for _ in range(draw(st.integers(0, 3))):
        blocks = []
        for _ in range(draw(st.integers(0, 3))):
            before, layers = channels, []
            for _ in range(draw(st.integers(1, 3))):
                width = draw(st.sampled_from([channels, channels, 2, 4]))
                layers.append(layer("body", channels, width))
                channels = width
            residual = draw(st.booleans())
            shortcut = layer("around", before, channels) if residual and (before != channels or draw(st.booleans())) else None
            blocks.append(Block(tuple(layers), residual, shortcut))
        stages.append(Stage(tuple(blocks), draw(st.booleans())))
    smallest = 2 ** sum(stage.pool for stage in stages)
    rows, columns = (smallest * draw(st.integers(2, 3)) + draw(st.integers(0, 1)) for _ in range(2))
    mean = tuple(draw(st.floats(0, 1)) for _ in range(in_channels))
    std = tuple(draw(st.floats(0.05, 2)) for _ in range(in_channels))
    classes = tuple(draw(st.lists(st.text(max_size=5), min_size=1, max_size=4)))
    fit: Any = draw(st.sampled_from(["crop", "stretch", "pad"]))
    return Plan(draw(st.text(max_size=8)), Input(rows, columns, in_channels, mean, std, fit), classes, stem, tuple(stages))


# ---------------------------------------------------------------- JSON trees


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a JSON tree with another value at `path`."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    inner = tree.get(path[0]) if isinstance(tree, dict) else tree[path[0]]
    copy[path[0]] = changed(inner, path[1:], value)
    return copy


# ---------------------------------------------------------------- types, checked from the annotations


def is_of(kind: Any, value: object) -> bool:
    """Whether a value is what its annotation says, all the way down."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return type(value) is str and value in arguments
    if origin in (types.UnionType, typing.Union):
        return any(is_of(argument, value) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(is_of(arguments[0], item) for item in value)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return type(value) is kind and all(is_of(hints[item.name], getattr(value, item.name)) for item in fields(kind))
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind

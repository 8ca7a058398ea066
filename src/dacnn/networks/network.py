"""A Plan -> nn.Module. Chain and residual networks, shared and unshared, are one class: the plan tells them apart."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dacnn.config import NetworkConfig
from dacnn.errors import ConfigError
from dacnn.networks.classifier import Classifier, as_network
from dacnn.networks.plan import Block, Input, Layer, Plan
from dacnn.networks.zoo import plan_of
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.layers import Reader
from dacnn.sharing.regulators import make_regulator
from dacnn.sharing.remake import halve_by_max
from dacnn.sharing.segments import made_again

# N images, C channels, H rows, W columns, K classes


def _reader(layer: Layer) -> Reader:
    regulator = layer.regulator
    if regulator is None:
        return Reader(layer.out_channels)
    return Reader(layer.out_channels, make_regulator(regulator.kind, layer.out_channels, regulator.rank), regulator.place)


def _plain(tensor: Tensor) -> Tensor:
    # not `contiguous()`: a 1x1 kernel is contiguous in both formats at once, and a convolution reads its format off the strides
    strides = torch.empty(tensor.shape, device="meta").stride()
    return tensor if tensor.stride() == strides else tensor.clone(memory_format=torch.contiguous_format)


def _as_reader(module: nn.Module) -> Reader:
    assert isinstance(module, Reader)
    return module


class PlannedBlock(nn.Module):
    """The readers of one block of a plan."""

    def __init__(self, block: Block) -> None:
        """Make the readers of `block`."""
        super().__init__()
        readers = [_reader(layer) for layer in block.layers]
        self.readers = nn.ModuleList(readers)
        self.names = [layer.name for layer in block.layers]
        self.residual = block.residual
        self.shortcut = _reader(block.shortcut) if block.shortcut else None
        self.shortcut_name = block.shortcut.name if block.shortcut else ""
        if block.residual:
            # a residual block starts as the identity, so that a network of any depth can begin to learn
            # (Goyal et al., arXiv:1706.02677, section 5.1)
            nn.init.zeros_(readers[-1].norm.weight)

    def forward(self, x: Tensor, anchors: Anchors, halve: bool = False) -> Tensor:
        """Run the block.

        Args:
            x: Shape (N, C, H, W).
            anchors: The kernels of the whole network.
            halve: Whether 2x2 max-pooling follows.

        Returns:
            Shape (N, C', H, W), or (N, C', H // 2, W // 2).
        """
        before = x if self.shortcut is None else self.shortcut(x, anchors.read(self.shortcut_name))
        last = len(self.readers) - 1
        for index, (reader, name) in enumerate(zip(self.readers, self.names, strict=True)):
            ends = index == last
            x = reader(x, anchors.read(name), relu=not (ends and self.residual), halve=ends and halve and not self.residual)
        if not self.residual:
            return x
        x = F.relu(x + before, inplace=True)
        return halve_by_max(x) if halve else x


class Network(Classifier):
    """An anchored network: `anchors` owns the kernels, everything else reads them.

    Attributes:
        plan: What the network was built from.
        anchors: The kernels, each stored once.
        segments: In training, this many blocks in a row run again for the gradient instead of being kept, and this many
            behind them, and so on; the stem goes with the first. Blocks behind the last segment are kept; so is all where
            there are no segments.
    """

    segments: tuple[int, ...]

    def __init__(self, plan: Plan, generator: torch.Generator | None = None) -> None:
        """Build a plan.

        Args:
            plan: The plan.
            generator: Source of the start values; None is PyTorch's global one.
        """
        super().__init__(plan.input, plan.classes)
        self.plan = plan
        self.anchors = Anchors({layer.name: (layer.expression, layer.kernel_shape) for layer in plan.layers()})
        # PyTorch's layers draw a start of their own, which is drawn anew below: from the generator alone
        with torch.random.fork_rng(devices=[], enabled=generator is not None):
            self.stem = _reader(plan.stem)
            self.stages = nn.ModuleList(
                [nn.ModuleList([PlannedBlock(block) for block in stage.blocks]) for stage in plan.stages]
            )
            self.classifier = nn.Linear(plan.features, len(plan.classes))
        self.segments = ()
        self.reset_parameters(generator)

    @property
    def owner(self) -> Anchors:
        """Who owns the kernels."""
        return self.anchors

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw kernels, low-rank regulators and the linear layer anew.

        Args:
            generator: Source of the random numbers; None is PyTorch's global one.
        """
        if self.classifier.weight.is_meta:
            # PyTorch draws nothing there either, but takes seconds over it
            return
        chained = [
            layer for stage in self.plan.stages for block in stage.blocks if not block.residual for layer in block.layers
        ]
        square = {layer.anchor for layer in chained if layer.in_channels == layer.out_channels}
        self.anchors.reset_parameters(generator, near_identity=square)
        nn.init.kaiming_uniform_(self.classifier.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.classifier.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("regulator.down.weight"):
                nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Parameters stay contiguous whatever memory format is asked for: what is saved is the same bytes, safetensors
        # takes it, and a convolution follows the format of its input anyway.
        super()._apply(lambda tensor: _plain(fn(tensor)), recurse)  # type: ignore[no-untyped-call]
        return self

    def _blocks(self) -> list[nn.Module]:
        """The blocks of all stages in a row."""
        return [block for blocks in self.stages for block in cast(nn.ModuleList, blocks)]

    def _run(self, begin: int, end: int | None, x: Tensor) -> Tensor:
        """Run some of the blocks; with the first goes the stem, with each the poolings behind it."""
        # how often the image is halved behind the stem and behind every block
        halvings = [0]
        for stage in self.plan.stages:
            halvings += [0] * len(stage.blocks)
            halvings[-1] += stage.pool
        if begin == 0:
            x = self.stem(x, self.anchors.read(self.plan.stem.name), relu=True)
            for _ in range(halvings[0]):
                x = halve_by_max(x)
        for block, times in zip(self._blocks()[begin:end], halvings[1:][begin:end], strict=True):
            # pooling is left to the block, which knows what it has to keep for it
            x = block(x, self.anchors, halve=times > 0)
            for _ in range(times - 1):
                x = halve_by_max(x)
        return x

    def named_readers(self) -> Iterator[tuple[str, Reader]]:
        """The readers, by the names that their layers have in the plan."""
        yield self.plan.stem.name, self.stem
        for module in self.modules():
            if isinstance(module, PlannedBlock):
                yield from zip(module.names, map(_as_reader, module.readers), strict=True)
                if module.shortcut is not None:
                    yield module.shortcut_name, module.shortcut

    @property
    def smallest_side(self) -> int:
        """Smallest side of an image, in pixels: one that every pooling can halve."""
        return self.plan.smallest_side

    def logits(self, x: Tensor) -> Tensor:
        """Run the layers.

        Args:
            x: Normalised floats, shape (N, C, H, W).

        Returns:
            Shape (N, K).
        """
        begin = 0
        for length in self.segments:
            assert length > 0, f"a segment of {length} blocks"
            modules = [*([] if begin else [self.stem]), *self._blocks()[begin : begin + length]]
            x = made_again(partial(self._run, begin, begin + length), x, modules)
            begin += length
        x = self._run(begin, None, x)
        y: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return y


def create(
    network: str | Plan | NetworkConfig,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    seed: int | None = None,
    **changes: object,
) -> Network:
    """Make a network by name, or from a plan.

    Args:
        network: A name of the zoo (`dacnn models` lists them), a config, or a Plan.
        num_classes: Number of classes K; None: 10. A plan knows its own.
        in_channels: Channels of an input image; None: 3. A plan knows its own.
        seed: Seed of the start values; None draws from PyTorch's global generator.
        **changes: Fields of `NetworkConfig`: `width`, `depths`, `share`, `regulator`, ...

    Returns:
        The network, in training mode.

    Raises:
        UnknownNameError: The zoo has no such network.
        ConfigError: A change does not fit it.
        PlanError: The plan cannot be built.

    Example:
        >>> import dacnn
        >>> network = dacnn.create("dacnn14", num_classes=100)
        >>> sum(parameter.numel() for parameter in network.parameters())
        167140
    """
    if isinstance(network, Plan):
        settings = {"num_classes": num_classes, "in_channels": in_channels, **changes}
        given = [name for name, value in settings.items() if value is not None]
        if given:
            raise ConfigError(f"create got a plan and {', '.join(given)}: change the plan instead")
        plan = network
    else:
        classes = 10 if num_classes is None else num_classes
        channels = 3 if in_channels is None else in_channels
        if min(classes, channels) < 1:
            raise ConfigError(f"num_classes is {classes} and in_channels {channels}: expected 1 or more of each")
        table = network.to_table() if isinstance(network, NetworkConfig) else {"name": network}
        lists = {name: list(value) if isinstance(value, tuple) else value for name, value in changes.items()}
        config = NetworkConfig.from_table(table | lists, "create")
        input = Input(channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
        plan = plan_of(config, input, tuple(map(str, range(classes))))
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Network(plan, generator)


def as_planned(found: object) -> Network:
    """Refuse what is no network that was made from a plan, before its plan is asked for.

    Args:
        found: What a caller gave, as `as_network` takes it.

    Returns:
        The network.

    Raises:
        ConfigError: It is something else.
    """
    network = as_network(found)
    if not isinstance(network, Network):
        raise ConfigError(f"got {type(network).__name__}: expected a network that has a plan: dacnn.create makes one")
    return network

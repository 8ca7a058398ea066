"""Networks as a user writes them, none of them a network of this library: called by tests, and named as FILE.py:factory."""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

FILE = Path(__file__)
# names of the layers of `chain` that read one kernel, by rule
GROUPS = {
    "all": [("a.0", "b.0", "c.0", "d.0", "e.0")],
    "stage": [("a.0", "b.0"), ("c.0", "d.0", "e.0")],
    "isomorphic": [("a.0", "b.0"), ("c.0", "d.0")],
    "template": [("a.0", "b.0", "c.0", "d.0", "e.0")],
    "none": [],
}
KERNEL_PARAMETERS = 8 * 8 * 9


def block(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU())


def chain(num_classes: int = 10, in_channels: int = 1) -> nn.Sequential:
    """Five convolutions of one shape: two before the pooling, three behind it, of which one is dilated."""
    parts: dict[str, nn.Module] = {"stem": block(in_channels, 8, stride=2), "a": block(8, 8), "b": block(8, 8)}
    parts |= {"pool": nn.MaxPool2d(2), "c": block(8, 8), "d": block(8, 8), "e": block(8, 8, dilation=2)}
    # dropout draws from PyTorch's generator, which a resumed training must have where it was
    parts |= {"average": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "drop": nn.Dropout(0.1)}
    return nn.Sequential(OrderedDict(parts | {"head": nn.Linear(8, num_classes)}))


def fixed() -> nn.Module:
    """Takes no arguments."""
    return chain(10, 1)


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


class Wrapped(nn.Module):
    """A chain in a module, as most people write them."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.chain = chain(num_classes, in_channels)

    def forward(self, x: Tensor) -> object:
        return self.chain(x)


class GivesObject(Wrapped):
    """Logits in an attribute, as transformers give them."""

    def forward(self, x: Tensor) -> Output:
        return Output(x, self.chain(x))


class GivesTuple(Wrapped):
    """Logits first, as networks with auxiliary heads give them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.chain(x), x


class GivesDict(Wrapped):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.chain(x)}


class Keeps(Wrapped):
    """Keeps what it computed, so that it cannot be copied while there are gradients."""

    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.chain(x)
        return self.last


class Views(nn.Module):
    """Flattens by view(), which wants activations that are contiguous in N x C x H x W."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, stride=8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4 * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).relu()
        return self.head(x.view(x.shape[0], -1))


class Tied(nn.Module):
    """Two layers hold one parameter, and one buffer is a part of another."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, stride=8)
        self.first, self.second, self.third, self.fourth = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, num_classes)
        self.register_buffer("table", torch.arange(10.0))
        self.register_buffer("row", self.table[2:5])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.first, self.second, self.third, self.fourth):
            x = layer(x).relu()
        return self.head(x.mean((2, 3)))


class Stateful(Wrapped):
    """Has something in its state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def lazy(num_classes: int) -> nn.Module:
    """Knows its shapes when it has run."""
    inner = [nn.LazyConv2d(8, 3, padding=1), nn.LazyBatchNorm2d(), nn.Conv2d(8, 8, 3, padding=1), nn.Flatten()]
    return nn.Sequential(nn.LazyConv2d(8, 3, stride=8), *inner, nn.LazyLinear(num_classes))


def anchored(num_classes: int, in_channels: int) -> nn.Module:
    """Shares its kernels itself."""
    import dacnn

    return dacnn.anchor(chain(num_classes, in_channels))[0]


def frozen() -> nn.Module:
    return chain().requires_grad_(False)


def without_parameters() -> nn.Module:
    return nn.Flatten()


def seven_classes() -> nn.Module:
    return chain(7, 1)


def three_channels() -> nn.Module:
    return chain(10, 3)


def nothing() -> None: ...


def needs_width(width: int) -> nn.Module:
    return chain(width, 1)


def fails() -> nn.Module:
    raise RuntimeError("the first line\nthe second line")


def leaves() -> nn.Module:
    raise SystemExit(3)


ready = chain()

"""Convolutions and max-poolings that follow one another, in one call: PyTorch's own interpreter goes from one to the next.

Called from Python, oneDNN takes half as long again, since each of a dozen arguments is examined at every call: layers of few
pixels compute for less time than that takes.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dacnn.deploy.packing.onednn import PackedKernel, Shape, Slide

# N images, C channels, H rows, W columns, O output channels

# shapes of images that links are remembered for: the batches of a server have few
_MOST_SHAPES = 256
# values from which pooling in three passes is as fast as in one
_LARGE = 2**17
# where a link has no such tensor: what PyTorch's interpreter is handed has no gaps
_NONE = torch.empty(0)


@dataclass(frozen=True)
class Convolution:
    """(convolution + bias) * factor, then ReLU, in one pass.

    Attributes:
        kernel: The kernel.
        slide: How it is slid.
        factor: Shape (1, O, 1, 1), of the kernel's type.
        bias: Shape (O,), of the kernel's type.
        relu: Whether to end with a ReLU.
    """

    kernel: PackedKernel
    slide: Slide
    factor: Tensor | None
    bias: Tensor | None
    relu: bool

    def link(self, pack: Tensor) -> "_Link":
        """It as the interpreter takes it, with a pack of its kernel."""
        of = self.slide.geometry
        factor, bias = (_NONE if term is None else term for term in (self.factor, self.bias))
        slid = list(self.slide.margin), list(of.stride), list(of.padding), list(of.dilation)
        return _Link(pack, factor, bias, *slid, of.groups, self.relu)


@dataclass(frozen=True)
class MaxPooling:
    """Max-pooling.

    Attributes:
        size: Rows and columns of the window.
        slide: How it is slid, in one group without dilation; no maximum is in its padding, of at most half a window.
    """

    size: tuple[int, int]
    slide: Slide

    def link(self) -> "_Link":
        """It as the interpreter takes it."""
        of = self.slide.geometry
        return _Link(_NONE, _NONE, _NONE, list(self.slide.margin), list(of.stride), list(of.padding), list(self.size), 0, False)

    def __call__(self, x: Tensor) -> Tensor:
        """Pool images, N x C x H x W."""
        return _linked(x, self.link())


class _Link(NamedTuple):
    """A convolution, or a pooling, which has no groups.

    Attributes:
        extent: Dilation of a kernel, window of a pooling.
    """

    pack: Tensor
    factor: Tensor
    bias: Tensor
    margin: list[int]
    stride: list[int]
    padding: list[int]
    extent: list[int]
    groups: int
    relu: bool


class Chain:
    """Convolutions and max-poolings one after the other: each alone reads what the one before it gives."""

    def __init__(self, links: Sequence[Convolution | MaxPooling]) -> None:
        """Take them; kernels are packed when images come.

        Args:
            links: The first one is a convolution.
        """
        first = links[0]
        assert isinstance(first, Convolution), "the memory format and type are a convolution's"
        self._links = tuple(links)
        self._dtype = first.kernel.dtype
        # by the packs that they read, which are the same for most sizes of a batch; and by the shape of images
        self._held: dict[tuple[int, ...], Any] = {}
        self._known: dict[torch.Size, Any] = {}

    def taking(self, given: list[Tensor]) -> Tensor:
        """Go through them.

        Args:
            given: N x C x H x W, alone in a list, which is empty then: so that it goes where nobody else needs it, as soon as
                the first of them has read it.

        Returns:
            N x O x H' x W', in channels-last memory, of the kernels' type.
        """
        x = given.pop()
        if x.dtype is not self._dtype:
            x = x.to(self._dtype)
        links = self._known.get(x.shape) or self.prepare(x.shape)
        boxed = _interpreter().boxed([x.contiguous(memory_format=torch.channels_last)])
        del x
        return _interpreter().run(boxed, links)

    def prepare(self, images: torch.Size) -> Any:
        """Pack every kernel as images want it: before there are activations, between which packs would lie.

        Args:
            images: N x C x H x W, a size that goes through all of them.

        Returns:
            The links as the interpreter takes them; remembered, but for packs that are made at every call.
        """
        links, all_kept, shape = [], True, tuple(images)
        made: dict[tuple[PackedKernel, Slide, Shape], Tensor] = {}
        for one in self._links:
            if isinstance(one, Convolution):
                asked = one.kernel, one.slide, shape
                if asked not in made:
                    made[asked], kept = one.kernel.read(one.slide.geometry, one.slide.padded(shape))
                    all_kept = all_kept and kept
                links.append(one.link(made[asked]))
                shape = (shape[0], one.kernel.shape[0], *one.slide.windows(shape, one.kernel.shape[2:]))
            else:
                links.append(one.link())
                shape = (*shape[:2], *one.slide.windows(shape, one.size))
        if not all_kept:
            return links
        packs = tuple(id(link.pack) for link in links)
        if packs not in self._held:
            self._held[packs] = _interpreter().held(links)
        if len(self._known) < _MOST_SHAPES:
            self._known[images] = self._held[packs]
        return self._held[packs]


# What follows is TorchScript as well as Python: globals are let in as defaults of arguments alone.


def _run(given: list[Tensor], links: list[_Link]) -> Tensor:
    x = given.pop()
    for link in links:
        x = _linked(x, link)
    return x


class _Run(nn.Module):
    def forward(self, given: list[Tensor], links: list[_Link]) -> Tensor:
        return _run(given, links)


def _linked(x: Tensor, link: _Link) -> Tensor:
    return _pooled(x, link) if link.groups == 0 else _convolved(x, link)


def _convolved(x: Tensor, link: _Link) -> Tensor:
    if link.margin != [0, 0, 0, 0]:
        x = torch.constant_pad_nd(x, link.margin)
    bias: Tensor | None = None if link.bias.numel() == 0 else link.bias
    if link.factor.numel() == 0:
        ending = "relu" if link.relu else "none"
        y: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, link.pack, bias, link.padding, link.stride, link.extent, link.groups, ending, [], ""
        )
        return y
    then: str | None = "relu" if link.relu else None
    z: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, link.factor, link.pack, bias, link.padding, link.stride, link.extent, link.groups, "mul", None, then, [], None
    )
    return z


def _pooled(x: Tensor, link: _Link, least: float = -math.inf, large: int = _LARGE) -> Tensor:
    if link.margin != [0, 0, 0, 0]:
        x = torch.constant_pad_nd(x, link.margin, least)
    halves = link.extent == [2, 2] and link.stride == [2, 2] and link.padding == [0, 0]
    if not halves or x.dtype != torch.float32 or x.numel() < large:
        return torch.max_pool2d(x, link.extent, link.stride, link.padding)
    # without PyTorch's int64 indices, which are twice as many bytes as its result
    x = x[:, :, : x.size(2) // 2 * 2, : x.size(3) // 2 * 2]
    y = torch.maximum(x[:, :, ::2, ::2], x[:, :, ::2, 1::2])
    torch.maximum(y, x[:, :, 1::2, ::2], out=y)
    return torch.maximum(y, x[:, :, 1::2, 1::2], out=y)


class _Interpreter(NamedTuple):
    """What goes through links, and what makes of lists those that it can be handed without a copy."""

    run: Callable[[Any, Any], Tensor]
    boxed: Callable[[list[Tensor]], Any]
    held: Callable[[list[_Link]], Any]


def is_interpreted() -> bool:
    """Whether PyTorch's interpreter goes through the links, and not Python."""
    return _interpreter().run is not _run


@lru_cache(maxsize=1)
def _interpreter() -> _Interpreter:
    """PyTorch's; Python's where PyTorch has none any more, or cannot read this file."""
    with warnings.catch_warnings():
        # it is deprecated, but what replaces it needs a compiler
        warnings.simplefilter("ignore")
        try:
            # not `_run` by itself: while any thread exports a network, PyTorch would call that as Python
            script = torch.jit.script(_Run())._c._get_method("forward")
        except (AttributeError, NotImplementedError, OSError, RuntimeError):
            return _Interpreter(_run, list, list)

    def run(given: Any, links: Any) -> Tensor:
        # it would look at the first runs and plan the others, which leaves memory between activations and saves no time
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            y: Tensor = script(given, links)
        return y

    def held(links: list[_Link]) -> Any:
        # the type is made out for the first one alone, which takes as long as a few layers
        made = torch._C.ScriptList(links[:1])
        made.extend(links[1:])
        return made

    return _Interpreter(run, torch._C.ScriptList, held)

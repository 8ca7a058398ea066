"""Who owns the kernels, and the expression by which a reader reads one.

A network holds all its kernels in one `Anchors` module, each under one name, and hands them to the layers that read
them. So a state dict names each kernel once, and serialisers, optimisers, counters and `torch.export` are right
without special cases. What a reader reads is an expression over one stored tensor: the tensor itself (`Stored`), a
combination of the templates in it (`Combine`), or a tiling of it (`Repeat`). Expressions are data; the few numbers
that belong to one reader alone are stored under its name.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from dacnn.errors import PlanError
from dacnn.sharing.remake import evaluated

# O output channels, I input channels, ... rows and columns (none for a matrix), T templates, R x S tiles

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """The stored tensor itself.

    Attributes:
        anchor: Its name.
    """

    anchor: str

    def stored_shape(self, kernel: Shape) -> Shape:
        """Shape of the stored tensor for a kernel of this shape."""
        return kernel

    def own_shapes(self, kernel: Shape) -> dict[str, Shape]:
        """Names and shapes of what a reader of such a kernel stores for itself."""
        return {}

    def evaluate(self, stored: Tensor, *own: Tensor) -> Tensor:
        """The kernel."""
        return stored


@dataclass(frozen=True)
class Combine:
    """A linear combination of the templates of a bank, with coefficients of the reader's own (soft sharing).

    Attributes:
        bank: Name of the stored bank, shape (T, O, I, ...).
        templates: How many it holds, T.

    Source:
        Savarese & Maire, ICLR 2019, arXiv:1902.09701. Deviations: where the coefficients start (see `Anchors`).
    """

    bank: str
    templates: int

    def __post_init__(self) -> None:
        """Check that there is something to combine."""
        if self.templates < 1:
            raise PlanError(f"bank '{self.bank}' has {self.templates} templates: expected 1 or more")

    @property
    def anchor(self) -> str:
        """Name of the stored tensor."""
        return self.bank

    def stored_shape(self, kernel: Shape) -> Shape:
        """Shape of the stored tensor for a kernel of this shape."""
        return (self.templates, *kernel)

    def own_shapes(self, kernel: Shape) -> dict[str, Shape]:
        """Names and shapes of what a reader of such a kernel stores for itself."""
        return {"coefficients": (self.templates,)}

    def evaluate(self, stored: Tensor, *own: Tensor) -> Tensor:
        """The kernel: the templates of shape (T, O, I, ...), each times its coefficient, added up."""
        (coefficients,) = own
        # no matrix product: autocast would round it to bfloat16
        return (coefficients.view(-1, *[1] * (stored.ndim - 1)) * stored).sum(0)


@dataclass(frozen=True)
class Repeat:
    """A small kernel tiled over output and input channels, each tile through a curve of the reader's own.

    Attributes:
        base: Name of the stored kernel, shape (O, I, ...).
        out_channels: Its output channels, O.
        in_channels: Its input channels, I.

    Source:
        Chavan et al., ICIP 2021, arXiv:2101.05650. Deviations: where gain and steepness start (see `Anchors`).
    """

    base: str
    out_channels: int
    in_channels: int

    def __post_init__(self) -> None:
        """Check that there is something to repeat."""
        if min(self.out_channels, self.in_channels) < 1:
            raise PlanError(f"base '{self.base}' is {self.in_channels} -> {self.out_channels} channels: expected 1 or more")

    @property
    def anchor(self) -> str:
        """Name of the stored tensor."""
        return self.base

    def stored_shape(self, kernel: Shape) -> Shape:
        """Shape of the stored tensor for a kernel of this shape."""
        return (self.out_channels, self.in_channels, *kernel[2:])

    def own_shapes(self, kernel: Shape) -> dict[str, Shape]:
        """Names and shapes of what a reader of such a kernel stores for itself.

        Raises:
            PlanError: The kernel is no whole number of tiles.
        """
        if kernel[0] % self.out_channels or kernel[1] % self.in_channels:
            raise PlanError(
                f"a kernel of {kernel[1]} -> {kernel[0]} channels is no tiling of base '{self.base}', which is "
                f"{self.in_channels} -> {self.out_channels}: expected multiples of those"
            )
        tiles = (kernel[0] // self.out_channels, kernel[1] // self.in_channels)
        return {"gain": tiles, "steepness": tiles}

    def evaluate(self, stored: Tensor, *own: Tensor) -> Tensor:
        """The kernel, see `repeat_kernel`."""
        gain, steepness = own
        return repeat_kernel(stored, gain, steepness)


Expression = Stored | Combine | Repeat


def repeat_kernel(base: Tensor, gain: Tensor, steepness: Tensor) -> Tensor:
    """Tile a small kernel into a larger one; in tile (r, s) a weight w becomes gain * w / (1 + exp(steepness * w)).

    Args:
        base: The small kernel, shape (O, I, ...).
        gain: Factor of each tile, shape (R, S).
        steepness: Of each tile, in 1 / unit of `base`, shape (R, S).

    Returns:
        Shape (R * O, S * I, ...).

    Source:
        Chavan et al., ICIP 2021, arXiv:2101.05650. Deviations: none.
    """
    r, s = gain.shape
    o, i, *rest = base.shape
    ones = [1] * len(rest)
    gain, steepness = gain.view(r, 1, s, 1, *ones), steepness.view(r, 1, s, 1, *ones)
    # x / (1 + exp(y)) as x * sigmoid(-y), which does not overflow
    tiles = gain * base.unsqueeze(1) * torch.sigmoid(-steepness * base.unsqueeze(1))
    return tiles.reshape(r * o, s * i, *rest)


def parameter_name(layer_name: str) -> str:
    """A layer's name as the name of something stored, which may hold no dot."""
    return layer_name.replace("_", "__").replace(".", "_")


class Anchors(nn.Module):
    """The kernels of a network, each stored once, and what every reader stores for itself."""

    def __init__(self, readers: Mapping[str, tuple[Expression, Shape]]) -> None:
        """Make room for the kernels; `reset_parameters` fills them.

        Args:
            readers: For every reader, by name, how it reads and the shape of its kernel: output channels, input
                channels, and for a convolution its rows and columns.

        Raises:
            PlanError: A name cannot be used, or readers of one stored tensor disagree on its shape.
        """
        super().__init__()
        self.expressions = {name: expression for name, (expression, _) in readers.items()}
        self.kernel_shapes = {name: shape for name, (_, shape) in readers.items()}
        self.own = nn.ModuleDict()
        for name, (expression, shape) in readers.items():
            self._store(expression.anchor, expression.stored_shape(shape), name)
            own = {key: nn.Parameter(torch.empty(size)) for key, size in expression.own_shapes(shape).items()}
            if own:
                if parameter_name(name) in self.own:
                    raise PlanError(f"'{name}' would be stored under the name of another layer: rename one of them")
                self.own[parameter_name(name)] = nn.ParameterDict(own)

    def _store(self, name: str, shape: Shape, reader: str) -> None:
        stored = self._parameters.get(name)
        if stored is None:
            if hasattr(self, name):
                raise PlanError(f"kernel '{name}' has the name of something that every module has: choose another")
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        elif tuple(stored.shape) != shape:
            raise PlanError(f"'{reader}' needs '{name}' to be {shape}, but it is {tuple(stored.shape)} for other readers")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # as a row of numbers: memory formats are of images' kernels, and what is stored has none of them
        super()._apply(lambda tensor: fn(tensor.flatten()).view(tensor.shape), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getitem__(self, name: str) -> Tensor:
        """A stored tensor."""
        # not `get_parameter`: `torch.func.functional_call` puts tensors that are no parameters in their place
        return cast(Tensor, getattr(self, name))

    def __iter__(self) -> Iterator[str]:
        """Names of the stored tensors."""
        return iter(self._parameters)

    def __len__(self) -> int:
        """How many tensors are stored for all readers."""
        return len(self._parameters)

    def readers(self) -> dict[str, list[str]]:
        """For every stored tensor, the names of its readers."""
        readers: dict[str, list[str]] = {}
        for name, expression in self.expressions.items():
            readers.setdefault(expression.anchor, []).append(name)
        return readers

    def is_stored(self, reader: str) -> bool:
        """Whether the kernel of a reader is a stored tensor itself, rather than made of one."""
        return isinstance(self.expressions[reader], Stored)

    def read(self, reader: str) -> Tensor:
        """The kernel of a reader, evaluated now and kept nowhere; under autocast an evaluated one is of autocast's type.

        Args:
            reader: Its name.

        Returns:
            Shape (O, I, ...).
        """
        # an owner is never called: what would make a kernel before a call makes it before it is read
        for hook in tuple(self._forward_pre_hooks.values()):
            if isinstance(hook, BasePruningMethod):
                hook(self, ())
        expression = self.expressions[reader]
        stored = self[expression.anchor]
        if self.is_stored(reader):
            return stored
        return evaluated(expression.evaluate, stored, *self.own_tensors(reader).values())

    def own_tensors(self, reader: str) -> dict[str, Tensor]:
        """What a reader stores for itself, by name."""
        name = parameter_name(reader)
        return dict(self.own[name].named_parameters()) if name in self.own else {}

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, near_identity: Collection[str] = ()) -> None:
        """Draw all kernels anew, normal with variance 2 / (inputs of an output).

        Coefficients of a bank start with sum 1 and length 1, gains so that the tiles add up to such a variance: a kernel
        then begins as a stored one would, and tiles and readers begin apart.

        Args:
            generator: Source of the random numbers; None is PyTorch's global one.
            near_identity: Names of square kernels, O = I, that begin as half such a draw plus the identity. Where many
                layers in a row read one kernel and no shortcut leads around them, the image would otherwise be mixed
                beyond recognition before the kernel has learnt anything.

        Source:
            He et al., ICCV 2015, arXiv:1502.01852; the identity as in Zagoruyko & Komodakis, arXiv:1706.00388.
            Deviations: one half instead of a learned balance of draw and identity.
        """
        drawn: set[str] = set()
        for reader, expression in self.expressions.items():
            near = expression.anchor in near_identity
            stored = self[expression.anchor]
            if expression.anchor not in drawn:
                for kernel in stored if isinstance(expression, Combine) else (stored,):
                    _draw_kernel(kernel, generator, near)
                drawn.add(expression.anchor)
            own = self.own_tensors(reader)
            if isinstance(expression, Combine):
                _draw_coefficients(own["coefficients"], generator)
            elif isinstance(expression, Repeat):
                _draw_gain(own["gain"], generator, near)
                nn.init.zeros_(own["steepness"])


def _draw_kernel(kernel: Tensor, generator: torch.Generator | None, near_identity: bool) -> None:
    nn.init.normal_(kernel, std=math.sqrt(2 / math.prod(kernel.shape[1:])), generator=generator)
    if near_identity:
        kernel.mul_(0.5).add_(nn.init.dirac_(torch.empty_like(kernel)))


def _draw_coefficients(coefficients: Tensor, generator: torch.Generator | None) -> None:
    """A point of the sphere on the plane of sum 1: the combination has a template's variance, and its identity."""
    templates = coefficients.numel()
    offset = nn.init.normal_(coefficients, generator=generator) - coefficients.mean()
    length = offset.norm().clamp_min(1e-12)
    coefficients.copy_(1 / templates + offset / length * math.sqrt(1 - 1 / templates))


def _draw_gain(gain: Tensor, generator: torch.Generator | None, near_identity: bool) -> None:
    """Twice what the tile shall be multiplied by: a curve of steepness 0 halves."""
    outputs, inputs = gain.shape
    nn.init.normal_(gain, std=2 / math.sqrt(inputs), generator=generator)
    if near_identity:
        here = torch.arange(outputs, device=gain.device)[:, None] % inputs
        identity = here == torch.arange(inputs, device=gain.device)[None] % outputs
        gain.mul_(0.5).add_(2 * identity)

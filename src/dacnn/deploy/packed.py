"""`pack`: a network as a PyTorch callable for servers, each kernel packed once and read by all its layers."""

import ctypes
import sys
import threading
from typing import Literal, get_args

import torch
from torch import Tensor

from dacnn.deploy.c.source import FloatDtype, Winograd
from dacnn.deploy.lower import lower
from dacnn.deploy.packing.compiled import Library, compiled, seconds_of
from dacnn.deploy.packing.steps import Steps, outline
from dacnn.deploy.program import Program
from dacnn.deploy.rounding import in_bfloat16
from dacnn.deploy.shapes import shapes
from dacnn.errors import ArtefactError, ConfigError, DeployError, ShapeError
from dacnn.networks.classifier import Classifier
from dacnn.training.precision import best_device, cpu_name, has_bfloat16_units

# N images, C channels, H rows, W columns, K classes

Engine = Literal["pytorch", "c", "auto"]
_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# sizes of images that are known to go through
_MOST_SIZES = 256


class Packed:
    """A network ready to serve. Many threads may call it at once; it changes nothing that they can see.

    Attributes:
        device: Where it runs.
        dtype: Number format of kernels and, in PyTorch, of activations. Sums and logits are float32; so are PyTorch's
            linear layers, and all that compiled C computes.
    """

    def __init__(
        self, program: Program, device: torch.device, dtype: torch.dtype, reason: str, library: Library | None = None
    ) -> None:
        """Pack a program; `pack` chooses the arguments."""
        self.device = device
        self.dtype = dtype
        self._reason = reason
        self._outline = outline(program)
        self._sizes: set[tuple[int, int]] = set()
        self._library = library
        # what the library does not take goes through steps, which are packed when such images come
        self._program = program if library else None
        self._steps = None if library else Steps(program, device, dtype)
        self._lock = threading.Lock()
        _give_back_freed_memory()

    @property
    def steps(self) -> Steps:
        """The steps in PyTorch."""
        with self._lock:
            if self._steps is None:
                assert self._program is not None
                # as C has it: rounded kernels, and all else in float32
                program = in_bfloat16(self._program) if self.dtype == torch.bfloat16 else self._program
                self._steps, self._program = Steps(program, self.device, torch.float32), None
                _give_back_freed_memory()
            return self._steps

    @property
    def nbytes(self) -> int:
        """Bytes of the packs, of kernels that are not packed, of scales and shifts; of compiled C, those of its library."""
        return sum(part.nbytes for part in (self._library, self._steps) if part)

    def __call__(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: uint8 of shape (N, H, W, C), or already normalised floats of shape (N, C, H, W); any number of them.

        Returns:
            Logits, float32, shape (N, K), on this network's device.

        Raises:
            ShapeError: The images have another shape or type, or are of a size that the network cannot take.
        """
        self._check(images)
        if len(images) == 0:
            return torch.zeros(0, len(self._outline.classes), device=self.device)
        images = images.to(self.device)
        if self._library is not None and self._library.takes(images):
            return self._library(images)
        steps = self._steps or self.steps
        if torch.is_autocast_enabled(self.device.type):
            # number formats were chosen when this was packed
            with torch.autocast(self.device.type, enabled=False):
                return steps(images)
        return steps(images)

    def _check(self, images: object) -> None:
        channels = self._outline.input.channels
        if not isinstance(images, Tensor):
            raise ShapeError(f"images are a {type(images).__name__}: expected a tensor: torch.from_numpy makes one of an array")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ShapeError(f"images are {images.dtype}: expected uint8, or normalised floats: convert them")
        axis = 3 if images.dtype == torch.uint8 else 1
        if images.ndim != 4 or images.shape[axis] != channels:
            raise ShapeError(
                f"{images.dtype} images have shape {tuple(images.shape)}: expected N x {channels} x H x W "
                f"(or uint8, N x H x W x {channels})"
            )
        rows, columns = images.shape[1:3] if axis == 3 else images.shape[2:]
        if (rows, columns) not in self._sizes:
            self._check_size(max(len(images), 1), rows, columns)

    def _check_size(self, count: int, rows: int, columns: int) -> None:
        """Refuse images of a size that the steps cannot take."""
        of = self._outline.input
        if not self._outline.any_size and (rows, columns) != (of.height, of.width):
            raise ShapeError(
                f"images are {rows}x{columns}, but '{self._outline.name}' computes from their size how it pads or pools, "
                f"and was packed for {of.height}x{of.width}: resize them, or pack the network adapted to that size"
            )
        try:
            shapes(self._outline, count, rows, columns)
        except DeployError as error:
            raise ShapeError(str(error)) from error
        # a server meets few sizes; whoever sends many has them checked again
        if len(self._sizes) < _MOST_SIZES:
            self._sizes.add((rows, columns))

    def describe(self) -> str:
        """What was chosen and why, in lines: number format, packs of every kernel, what is evaluated when it is read."""
        lines = [f"{self._outline.name} on {self._where()}: {self._reason}; {self.nbytes:,} bytes held"]
        if self._library is not None:
            network = self._library.network
            size = "x".join(map(str, network.input_shape))
            lines.append(f"uint8 images of {size} in compiled C ({network.path}), others in PyTorch")
        return "\n".join(lines + (self._steps.describe() if self._steps else []))

    def _where(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def __repr__(self) -> str:
        return f"<Packed {self._outline.name}: {self._reason}, {self.nbytes:,} bytes>"


def pack(
    network: Classifier | Program,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    device: str | None = None,
    engine: Engine = "pytorch",
    winograd: Winograd | None = None,
) -> Packed:
    """Make a network ready to serve: kernels packed once, for all layers that read them.

    Scales, shifts and ReLUs are done in the convolutions' store; no kernel is ever scaled, so that one pack does for all
    layers. What is packed is a copy: the network may be trained further or thrown away.

    Args:
        network: The network, or a program without loops.
        dtype: Number format of activations and of the kernels of convolutions. In PyTorch `bfloat16` halves the time where the
            device has units for it; where it has none, float32 is used and `describe()` says so. In C `bfloat16` halves
            the kernels as they are stored, those of linear layers too, on every processor; it takes no less time. `auto` is the
            faster one.
        device: `cpu` or `cuda`; None is the GPU where there is one.
        engine: `pytorch`: oneDNN through PyTorch, ready in milliseconds. `c`: C that computes in float32, compiled now, which
            takes seconds and a C compiler, for uint8 images of the network's size; others go through PyTorch. `auto`: the
            faster of both, in a short trial on one image; PyTorch where C cannot be had.
        winograd: Of C. None is `file`: 3x3 kernels stand transformed in its library, four times as large, mapped from its
            file; `init`: they are transformed at the start, in private memory; `off`: as they are stored, in a third of the
            memory, and up to three times slower.

    Returns:
        The callable.

    Raises:
        ConfigError: No such dtype, device, engine or way of Winograd's convolution, or one that does not go with another.
        DeployError: The network cannot be lowered, the program has loops, or C was asked for and there is no compiler.

    Example:
        >>> import dacnn, torch
        >>> packed = dacnn.pack(dacnn.create("dacnn14", width=16).eval())
        >>> packed(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"engine is '{engine}': expected pytorch, c or auto")
    place = _device(device)
    if engine == "c" and place.type != "cpu":
        raise ConfigError(f"engine is 'c', but device is '{place.type}': expected 'cpu'")
    if winograd not in (None, *get_args(Winograd)):
        raise ConfigError(f"winograd is '{winograd}': expected init, file or off")
    if winograd is not None and engine == "pytorch":
        raise ConfigError(f"winograd is '{winograd}', but engine is 'pytorch', which has none: use 'c' or 'auto'")
    chosen, reason = _format(dtype, place)
    program = network if isinstance(network, Program) else lower(network)
    # in the file, transformed kernels are mapped: forked processes share them, and they are no private memory
    kernels = winograd or "file"
    # nothing is faster there than float32
    in_c: FloatDtype = "bfloat16" if dtype == "bfloat16" else "float32"
    if engine == "c":
        return _in_c(program, kernels, in_c)
    packed = Packed(program, place, chosen, reason)
    return _faster(packed, program, kernels, in_c) if engine == "auto" and place.type == "cpu" else packed


def _give_back_freed_memory() -> None:
    """Ask the C library for it, where it can: it would keep what packing needed for a moment, which is more than what stays."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _in_c(program: Program, winograd: Winograd, dtype: FloatDtype) -> Packed:
    """Compiled C, whose kernels may be of bfloat16."""
    reason = "kernels in bfloat16, all else in float32" if dtype == "bfloat16" else dtype
    return Packed(program, torch.device("cpu"), _FORMATS[dtype], reason, compiled(program, winograd, dtype))


def _faster(packed: Packed, program: Program, winograd: Winograd, dtype: FloatDtype) -> Packed:
    """What is packed already, or compiled C where that takes less time for an image."""
    try:
        in_c = _in_c(program, winograd, dtype)
    except (DeployError, ArtefactError, OSError):
        # no compiler, or one for another processor, or no folder from which a library may be loaded
        return packed
    of = program.input
    image = torch.zeros(1, of.height, of.width, of.channels, dtype=torch.uint8)
    return min(
        zip(seconds_of(lambda: in_c(image), lambda: packed(image)), (in_c, packed), strict=True), key=lambda pair: pair[0]
    )[1]


def _device(device: str | None) -> torch.device:
    try:
        place = torch.device(device or best_device())
    except RuntimeError:
        raise ConfigError(f"device is '{device}': expected 'cpu' or 'cuda'") from None
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is '{device}': expected 'cpu' or 'cuda'")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is '{device}', but PyTorch finds no GPU here: use 'cpu'")
    return place


def _format(dtype: str, place: torch.device) -> tuple[torch.dtype, str]:
    """The number format, and in words why."""
    if dtype not in ("auto", *_FORMATS):
        raise ConfigError(f"dtype is '{dtype}': expected auto, float32 or bfloat16")
    units = has_bfloat16_units(place.type)
    what = "GPU" if place.type == "cuda" else "CPU"
    if dtype == "bfloat16" and not units:
        return torch.float32, f"bfloat16 asked for, but this {what} has no units for it: float32"
    if dtype == "auto":
        return (torch.bfloat16, f"bfloat16, for which this {what} has units") if units else (torch.float32, "float32")
    return _FORMATS[dtype], dtype

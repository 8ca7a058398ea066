"""`pack`: a network as a PyTorch callable for servers, each kernel packed once and read by all its layers."""

import ctypes
import dataclasses
import sys
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dacnn.deploy.fusion import Stored, tasks
from dacnn.deploy.lower import lower
from dacnn.deploy.packing import onednn
from dacnn.deploy.packing.arithmetic import Held, call_of
from dacnn.deploy.packing.cuda_graphs import Graphs
from dacnn.deploy.program import IMAGES, Convolve, KernelStep, Program, StoredKernel, references
from dacnn.deploy.shapes import shapes
from dacnn.errors import ConfigError, DeployError, ShapeError
from dacnn.networks.classifier import Classifier
from dacnn.training.precision import best_device, cpu_name, has_bfloat16_units

# N images, C channels, H rows, W columns, K classes

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# sizes of images that are known to go through
_MOST_SIZES = 256


class Packed:
    """A network ready to serve. Many threads may call it at once; it changes nothing that they can see.

    Attributes:
        device: Where it runs.
        dtype: Number format of activations and kernels; sums, the linear layers and the logits are float32.
    """

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype, reason: str) -> None:
        """Pack a program; `pack` chooses the arguments."""
        self.device = device
        self.dtype = dtype
        self._reason = reason
        self._tasks = tasks(program)
        self._held = _hold(program, device, dtype)
        made = [call_of(task, self._held, program.tensors, program.input) for task in self._tasks]
        self._calls = [
            (call, task.values, task.spent, task.step.out) for (call, _), task in zip(made, self._tasks, strict=True)
        ]
        self._terms_bytes = sum(one.nbytes for _, own in made for one in own)
        self._outline = _outline(program)
        self._sizes: set[tuple[int, int]] = set()
        self._graphs = Graphs(self._run) if device.type == "cuda" else None
        of = program.input
        known = onednn.layouts_known()
        self._pack_for((1, of.height, of.width, of.channels))
        if onednn.layouts_known() != known:
            # the first of its architecture: the code is generated that the first images would wait for
            self(torch.zeros(1, of.height, of.width, of.channels, dtype=torch.uint8))
        _give_back_freed_memory()

    def _pack_for(self, images: tuple[int, int, int, int]) -> None:
        """Pack every kernel as images, N x H x W x C, want it: before there are activations, between which packs would lie."""
        found = shapes(self._outline, *images[:3])
        for step in self._outline.operations():
            if isinstance(step, Convolve) and isinstance(step.kernel.tensor, str) and step.kernel.tensor in self._held.packed:
                slide = onednn.slide_of(step)
                self._held.packed[step.kernel.tensor].read(slide.geometry, slide.padded(found[step.x]))

    @property
    def nbytes(self) -> int:
        """Bytes of the packs, of kernels that are not packed, and of scales and shifts."""
        kernels = sum(kernel.nbytes for kernel in self._held.packed.values())
        return kernels + sum(one.nbytes for one in self._held.plain.values()) + self._terms_bytes

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
        if torch.is_autocast_enabled(self.device.type):
            # number formats were chosen when this was packed
            with torch.autocast(self.device.type, enabled=False):
                return self._serve(images)
        return self._serve(images)

    @torch.no_grad()
    def _serve(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        return self._run(images) if self._graphs is None else self._graphs(images)

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
        try:
            shapes(self._outline, count, rows, columns)
        except DeployError as error:
            raise ShapeError(str(error)) from error
        # a server meets few sizes; whoever sends many has them checked again
        if len(self._sizes) < _MOST_SIZES:
            self._sizes.add((rows, columns))

    def _run(self, images: Tensor) -> Tensor:
        values = {IMAGES: images}
        for call, taken, spent, out in self._calls:
            given = [values[name] for name in taken]
            for name in spent:
                del values[name]
            values[out] = call(*given)
            # or it would outlive the next step
            del given
        return values[self._outline.result].float()

    def describe(self) -> str:
        """What was chosen and why, in lines: number format, packs of every kernel, what is evaluated when it is read."""
        fused = sum(isinstance(task.step, Stored) for task in self._tasks)
        lines = [
            f"{self._outline.name} on {self._where()}: {self._reason}; {self.nbytes:,} bytes held",
            f"{len(self._tasks)} steps, {fused} of them with scale, shift and ReLU done while values are stored",
        ]
        lines += [kernel.describe() for kernel in self._held.packed.values()]
        for name, one in self._held.plain.items():
            lines.append(f"{name} {'x'.join(map(str, one.shape))}: as stored, {one.nbytes:,} bytes")
        return "\n".join(lines)

    def _where(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else cpu_name()

    def __repr__(self) -> str:
        return f"<Packed {self._outline.name}: {self._reason}, {self.nbytes:,} bytes>"


def pack(
    network: Classifier | Program, *, dtype: Literal["auto", "float32", "bfloat16"] = "float32", device: str | None = None
) -> Packed:
    """Make a network ready to serve: kernels packed once, for all layers that read them.

    Scales, shifts and ReLUs are done in the convolutions' store; no kernel is ever scaled, so that one pack does for all
    layers. What is packed is a copy: the network may be trained further or thrown away.

    Args:
        network: The network, or a program without loops.
        dtype: Number format of activations and of the kernels of convolutions. `bfloat16` halves the time where the device has
            units for it; where it has none, float32 is used and `describe()` says so. `auto` is the faster of the two.
        device: `cpu` or `cuda`; None is the GPU where there is one.

    Returns:
        The callable.

    Raises:
        ConfigError: No such dtype or device.
        DeployError: The network cannot be lowered, or the program has loops.

    Example:
        >>> import dacnn, torch
        >>> packed = dacnn.pack(dacnn.create("dacnn14", width=16).eval())
        >>> packed(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """
    place = _device(device)
    chosen, reason = _format(dtype, place)
    program = network if isinstance(network, Program) else lower(network)
    return Packed(program, place, chosen, reason)


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


def _outline(program: Program) -> Program:
    """The program with tensors that have their shapes and take no memory."""
    empty = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in program.tensors.items()}
    return dataclasses.replace(program, tensors=empty)


def _give_back_freed_memory() -> None:
    """Ask the C library for it, where it can: it would keep what packing needed for a moment, which is more than what stays."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _hold(program: Program, device: torch.device, dtype: torch.dtype) -> Held:
    """The kernels, once each: packed where convolutions alone read them as they are stored."""
    readers: dict[str, list[KernelStep]] = {}
    own: list[str] = []
    for step in program.operations():
        if isinstance(step, KernelStep):
            tensor, *others = (name for name in references(step) if isinstance(name, str))
            readers.setdefault(tensor, []).append(step)
            own += others
    packed: dict[str, onednn.PackedKernel] = {}
    plain: dict[str, Tensor] = {}
    for name, steps in readers.items():
        stored = torch.from_numpy(program.tensors[name])
        convolved = all(isinstance(step, Convolve) and isinstance(step.kernel, StoredKernel) for step in steps)
        if convolved and device.type == "cpu" and onednn.is_available():
            packed[name] = onednn.PackedKernel(name, stored.to(dtype))
        elif convolved:
            plain[name] = stored.to(device, dtype, copy=True, memory_format=torch.channels_last)
        else:
            plain[name] = stored.to(device, copy=True)
    plain |= {name: torch.from_numpy(program.tensors[name]).to(device, copy=True) for name in own}
    return Held(device, dtype, packed, plain)

"""The steps of a Program in PyTorch, one after the other, on kernels that are held once."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dacnn.deploy.fusion import Stored, Task, tasks
from dacnn.deploy.packing import fused, onednn
from dacnn.deploy.packing.arithmetic import Call, Held, call_of
from dacnn.deploy.packing.chains import Chain, Convolution, MaxPooling, is_interpreted
from dacnn.deploy.packing.cuda_graphs import Graphs
from dacnn.deploy.program import IMAGES, Convolve, KernelStep, Program, StoredKernel, references
from dacnn.deploy.shapes import shapes

# N images, C channels, H rows, W columns, K classes


class Steps:
    """A program on kernels packed once.

    Attributes:
        held: The kernels.
    """

    def __init__(self, program: Program, device: torch.device, dtype: torch.dtype) -> None:
        """Pack a flat program.

        Args:
            program: The program.
            device: Where it runs.
            dtype: Number format of activations and of the kernels of convolutions.

        Raises:
            DeployError: The program has loops.
        """
        self._tasks = tasks(program, pools=fused.is_available(device))
        self.held = _hold(program, device, dtype)
        made = [call_of(task, self.held, program.tensors, program.input) for task in self._tasks]
        self._calls = _chained(self._tasks, [call for call, _ in made])
        self._terms_bytes = sum(one.nbytes for _, own in made for one in own)
        self._outline = outline(program)
        self._graphs = Graphs(self._run) if device.type == "cuda" else None
        of = program.input
        known = onednn.layouts_known()
        self._pack_for((1, of.height, of.width, of.channels))
        if onednn.layouts_known() != known:
            # the first of its architecture: the code is generated that the first images would wait for
            self(torch.zeros(1, of.height, of.width, of.channels, dtype=torch.uint8, device=device))

    def _pack_for(self, images: tuple[int, int, int, int]) -> None:
        """Pack every kernel as images, N x H x W x C, want it: before there are activations, between which packs would lie."""
        found = shapes(self._outline, *images[:3])
        for call, values, *_ in self._calls:
            if isinstance(call, Chain):
                call.prepare(torch.Size(found[values[0]]))

    @property
    def nbytes(self) -> int:
        """Bytes of the packs, of kernels that are not packed, and of scales and shifts."""
        kernels = sum(kernel.nbytes for kernel in self.held.packed.values())
        return kernels + sum(one.nbytes for one in self.held.plain.values()) + self._terms_bytes

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Run the steps.

        Args:
            images: Those of the device: uint8 N x H x W x C, or normalised floats N x C x H x W.

        Returns:
            Logits, float32, N x K.
        """
        if self._graphs is None:
            return self._run(images)
        # what is recorded in inference mode could not be written to outside of it
        with torch.inference_mode(False), torch.no_grad():
            return self._graphs(images)

    def _run(self, images: Tensor) -> Tensor:
        values = {IMAGES: images}
        for call, taken, spent, out in self._calls:
            given = [values[name] for name in taken]
            for name in spent:
                del values[name]
            values[out] = call.taking(given) if isinstance(call, Chain) else call(*given)
            # or it would outlive the next step
            del given
        return values[self._outline.result].float()

    def describe(self) -> list[str]:
        """Lines: how many steps there are, packs of every kernel, what is evaluated when it is read."""
        joined = sum(isinstance(task.step, Stored) for task in self._tasks)
        lines = [f"{len(self._tasks)} steps, {joined} of them with scale, shift and ReLU done while values are stored"]
        if self._graphs and not self.held.fused:
            lines.append(
                "scale, shift and ReLU are steps of their own, since nothing can be compiled for this GPU: that takes longer"
            )
        if not is_interpreted():
            lines.append("called one by one, since this PyTorch has no TorchScript: that takes longer")
        lines += [kernel.describe() for kernel in self.held.packed.values()]
        for name, one in self.held.plain.items():
            lines.append(f"{name} {'x'.join(map(str, one.shape))}: as stored, {one.nbytes:,} bytes")
        return lines


def _chained(
    tasks: Sequence[Task], made: Sequence[Call | Convolution]
) -> list[tuple[Call | Chain, tuple[str, ...], tuple[str, ...], str]]:
    """Calls, neighbours joined that can be; each with the values that it takes, those that are spent, and what it gives."""
    calls: list[tuple[Call | Chain, tuple[str, ...], tuple[str, ...], str]] = []
    begin = 0
    while begin < len(tasks):
        end = begin + 1
        call: Call | Chain
        first = made[begin]
        if isinstance(first, Convolution):
            links: list[Convolution | MaxPooling] = [first]
            while end < len(tasks) and isinstance(link := made[end], Convolution | MaxPooling):
                if tasks[end].values != tasks[end].spent or tasks[end].values != (tasks[end - 1].step.out,):
                    break
                links.append(link)
                end += 1
            call = Chain(links)
        else:
            call = first
        calls.append((call, tasks[begin].values, tasks[begin].spent, tasks[end - 1].step.out))
        begin = end
    return calls


def outline(program: Program) -> Program:
    """The program with tensors that have their shapes and take no memory.

    Args:
        program: Any program.

    Returns:
        A copy that tells sizes.
    """
    empty = {name: np.broadcast_to(np.float32(0), tensor.shape) for name, tensor in program.tensors.items()}
    return dataclasses.replace(program, tensors=empty)


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
    return Held(device, dtype, fused.is_available(device), packed, plain)

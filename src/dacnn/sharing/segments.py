"""Segments of a network that run again for the gradient, so that only what goes into them is kept.

The graph is that of the first run: the second run only fills in the tensors that the first one saved. So gradients are added
up in the order of the plain loop and hooks on parameters fire once, as several processes need it; a second graph inside
the first one would do neither. Outputs, gradients and buffers are those of a plain run, bit for bit.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174. Deviations: buffers as they were before
the first run; within a segment outputs of norms and ReLUs are kept as recipes (`dacnn.sharing.remake`).
"""

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dacnn.errors import TrainingError
from dacnn.sharing.keeping import Keeper, Kept, Whole, current_keeper, keeping
from dacnn.sharing.winograd import by_winograd, is_by_winograd

_Modules = Sequence[nn.Module]
_Places = list[tuple[nn.Module, str, Tensor]]


# below this a segment is not worth the millisecond that a trim takes
_WORTH_A_TRIM_BYTES = 2**20


def _heap_trimmer() -> Callable[[int], int]:
    """The C library's way to give freed memory back to the system; does nothing where it has none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda padding: 0
    return trim


_trim_heap = _heap_trimmer()


def _give_back(device: torch.device, size_bytes: int) -> None:
    """Give the system what a run has freed.

    glibc finds it hard to use freed activations of less than 32 MiB again: a step of 200 layers then had three times the
    resident memory that its tensors took at their peak.
    """
    if device.type == "cpu" and size_bytes >= _WORTH_A_TRIM_BYTES:
        _trim_heap(0)


class _Enough(Exception):
    """All that the first run saved is there."""


class _Saved:
    """One of the tensors that a segment saved, by its number."""

    def __init__(self, segment: "_Segment", index: int) -> None:
        self.segment, self.index = segment, index

    def tensor(self) -> Tensor:
        return self.segment.take(self.index)


def _is_stored(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter, or a view of one."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)


class _FirstRun(Keeper):
    """Counts what is saved, and keeps none of it."""

    def __init__(self, segment: "_Segment", remakes: bool) -> None:
        super().__init__(remakes)
        self.segment = segment

    def remember(self, output: Tensor, recipe: Kept) -> None:
        # what follows the segment would otherwise need a second run of it to begin
        pass

    def pack(self, tensor: Tensor) -> Kept:
        if _is_stored(tensor):
            # is there anyway, and must not change before the gradient is taken
            return Whole(tensor)
        self.segment.shapes.append(tensor.shape)
        return _Saved(self.segment, len(self.segment.shapes) - 1)


class _SecondRun(Keeper):
    """Keeps what is saved where the first run's graph finds it."""

    def __init__(self, segment: "_Segment") -> None:
        super().__init__(segment.remakes)
        self.segment = segment
        self.count = 0

    def pack(self, tensor: Tensor) -> Kept:
        kept = self.keep(tensor)
        if _is_stored(tensor):
            return kept
        shapes = self.segment.shapes
        if shapes[self.count] != tensor.shape:
            raise TrainingError(
                f"a segment saved a tensor of shape {tuple(shapes[self.count])}, and {tuple(tensor.shape)} in its place when "
                "it ran again for the gradient: recompute only what does the same in both runs"
            )
        self.segment.kept[self.count] = kept
        self.count += 1
        if self.count == len(shapes):
            raise _Enough
        return kept


class _Segment:
    """What it takes to run a segment again, and what it saved while the gradient needs it."""

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, modules: _Modules) -> None:
        outer = current_keeper()
        self.remakes = outer is not None and outer.remakes
        self.function = function
        self.input: Kept = outer.pack(x) if outer else Whole(x)
        # a parameter shall be one in the second run, too
        self.stored = x if _is_stored(x) else None
        self.requires_grad = x.requires_grad
        self.surroundings = _Surroundings(x.device, modules)
        self.shapes: list[torch.Size] = []
        self.kept: dict[int, Kept] = {}

    def take(self, index: int) -> Tensor:
        """Hand out a tensor, and keep it no longer; who asks twice, as with `retain_graph`, has the segment run again."""
        if index not in self.kept:
            self._run_again()
        return self.kept.pop(index).tensor()

    def _run_again(self) -> None:
        x = self.input.tensor()
        x = x.detach().requires_grad_(self.requires_grad) if self.stored is None else self.stored
        _give_back(x.device, x.nbytes)
        run = _SecondRun(self)
        with self.surroundings.restored(), torch.enable_grad(), keeping(run), contextlib.suppress(_Enough):
            self.function(x)
        if run.count < len(self.shapes):
            raise TrainingError(
                f"a segment saved {len(self.shapes)} tensors, and {run.count} when it ran again for the gradient: "
                "recompute only what does the same in both runs"
            )


class _Surroundings:
    """What a run depends on beside its input and parameters: autocast, how it convolves, generators, buffers."""

    def __init__(self, device: torch.device, modules: _Modules) -> None:
        self.device = device
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in {device.type, "cpu"}
        ]
        self.autocast_caches = torch.is_autocast_cache_enabled()
        self.by_winograd = is_by_winograd()
        self.generator = torch.get_rng_state()
        self.device_generator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        # by module and name, for a wrapper for several processes may put other tensors in the places of buffers
        self.buffers = _cloned(_buffers(modules))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within this context all is as it was, and what changes is forgotten behind it."""
        with contextlib.ExitStack() as stack:
            for kind, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self.autocast_caches))
            stack.enter_context(by_winograd(self.by_winograd))
            stack.enter_context(torch.random.fork_rng([self.device] if self.device_generator is not None else []))
            torch.set_rng_state(self.generator)
            if self.device_generator is not None:
                torch.cuda.set_rng_state(self.device_generator, self.device)
            # clones of the clones, for there may be a third run
            stack.enter_context(_replaced(_cloned(self.buffers)))
            yield


def _buffers(modules: _Modules) -> _Places:
    """Where the buffers of some modules stand, with what stands there."""
    inner = {id(module): module for outer in modules for module in outer.modules()}.values()
    return [(module, name, buffer) for module in inner for name, buffer in module._buffers.items() if buffer is not None]


@torch.no_grad()
def _cloned(places: _Places) -> _Places:
    """The same places with clones; one clone of a buffer that stands in several."""
    clones = {id(buffer): buffer.clone() for _, _, buffer in places}
    return [(module, name, clones[id(buffer)]) for module, name, buffer in places]


@contextlib.contextmanager
def _replaced(places: _Places) -> Iterator[None]:
    """Within this context other buffers stand in some places."""
    before = [module._buffers[name] for module, name, _ in places]
    try:
        for module, name, buffer in places:
            module._buffers[name] = buffer
        yield
    finally:
        for (module, name, _), original in zip(places, before, strict=True):
            module._buffers[name] = original


def made_again(function: Callable[[Tensor], Tensor], x: Tensor, modules: Sequence[nn.Module] = ()) -> Tensor:
    """Run a segment of which only the input is kept; it runs again when a gradient needs what is in it.

    Without gradients, and while a compiler looks on, it is just run. Hooks on its modules see both runs.

    Args:
        function: The segment. Called a second time with the same values, buffers, random numbers and autocast, it does the
            same; it changes nothing but buffers of `modules`.
        x: What goes into it.
        modules: Whose buffers the function reads and writes, such as running statistics.

    Returns:
        `function(x)`.

    Raises:
        TrainingError: When the gradient is taken: the second run did something else, or a parameter or the input has
            changed in between.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return function(x)
    segment = _Segment(function, x, modules)
    with keeping(_FirstRun(segment, segment.remakes)):
        y = function(x)
    _give_back(x.device, x.nbytes)
    return y

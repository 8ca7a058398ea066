"""CUDA graphs: what a GPU does for images of one shape, recorded once and replayed without asking Python."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# images of further shapes are run step by step: every graph keeps its activations
_MOST_GRAPHS = 16
_WARMUPS = 3


@dataclass(frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    images: Tensor
    result: Tensor


class Graphs:
    """A function of images on a GPU, replayed from a graph for each shape and type of images that it has met.

    Replays of all threads go one behind the other through one stream, since a graph has one place for what it takes and gives.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        """Record nothing yet.

        Args:
            run: What is done, on the current stream, without waiting for the GPU.
        """
        self._run = run
        self._recorded: dict[tuple[torch.Size, torch.dtype], _Recorded] = {}
        self._lock = threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Run it.

        Args:
            images: On the GPU; left as they are.

        Returns:
            What the function gives for them, the caller's own.
        """
        with self._lock:
            if self._stream is None:
                self._stream = torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
            stream, current = self._stream, torch.cuda.current_stream(images.device)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                result = self._on_own_stream(images)
            images.record_stream(stream)
            current.wait_stream(stream)
            result.record_stream(current)
            return result

    def _on_own_stream(self, images: Tensor) -> Tensor:
        key = images.shape, images.dtype
        if key not in self._recorded:
            if len(self._recorded) >= _MOST_GRAPHS:
                return self._run(images)
            self._recorded[key] = self._record(images)
        recorded = self._recorded[key]
        recorded.images.copy_(images)
        recorded.graph.replay()
        return recorded.result.clone()

    def _record(self, images: Tensor) -> _Recorded:
        taken = images.clone()
        # libraries choose their algorithms and take their memory before anything is recorded
        for _ in range(_WARMUPS):
            self._run(taken)
        graph = torch.cuda.CUDAGraph()
        # other threads may use the GPU meanwhile
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            result = self._run(taken)
        return _Recorded(graph, taken, result)

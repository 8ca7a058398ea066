"""A process of its own for one contender: it loads, tells the memory that this added, and runs batches when it is asked to.

Talk goes over a connection whose number stands in the arguments: a JSON object in, `call` the name of what to do, and one
back. Where the other side has gone, the process ends.
"""

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dacnn.bench.contenders import Artefact, Loaded
from dacnn.errors import ArtefactError
from dacnn.measure.memory_added import give_back_memory, read_memory_bytes

# N images, C channels, H rows, W columns


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _anonymous_bytes() -> int | None:
    """Private memory of this process that belongs to no file; None where the system does not tell."""
    gc.collect()
    try:
        return read_memory_bytes()["Anonymous"]
    except ArtefactError:
        return None


class Worker:
    """What a worker is asked to do."""

    def __init__(self) -> None:
        """Wait for a back end to load."""
        self.loaded = Loaded(lambda images: images)
        self.images: NDArray[Any] = np.zeros(0)

    def write(self, write: str, weights: str, into: str | None, folder: str, tiny: str, largest_batch: int) -> dict[str, Any]:
        """Write the artefact of a network, and that of a tiny one."""
        from dacnn.bench.tiny import tiny_network
        from dacnn.checkpoint import load

        for network, place in ((load(weights, into), folder), (tiny_network(), tiny)):
            # a converter that fails must not leave half of something behind
            Path(place).mkdir()
            _function(write)(network, Path(place), largest_batch)
        return {}

    def load(
        self, load: str, folder: str, tiny: str | None, into: str | None, threads: int, images: str, tiny_images: str
    ) -> dict[str, Any]:
        """Load an artefact and run it once; the runtime has loaded and run something tiny before, which is not counted."""
        loader = _function(load)
        if tiny is not None:
            first: Loaded = loader(Artefact(Path(tiny), threads))
            first.run(first.prepare(np.load(tiny_images)))
            del first
        # mapped, so that they are no private memory
        self.images = np.load(images, mmap_mode="r")
        before = _anonymous_bytes()
        self.loaded = loader(Artefact(Path(folder), threads, into))
        self.loaded.run(self._batch(0, 1))
        after = _anonymous_bytes()
        return {"memory_bytes": None if before is None or after is None else after - before}

    def settle(self) -> dict[str, Any]:
        """Give back what is not in use, so that nothing is seen there."""
        give_back_memory()
        return {}

    def classify(self, out: str, batch: int) -> dict[str, Any]:
        """Write the logits of all images into a file."""
        starts = range(0, len(self.images), batch)
        logits = [np.array(self.loaded.run(self._batch(start, batch)), np.float64) for start in starts]
        np.save(out, np.concatenate(logits))
        return {}

    def time(self, batch: int, times: int, warm_ups: int) -> dict[str, Any]:
        """Run a batch over and over: the seconds of each run behind the first ones."""
        prepared = self._batch(0, batch)
        seconds = []
        gc.disable()
        for _ in range(warm_ups + times):
            start = time.perf_counter()
            self.loaded.run(prepared)
            seconds.append(time.perf_counter() - start)
        gc.enable()
        return {"seconds": seconds[warm_ups:]}

    def _batch(self, start: int, size: int) -> Any:
        """Images from `start` on, as many as there are, or, where the batch begins with the first, as often as it takes."""
        if start == 0 and size > len(self.images):
            return self.loaded.prepare(np.array(np.resize(self.images, (size, *self.images.shape[1:]))))
        return self.loaded.prepare(np.array(self.images[start : start + size]))


def main(connection: Connection) -> None:
    """Answer until the other side has gone.

    Args:
        connection: To who asks.
    """
    worker = Worker()
    calls: dict[str, Callable[..., dict[str, Any]]]
    calls = {
        "write": worker.write,
        "load": worker.load,
        "classify": worker.classify,
        "time": worker.time,
        "settle": worker.settle,
    }
    while True:
        try:
            message = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            answer = calls[message.pop("call")](**message)
        except Exception as error:  # a runtime may raise anything; it is told, and this process goes on
            lines = str(error).strip().splitlines()
            answer = {"error": f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__}
        connection.send_bytes(json.dumps(answer).encode())


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))

"""The bench: all contenders run in turn, each in a process of its own."""

import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from dacnn.bench import peak
from dacnn.bench.preparing import TIMEOUT_SECONDS, Bar, Preparation, Runner, no_bar, runs_of_a_turn
from dacnn.bench.results import Bench, Latency, Row
from dacnn.bench.settings import Settings
from dacnn.errors import ArtefactError
from dacnn.measure.count import count
from dacnn.measure.process import held_by
from dacnn.measure.stored import StoredArray
from dacnn.networks.classifier import Classifier
from dacnn.networks.network import Network
from dacnn.training.precision import cpu_name

# N images, H rows, W columns, C channels

# runs of a turn that are not counted
_WARM_UPS = 1

_Some = TypeVar("_Some")


def run_bench(network: Classifier, images_nhwc: Tensor, source: str, settings: Settings, bar: Bar = no_bar) -> Bench:
    """Measure every contender with a network and with its unshared twin.

    Args:
        network: The network, on the CPU.
        images_nhwc: What it classifies, uint8, shape (N, H, W, C).
        source: Where the images are from, in words.
        settings: How.
        bar: Shows how far something is.

    Returns:
        The measurements; a contender that is missing or fails has a row that says why.

    Raises:
        CheckpointError: There is no room for the artefacts.
    """
    with tempfile.TemporaryDirectory(prefix="dacnn-bench-") as folder, ExitStack() as children:
        preparation = Preparation(network, images_nhwc, settings, Path(folder), children)
        runners = preparation.run(bar)
        peak_macs_per_second = _take_turns(preparation, runners, bar)
        _count_copies(network, preparation, runners, bar)
    macs = count(network).macs
    return Bench(
        network=network.plan.name if isinstance(network, Network) else type(getattr(network, "module", network)).__name__,
        macs=macs,
        cpu=cpu_name(),
        threads=settings.threads,
        rounds=settings.rounds,
        batches=settings.batches,
        images=len(images_nhwc),
        source=source,
        peak_macs_per_second=peak_macs_per_second,
        twin=preparation.no_twin,
        rows=tuple(_finished(runner, macs, peak_macs_per_second) for runner in runners),
    )


def _finished(runner: Runner, macs: int, peak_macs_per_second: float) -> Row:
    if runner.row.failure is not None:
        return runner.row
    latencies = [Latency.of(batch, rounds, macs, peak_macs_per_second) for batch, rounds in runner.seconds.items()]
    return replace(runner.row, latencies=tuple(latencies))


def _take_turns(preparation: Preparation, runners: Sequence[Runner], bar: Bar) -> float:
    """Time all contenders in turn, and the peak among them.

    Returns:
        The peak, in multiply-adds a second.
    """
    top = preparation.start("peak")
    # it writes nothing, and has nothing to load
    preparation.load(top, f"{peak.__name__}:load", preparation.folder, None, "float")
    batch = peak.IMAGES_PER_THREAD * preparation.settings.threads
    runs = runs_of_a_turn(top, batch)
    seconds: list[float] = []
    rounds = preparation.settings.rounds
    with bar("rounds") as tick:
        for number in range(rounds):
            seconds += top.ask("time", TIMEOUT_SECONDS, batch=batch, times=runs, warm_ups=_WARM_UPS)["seconds"]
            running = [runner for runner in runners if runner.child is not None]
            for index, runner in enumerate(in_turn(running, number)):
                tick(number * len(running) + index, rounds * len(running))
                _take_turn(runner)
    return batch * peak.MACS_PER_IMAGE / statistics.median(seconds)


def _count_copies(network: Classifier, preparation: Preparation, runners: Sequence[Runner], bar: Bar) -> None:
    """Look for the kernel that most layers read in the memory of every contender, now that none is timed any more."""
    if network.owner is None:
        return
    readers = network.owner.readers()
    name = max(readers, key=lambda kernel: len(readers[kernel]))
    values = network.owner[name].detach().float().numpy()
    kernel = StoredArray((name,), "parameter", values, "float32", values.nbytes)
    running = [runner for runner in runners if runner.child is not None]
    with bar("copies in memory") as tick:
        for done, runner in enumerate(running):
            tick(done, len(running))
            assert runner.child is not None
            # where memory cannot be read, there is no such figure
            with contextlib.suppress(ArtefactError):
                runner.child.ask("settle", TIMEOUT_SECONDS)
                for held in held_by(runner.child.process.pid, [kernel], preparation.files(runner.row)):
                    runner.row = replace(runner.row, kernel_copies=held.count or None)


def in_turn(runners: Sequence[_Some], number: int) -> Sequence[_Some]:
    """The order of a round: forth in one, back in the next, so that none always runs behind the same other one.

    Args:
        runners: Who runs.
        number: Number of the round.

    Returns:
        All of them.
    """
    return runners if number % 2 == 0 else runners[::-1]


def _take_turn(runner: Runner) -> None:
    assert runner.child is not None
    try:
        for batch, runs in runner.runs.items():
            answer = runner.child.ask("time", TIMEOUT_SECONDS, batch=batch, times=runs, warm_ups=_WARM_UPS)
            runner.seconds[batch].append(answer["seconds"])
    except ArtefactError as error:
        runner.fail(error)

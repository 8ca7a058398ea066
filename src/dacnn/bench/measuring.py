"""The bench: write, load, compare, then let all contenders run in turn, each in a process of its own."""

import contextlib
import importlib.metadata
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from dacnn.bench import peak
from dacnn.bench.child import Child
from dacnn.bench.contenders import Contender, Side, chosen
from dacnn.bench.results import Bench, Latency, Row
from dacnn.bench.tiny import tiny_images
from dacnn.bench.twin import twin_of
from dacnn.checkpoint import save
from dacnn.deploy.parity import compare, reference_logits
from dacnn.errors import ArtefactError, ConfigError, PlanError
from dacnn.measure.count import count
from dacnn.networks.classifier import Classifier
from dacnn.networks.network import Network
from dacnn.training.precision import cpu_name

# N images, H rows, W columns, C channels

# what a turn of a contender should take at least, so that it is warm again
_TURN_SECONDS = 0.25
_LEAST_RUNS, _MOST_RUNS, _WARM_UPS = 3, 500, 1
# of anything that is asked of a contender; a compiler takes a minute
_TIMEOUT_SECONDS = 600.0

_Some = TypeVar("_Some")
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@contextlib.contextmanager
def no_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show nothing."""
    yield lambda done, total: None


@dataclass(frozen=True)
class Settings:
    """How the bench runs.

    Attributes:
        threads: Threads of each contender.
        batches: Batch sizes.
        rounds: How often each contender has its turn.
        only: Names of the contenders; none: all.
        into: FILE.py:factory of the layers, for a network of somebody else's.
    """

    threads: int = 1
    batches: tuple[int, ...] = (1, 32)
    rounds: int = 7
    only: tuple[str, ...] = ()
    into: str | None = None

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: One is less than 1, or there is no batch size.
            UnknownNameError: There is no contender of such a name.
        """
        for name in ("threads", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: expected 1 or more")
        if not self.batches or min(self.batches) < 1:
            raise ConfigError(f"--batch is {' '.join(map(str, self.batches)) or 'empty'}: expected sizes of 1 or more")
        chosen(self.only)


@dataclass
class _Runner:
    """A contender with one side, while the bench goes on."""

    row: Row
    child: Child | None = None
    runs: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, list[list[float]]] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        self.row = replace(self.row, failure=str(error))
        if self.child is not None:
            self.child.close()
            self.child = None


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
        bench = _Bench(network, images_nhwc, settings, Path(folder), children)
        runners = bench.prepare(bar)
        peak_macs_per_second = bench.take_turns(runners, bar)
    macs = bench.macs
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
        twin=bench.no_twin,
        rows=tuple(_finished(runner, macs, peak_macs_per_second) for runner in runners),
    )


def _finished(runner: _Runner, macs: int, peak_macs_per_second: float) -> Row:
    if runner.row.failure is not None:
        return runner.row
    latencies = [Latency.of(batch, rounds, macs, peak_macs_per_second) for batch, rounds in runner.seconds.items()]
    return replace(runner.row, latencies=tuple(latencies))


class _Bench:
    """The parts that are done once for all contenders, and where they stand."""

    def __init__(self, network: Classifier, images_nhwc: Tensor, settings: Settings, folder: Path, children: ExitStack) -> None:
        self.settings, self.folder, self.children = settings, folder, children
        self.macs = count(network).macs
        self.reference = reference_logits(network, images_nhwc)
        self.no_twin: str | None = None
        sides: dict[Side, Classifier] = {"shared": network}
        try:
            sides["twin"] = twin_of(network, settings.into)
        except PlanError as error:
            self.no_twin = str(error)
        for side, of in sides.items():
            save(of, folder / f"{side}.safetensors")
        self.sides = tuple(sides)
        images = {"uint8": images_nhwc.numpy(), "float": network.normalize(images_nhwc).contiguous().numpy()}
        for takes in ("uint8", "float"):
            np.save(folder / f"{takes}.npy", images[takes])
            np.save(folder / f"tiny-{takes}.npy", tiny_images(takes))
        # what was written, by the function that wrote it; or why it could not be
        self.written: dict[tuple[str, Side], Path | str] = {}
        self.writer: Child | None = None

    @property
    def largest_batch(self) -> int:
        return max(self.settings.batches)

    def prepare(self, bar: Bar) -> list[_Runner]:
        """Write, load and compare, one contender after the other."""
        runners = []
        for side in self.sides:
            for contender in chosen(self.settings.only):
                runner = _Runner(Row(contender, side))
                runners.append(runner)
                if missing := contender.missing():
                    runner.row = replace(runner.row, failure=missing)
                    continue
                runner.row = replace(runner.row, version=importlib.metadata.version(contender.package))
                try:
                    with bar(f"{contender.name}, {side}") as tick:
                        self._prepare(runner, tick)
                except (ArtefactError, ValueError) as error:
                    runner.fail(error)
        # nothing but the contenders shall be there when they are timed
        self._end_writer()
        return runners

    def _prepare(self, runner: _Runner, tick: Callable[[int, int], None]) -> None:
        contender, side = runner.row.contender, runner.row.side
        tick(0, 4)
        folder = self._write(contender, side)
        tick(1, 4)
        runner.child = self._start(f"{contender.name}-{side}")
        answer = self._load(runner.child, contender.load, folder, folder.with_suffix(".tiny"), contender.takes)
        tick(2, 4)
        file = self.folder / f"{contender.name}-{side}.npy"
        runner.child.ask("classify", _TIMEOUT_SECONDS, out=str(file), batch=self.largest_batch)
        logits = np.load(file)
        if logits.shape != self.reference.shape or not np.isfinite(logits).all():
            raise ArtefactError(f"gave {logits.shape} for logits: expected {self.reference.shape}, all of them finite")
        parity = compare(logits, self.reference)
        tick(3, 4)
        for batch in self.settings.batches:
            runner.runs[batch] = self._runs(runner.child, batch)
        runner.seconds = {batch: [] for batch in self.settings.batches}
        runner.row = replace(
            runner.row,
            file_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
            memory_bytes=answer["memory_bytes"],
            top1_agreement=parity.top1_agreement,
            max_error=parity.max_error,
        )

    def _start(self, name: str) -> Child:
        return self.children.enter_context(Child(self.settings.threads, self.folder / f"{name}.log"))

    def _write(self, contender: Contender, side: Side) -> Path:
        """The folder of an artefact; contenders that load the same one have it written once."""
        key = (contender.write, side)
        if key not in self.written:
            folder = self.folder / f"{contender.name}-{side}"
            try:
                # it takes seconds to start, so that it writes for all; where it fails, the next has a fresh one
                self.writer = self.writer or self._start("writer")
                self.writer.ask(
                    "write",
                    _TIMEOUT_SECONDS,
                    write=contender.write,
                    weights=str(self.folder / f"{side}.safetensors"),
                    into=self.settings.into,
                    folder=str(folder),
                    tiny=str(folder.with_suffix(".tiny")),
                    largest_batch=self.largest_batch,
                )
                self.written[key] = folder
            except ArtefactError as error:
                self.written[key] = str(error)
                self._end_writer()
        found = self.written[key]
        if isinstance(found, str):
            raise ArtefactError(f"cannot be written: {found}")
        return found

    def _end_writer(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def _load(self, child: Child, load: str, folder: Path, tiny: Path | None, takes: str) -> dict[str, Any]:
        return child.ask(
            "load",
            _TIMEOUT_SECONDS,
            load=load,
            folder=str(folder),
            tiny=None if tiny is None else str(tiny),
            into=self.settings.into,
            threads=self.settings.threads,
            images=str(self.folder / f"{takes}.npy"),
            tiny_images=str(self.folder / f"tiny-{takes}.npy"),
        )

    def _runs(self, child: Child, batch: int) -> int:
        """How often a batch is run in a turn."""
        first: float = child.ask("time", _TIMEOUT_SECONDS, batch=batch, times=1, warm_ups=1)["seconds"][0]
        return min(_MOST_RUNS, max(_LEAST_RUNS, math.ceil(_TURN_SECONDS / first)))

    def take_turns(self, runners: Sequence[_Runner], bar: Bar) -> float:
        """Time all contenders in turn, and the peak among them.

        Returns:
            The peak, in multiply-adds a second.
        """
        top = self._start("peak")
        # it writes nothing, and has nothing to load
        self._load(top, f"{peak.__name__}:load", self.folder, None, "float")
        batch = peak.IMAGES_PER_THREAD * self.settings.threads
        runs = self._runs(top, batch)
        seconds: list[float] = []
        rounds = self.settings.rounds
        with bar("rounds") as tick:
            for number in range(rounds):
                seconds += top.ask("time", _TIMEOUT_SECONDS, batch=batch, times=runs, warm_ups=_WARM_UPS)["seconds"]
                running = [runner for runner in runners if runner.child is not None]
                for index, runner in enumerate(in_turn(running, number)):
                    tick(number * len(running) + index, rounds * len(running))
                    _take_turn(runner)
        return batch * peak.MACS_PER_IMAGE / statistics.median(seconds)


def in_turn(runners: Sequence[_Some], number: int) -> Sequence[_Some]:
    """The order of a round: forth in one, back in the next, so that none always runs behind the same other one.

    Args:
        runners: Who runs.
        number: Number of the round.

    Returns:
        All of them.
    """
    return runners if number % 2 == 0 else runners[::-1]


def _take_turn(runner: _Runner) -> None:
    assert runner.child is not None
    try:
        for batch, runs in runner.runs.items():
            answer = runner.child.ask("time", _TIMEOUT_SECONDS, batch=batch, times=runs, warm_ups=_WARM_UPS)
            runner.seconds[batch].append(answer["seconds"])
    except ArtefactError as error:
        runner.fail(error)

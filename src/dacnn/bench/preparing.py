"""What comes before the first round: artefacts are written and loaded, and what they compute is compared."""

import contextlib
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dacnn.bench.child import Child
from dacnn.bench.contenders import Contender, Side, chosen
from dacnn.bench.results import Row
from dacnn.bench.settings import Settings
from dacnn.bench.tiny import tiny_images
from dacnn.bench.twin import twin_of
from dacnn.checkpoint import save
from dacnn.deploy.parity import compare, reference_logits
from dacnn.errors import ArtefactError, PlanError
from dacnn.networks.classifier import Classifier

# N images, H rows, W columns, C channels

# of anything that is asked of a contender; a compiler takes a minute
TIMEOUT_SECONDS = 600.0
# what a turn of a contender should take at least, so that it is warm again
_TURN_SECONDS = 0.25
_LEAST_RUNS, _MOST_RUNS = 3, 500

Tick = Callable[[int, int], None]
Bar = Callable[[str], AbstractContextManager[Tick]]


@contextlib.contextmanager
def no_bar(what: str) -> Iterator[Tick]:
    """Show nothing."""
    yield lambda done, total: None


@dataclass
class Runner:
    """A contender with one side, while the bench goes on."""

    row: Row
    child: Child | None = None
    runs: dict[int, int] = field(default_factory=dict)
    seconds: dict[int, list[list[float]]] = field(default_factory=dict)

    def fail(self, error: Exception) -> None:
        """It runs no more, and its row says why."""
        self.row = replace(self.row, failure=str(error))
        if self.child is not None:
            self.child.close()
            self.child = None


class Preparation:
    """The parts that are done once for all contenders, and where they stand."""

    def __init__(self, network: Classifier, images_nhwc: Tensor, settings: Settings, folder: Path, children: ExitStack) -> None:
        self.settings, self.folder, self.children = settings, folder, children
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

    def run(self, bar: Bar) -> list[Runner]:
        """Write, load and compare, one contender after the other."""
        runners = []
        for side in self.sides:
            for contender in chosen(self.settings.only):
                runner = Runner(Row(contender, side))
                runners.append(runner)
                if missing := contender.missing():
                    runner.row = replace(runner.row, failure=missing)
                    continue
                runner.row = replace(runner.row, version=_version(contender.package))
                try:
                    with bar(f"{contender.name}, {side}") as tick:
                        self._prepare(runner, tick)
                except (ArtefactError, ValueError) as error:
                    runner.fail(error)
        # nothing but the contenders shall be there when they are timed
        self._end_writer()
        return runners

    def _prepare(self, runner: Runner, tick: Tick) -> None:
        contender, side = runner.row.contender, runner.row.side
        tick(0, 4)
        folder = self._write(contender, side)
        tick(1, 4)
        runner.child = self.start(f"{contender.name}-{side}")
        answer = self.load(runner.child, contender.load, folder, folder.with_suffix(".tiny"), contender.takes)
        tick(2, 4)
        file = self.folder / f"{contender.name}-{side}.npy"
        runner.child.ask("classify", TIMEOUT_SECONDS, out=str(file), batch=max(self.settings.batches))
        logits = np.load(file)
        if logits.shape != self.reference.shape or not np.isfinite(logits).all():
            raise ArtefactError(f"gave {logits.shape} for logits: expected {self.reference.shape}, all of them finite")
        parity = compare(logits, self.reference)
        tick(3, 4)
        for batch in self.settings.batches:
            runner.runs[batch] = runs_of_a_turn(runner.child, batch)
        runner.seconds = {batch: [] for batch in self.settings.batches}
        runner.row = replace(
            runner.row,
            file_bytes=sum(path.stat().st_size for path in self.files(runner.row)),
            memory_bytes=answer["memory_bytes"],
            top1_agreement=parity.top1_agreement,
            max_error=parity.max_error,
        )

    def files(self, row: Row) -> list[Path]:
        """What the contender of a row loads; nothing where it was not written."""
        folder = self.written.get((row.contender.write, row.side))
        return [path for path in folder.rglob("*") if path.is_file()] if isinstance(folder, Path) else []

    def start(self, name: str) -> Child:
        """Start a process that ends with the bench."""
        return self.children.enter_context(Child(self.settings.threads, self.folder / f"{name}.log"))

    def _write(self, contender: Contender, side: Side) -> Path:
        """The folder of an artefact; contenders that load the same one have it written once."""
        key = (contender.write, side)
        if key not in self.written:
            folder = self.folder / f"{contender.name}-{side}"
            try:
                # it takes seconds to start, so that it writes for all; where it fails, the next has a fresh one
                self.writer = self.writer or self.start("writer")
                self.writer.ask(
                    "write",
                    TIMEOUT_SECONDS,
                    write=contender.write,
                    weights=str(self.folder / f"{side}.safetensors"),
                    into=self.settings.into,
                    folder=str(folder),
                    tiny=str(folder.with_suffix(".tiny")),
                    largest_batch=max(self.settings.batches),
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

    def load(self, child: Child, load: str, folder: Path, tiny: Path | None, takes: str) -> dict[str, Any]:
        """Have a process load an artefact, behind a tiny one where there is one, and run it once."""
        return child.ask(
            "load",
            TIMEOUT_SECONDS,
            load=load,
            folder=str(folder),
            tiny=None if tiny is None else str(tiny),
            into=self.settings.into,
            threads=self.settings.threads,
            images=str(self.folder / f"{takes}.npy"),
            tiny_images=str(self.folder / f"tiny-{takes}.npy"),
        )


def runs_of_a_turn(child: Child, batch: int) -> int:
    """How often a batch is run in a turn.

    Args:
        child: Who runs it; it does so twice now.
        batch: Its size.

    Returns:
        As often as fits in a quarter of a second, and at least three times.
    """
    first: float = child.ask("time", TIMEOUT_SECONDS, batch=batch, times=1, warm_ups=1)["seconds"][0]
    return min(_MOST_RUNS, max(_LEAST_RUNS, math.ceil(_TURN_SECONDS / first)))


def _version(package: str) -> str:
    """Of an installed distribution; empty where what is installed has another name."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""

"""A run directory: everything that a training leaves, and everything that it needs to go on.

RUN/config.toml          everything that was chosen
RUN/plan.json            the plan, where it is none of the zoo
RUN/metrics.jsonl        a line an epoch
RUN/last.safetensors     the network behind the last epoch
RUN/best.safetensors     the network that was best on the validation images
RUN/resume.safetensors   where to go on
RUN/tensorboard/         the metrics once more, for TensorBoard
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dacnn.checkpoint import replacing, save
from dacnn.config import Config, DataConfig, read_config
from dacnn.data.imageset import Progress
from dacnn.data.sources import load_test, load_train
from dacnn.deploy.parity import noise_images
from dacnn.errors import CheckpointError, ConfigError, DataError, PlanError, UnknownNameError
from dacnn.networks.classifier import Classifier
from dacnn.networks.plan import Plan
from dacnn.training.loop import EpochRecord, Loop
from dacnn.training.state import read_state, save_state

try:
    import fcntl
except ImportError:
    # Windows locks no folders
    fcntl = None  # type: ignore[assignment]

# enough for the ranges of all values
_CALIBRATION_IMAGES = 512


@dataclass(frozen=True)
class Run:
    """A run directory, which need not exist yet."""

    path: Path

    @classmethod
    def unused(cls, stem: str) -> "Run":
        """A directory under `runs/` that does not exist yet, named after `stem`."""
        taken = 1
        while (Path("runs") / f"{stem}-{taken}").exists():
            taken += 1
        return cls(Path("runs") / f"{stem}-{taken}")

    @property
    def exists(self) -> bool:
        """Whether a training began here."""
        return (self.path / "config.toml").is_file()

    @property
    def state_path(self) -> Path:
        """Where the state to resume from stands."""
        return self.path / "resume.safetensors"

    def config(self) -> Config:
        """What was chosen.

        Raises:
            ConfigError: The file was damaged.
        """
        return read_config(self.path / "config.toml")

    def plan(self) -> Plan | None:
        """The plan that was given, where it is none of the zoo.

        Raises:
            CheckpointError: The file was damaged.
        """
        path = self.path / "plan.json"
        if not path.is_file():
            return None
        try:
            return Plan.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, PlanError) as error:
            raise CheckpointError(f"{path}: {error}") from None

    @property
    def stamp(self) -> tuple[int | None, ...]:
        """Tells whether another training was at work here: when the run began, and when its state was saved."""
        places = self.path / "config.toml", self.state_path
        return tuple(place.stat().st_mtime_ns if place.is_file() else None for place in places)

    @contextlib.contextmanager
    def locked(self, stamp: tuple[int | None, ...]) -> Iterator[None]:
        """Make the directory and keep other trainings out of it; whoever is killed lets it go.

        Args:
            stamp: What the run's stamp was when it was read.

        Raises:
            CheckpointError: It cannot be made, or another training is at work in it, or was since the stamp.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be made a run directory: {error.strerror}") from None
        if fcntl is None:
            yield
            return
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path}: another training is at work in it: wait for its end, or choose another --out"
                ) from None
            except OSError:
                # a file system without locks: nobody is kept out
                pass
            if self.stamp != stamp:
                raise CheckpointError(f"{self.path}: another training was at work in it meanwhile: start again")
            yield
        finally:
            os.close(folder)

    def create(self, config: Config, plan: Plan | None) -> None:
        """Write what was chosen, with which the run exists.

        Args:
            config: What was chosen.
            plan: The plan, where it is none of the zoo.

        Raises:
            CheckpointError: The directory cannot be written.
        """
        if plan:
            self._write("plan.json", plan.to_json())
        # last: with it the run exists
        self._write("config.toml", config.to_toml())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state to go on from; None where none was saved yet.

        Raises:
            CheckpointError: The file was damaged.
        """
        return read_state(self.state_path) if self.state_path.is_file() else None

    def save_state(self, loop: Loop) -> None:
        """Write the state of a training, between two steps."""
        save_state(loop, self.state_path)

    def save_epoch(self, loop: Loop, records: Iterable[EpochRecord], best: bool) -> None:
        """Write weights and metrics, and last the state: what is ahead of the state is written again after a resume.

        Args:
            loop: The training, between two epochs.
            records: Of all epochs so far.
            best: Whether the network is the best so far.
        """
        save(loop.network, self.path / "last.safetensors")
        if best:
            save(loop.network, self.path / "best.safetensors")
        self.write_records(records)
        self.save_state(loop)

    def write_records(self, records: Iterable[EpochRecord]) -> None:
        """Write what was measured behind each epoch."""
        self._write("metrics.jsonl", "".join(json.dumps(record.to_table()) + "\n" for record in records))

    def records(self, epochs: int) -> list[EpochRecord]:
        """What was measured behind the first epochs; later ones, which no state knows of, are left out.

        Args:
            epochs: How many.

        Returns:
            A record for each of them.

        Raises:
            CheckpointError: The file was damaged or holds fewer.
        """
        if epochs == 0:
            return []
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()[:epochs]
            records = [EpochRecord(**json.loads(line)) for line in lines]
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}: start the run again") from None
        if len(records) < epochs:
            raise CheckpointError(
                f"{path}: holds {len(records)} epochs, the state is behind epoch {epochs}: start the run again"
            )
        return records

    def check_same(self, recorded: Config, given: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse to go on under other settings than the run's own.

        Args:
            recorded: The run's config.
            given: Table name to field name to value; None where nothing was given.

        Raises:
            CheckpointError: A value differs.
        """
        for table, values in given.items():
            for name, value in values.items():
                was = getattr(getattr(recorded, table), name)
                if value is not None and value != was:
                    raise CheckpointError(
                        f"{self.path}: {table}.{name} is {was} in this run, got {value}: leave it out, or start a new run"
                    )

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as beside:
            beside.write_text(text, encoding="utf-8")


def data_of(run: Path, source: str | None, **changes: Any) -> DataConfig:
    """The data set of a run, or another that is named.

    Args:
        run: A run directory, or a file in one.
        source: The other one.
        **changes: Fields of a `DataConfig` over those of the run.

    Returns:
        The data set.

    Raises:
        ConfigError: None was named, and no config tells which it was.
    """
    recorded = (run if run.is_dir() else run.parent) / "config.toml"
    if source is None and not recorded.is_file():
        raise ConfigError(f"{run}: no config.toml beside it tells the data set: name one with --data")
    config = read_config(recorded).data if recorded.is_file() else DataConfig()
    return dataclasses.replace(config, **({"source": source} | changes if source else changes))


@contextlib.contextmanager
def own_data(run: Path, source: str | None, flag: str) -> Iterator[None]:
    """Say whose data set it was, where that of a run cannot be read.

    Args:
        run: The run.
        source: What was named instead; None: nothing.
        flag: By which it can be.
    """
    try:
        yield
    except (DataError, UnknownNameError) as error:
        if source is not None:
            raise
        raise DataError(f"{error} (so says the config of {run}: name its data set by {flag} if it lies elsewhere)") from None


def some_images(
    run: Path,
    network: Classifier,
    count: int,
    source: str | None,
    progress: Progress | None = None,
    **changes: Any,
) -> tuple[Tensor, str]:
    """Some test images to try a network on, spread over its data set; noise where that is not known, or not here.

    Args:
        run: A run directory, or a file in one.
        network: Its network.
        count: How many at most.
        source: Another data set than that of the run.
        progress: Called while images are decoded.
        **changes: Fields of a `DataConfig` over those of the run.

    Returns:
        uint8, shape (N, H, W, C), and what they are, in words.

    Raises:
        ConfigError: No images were asked for.
        DataError: A data set that was named cannot be read.
    """
    if count < 1:
        raise ConfigError(f"images is {count}: expected 1 or more")
    try:
        config = data_of(run, source, **changes)
    except ConfigError:
        if changes:
            raise
        return noise_images(network.input, count), f"{count} images of noise"
    try:
        images = load_test(config, network.input, network.classes, progress)
    except (DataError, UnknownNameError) as error:
        if source is not None or changes:
            raise
        # a network is shipped from other places than it was trained in
        return noise_images(network.input, count), f"{count} images of noise (those of the run cannot be read here: {error})"
    chosen = torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
    return images.gather(chosen), f"{len(chosen)} test images of {config.source}"


def calibration_images(
    run: Path, network: Classifier, source: str | None, progress: Progress | None = None, **changes: Any
) -> tuple[Tensor | None, str]:
    """Train images from which an int8 export finds the ranges of a network's values.

    Args:
        run: A run directory, or a file in one.
        network: Its network.
        source: The data set; None: that of the run, but none where the network has learnt its ranges.
        progress: Called while images are decoded.
        **changes: Fields of a `DataConfig` over those of the run.

    Returns:
        uint8, shape (N, H, W, C), or None, and what the ranges come from, in words.

    Raises:
        ConfigError: No data set was named, and that of the run is not known.
        DataError: The data set cannot be read.
    """
    if source is None and network.ranges is not None:
        return None, "ranges learnt in training"
    try:
        config = data_of(run, source, **changes)
    except ConfigError:
        raise ConfigError(f"{run}: no config.toml beside it tells the data set: name one with --calibrate") from None
    with own_data(run, source, "--calibrate"):
        images = load_train(config, network.input, _CALIBRATION_IMAGES, progress)
    return images.gather(torch.arange(len(images))), f"{len(images)} train images of {config.source}"

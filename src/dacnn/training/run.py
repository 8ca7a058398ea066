"""A run: a training and the directory that holds all of it.

RUN/config.toml          everything that was chosen
RUN/metrics.jsonl        a line an epoch
RUN/last.safetensors     the network behind the last epoch
RUN/best.safetensors     the network that was best on the validation images
RUN/resume.safetensors   where to go on
RUN/tensorboard/         the metrics once more, for TensorBoard
"""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from dacnn.checkpoint import load, replacing, save, weights_path
from dacnn.config import Config, TrainingConfig, read_config
from dacnn.data.sources import Splits, load_data
from dacnn.errors import CheckpointError, ConfigError, TrainingError
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan
from dacnn.networks.zoo import design_of, plan_of
from dacnn.training.interrupt import deferred_interrupts
from dacnn.training.loop import EpochRecord, Loop
from dacnn.training.precision import Execution, choose
from dacnn.training.recipe import load_recipe
from dacnn.training.state import read_state, restore_state, save_state


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves.

    Attributes:
        network: The best network on the validation images (the last one, where there are none), in evaluation mode.
        run: The run directory.
        config: Everything that was chosen.
        records: What was measured behind each epoch.
    """

    network: Network
    run: Path
    config: Config
    records: tuple[EpochRecord, ...]

    @property
    def weights(self) -> Path:
        """The file that `network` was read from."""
        return weights_path(self.run)

    @property
    def best(self) -> EpochRecord:
        """The epoch that `network` comes from."""
        measured = [record for record in self.records if record.validation_top1 is not None]
        # the first of several that are equally good, as the loop chose
        return max(measured, key=lambda record: record.validation_top1 or 0.0) if measured else self.records[-1]


class Interrupted(TrainingError):
    """Somebody asked the training to stop; its state is saved."""


class Listener:
    """Told how a training goes. This one says nothing: subclass it."""

    def log(self, line: str) -> None:
        """A remark."""

    def loading(self, what: str, done: int, total: int) -> None:
        """So many images are decoded."""

    def started(self, config: Config, epoch: int, steps: int, images_per_step: int) -> None:
        """The training begins, or goes on, in this epoch."""

    def stepped(self, epoch: int, step: int, steps: int, loss: float, top1: float) -> None:
        """A step is done."""

    def evaluating(self, done: int, total: int) -> None:
        """So many validation images are done."""

    def epoch_ended(self, record: EpochRecord, best: bool) -> None:
        """An epoch is done."""


def configure(network: str | None = None, data: str | None = None, recipe: str | None = None, **overrides: Any) -> Config:
    """Put a config together: a recipe, and what is chosen over it.

    Args:
        network: Name of a network, over the recipe's.
        data: A data set, over the recipe's.
        recipe: A recipe's name or file; None: `digits` for the digits, `fast` for everything else.
        **overrides: Fields of the three configs by name: `epochs`, `width`, `lr`, ... None leaves the recipe's value.

    Returns:
        The config.

    Raises:
        UnknownNameError: There is no such recipe, network or setting.
        ConfigError: A value is out of range.
    """
    base = load_recipe(recipe or ("digits" if data in (None, "digits") else "fast"))
    config = base.merged(Config.sorted_into_tables({"name": network, "source": data, **overrides}))
    design_of(config.network)
    return config


def _check_same(recorded: Config, given: dict[str, dict[str, Any]], run: Path) -> None:
    """Refuse to go on with a run under other settings than its own."""
    for table, values in given.items():
        for name, value in values.items():
            was = getattr(getattr(recorded, table), name)
            if value is not None and value != was:
                raise ConfigError(f"{table}.{name} is {was} in the run {run}, got {value}: leave it out, or start a new run")


def train(
    network: str | Plan | None = None,
    *,
    data: str | None = None,
    recipe: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    config: Config | None = None,
    listener: Listener | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train a network on images, into a run directory.

    Args:
        network: A name of the zoo, or a plan whose layers are kept while input and classes come from the data.
            None: the recipe's.
        data: A data set: `digits`, `cifar10`, a folder, ... None: the recipe's.
        recipe: A recipe's name or TOML file; None: `digits` for the digits, else `fast`.
        out: The run directory; None: a new one under `runs/`.
        resume: Go on with the run in `out` where it stopped; its own config is used.
        config: A whole config, instead of data, recipe and overrides.
        listener: Told how it goes.
        **overrides: Fields of the configs over the recipe's: `epochs=20, width=32, seed=1`.

    Returns:
        The trained network and what was measured.

    Raises:
        ConfigError: A value is out of range.
        DataError: The data cannot be read.
        CheckpointError: The run directory holds another run, or cannot be resumed or written.
        DivergenceError: The loss became infinite or no number.
        Interrupted: A signal asked to stop; the state is saved.

    Example:
        >>> result = dacnn.train("dacnn14", data="digits", epochs=8)  # doctest: +SKIP
        >>> result.best.validation_top1  # doctest: +SKIP
        0.986
    """
    listener = listener or Listener()
    plan = network if isinstance(network, Plan) else None
    given = Config.sorted_into_tables({"name": None if plan else network, "source": data, **overrides})
    if config is None:
        config = configure(None if isinstance(network, Plan) else network, data, recipe, **overrides)
    elif network or data or recipe or any(value is not None for value in overrides.values()):
        raise ConfigError("train got a config and settings beside it: change the config instead")
    cpu = config.training.device == "cpu"
    # one process makes the directory, and all are told which it is
    found = [_open_run(config, Path(out) if out else None, resume) if PartialState(cpu=cpu).is_main_process else None]
    run = broadcast_object_list(found)[0]
    accelerator = Accelerator(
        cpu=cpu,
        log_with="tensorboard",
        project_dir=str(run),
    )
    if not accelerator.is_main_process:
        listener = Listener()
    recorded = read_config(run / "config.toml")
    if resume:
        _check_same(recorded, given, run)
    return _train(recorded, plan, run, resume, accelerator, listener)


def _open_run(config: Config, out: Path | None, resume: bool) -> Path:
    """Find or make the run directory, with its config in it."""
    if resume and out is None:
        raise ConfigError("--resume: which run? name its directory with --out")
    if out is None:
        stem = f"{config.network.name}-{Path(config.data.source).name}"
        taken = 1
        while (Path("runs") / f"{stem}-{taken}").exists():
            taken += 1
        out = Path("runs") / f"{stem}-{taken}"
    if (out / "config.toml").is_file():
        if not resume:
            raise CheckpointError(f"{out}: already holds a run: go on with it by --resume, or choose another --out")
        return out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be made a run directory: {error.strerror}") from None
    with replacing(out / "config.toml") as beside:
        beside.write_text(config.to_toml(), encoding="utf-8")
    return out


def _train(
    config: Config, plan: Plan | None, run: Path, resume: bool, accelerator: Accelerator, listener: Listener
) -> TrainResult:
    state_path = run / "resume.safetensors"
    state = read_state(state_path) if resume and state_path.is_file() else None
    if accelerator.device.type not in ("cpu", "cuda"):
        raise TrainingError(f"device '{accelerator.device.type}' is not supported: use --device cpu")
    execution = _execution(config.training, accelerator, state)
    splits = load_data(config.data, progress=listener.loading)
    listener.log(execution.describe())
    network = Network(_fitted(plan, config, splits), torch.Generator().manual_seed(config.training.seed))
    torch.manual_seed(config.training.seed)
    loop = Loop(network, splits, config.training, accelerator, execution)
    if state:
        restore_state(loop, *state, state_path)
    records = _read_records(run / "metrics.jsonl", loop.epoch)
    if accelerator.is_main_process:
        _write_records(run / "metrics.jsonl", records)
    accelerator.init_trackers("tensorboard")
    listener.started(config, loop.epoch, loop.steps, loop.images_per_step)
    try:
        _run_epochs(loop, run, records, listener)
    finally:
        # not accelerator.end_training(), which would end the process group that a next training needs
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.wait_for_everyone()
    return TrainResult(load(weights_path(run)), run, config, tuple(records))


def _execution(config: TrainingConfig, accelerator: Accelerator, state: tuple[Any, dict[str, Any]] | None) -> Execution:
    """How to run here; a resumed run uses what it used before wherever it was left to us."""
    if state:
        then = state[1]["execution"]
        if config.threads is None and isinstance(then.get("threads"), int):
            torch.set_num_threads(then["threads"])
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return choose(config, accelerator.device.type, accelerator.num_processes)


def _fitted(plan: Plan | None, config: Config, splits: Splits) -> Plan:
    """The plan to train, with the data's input and classes."""
    if plan is None:
        return plan_of(config.network, splits.input, splits.classes)
    if (plan.input.channels, len(plan.classes)) != (splits.input.channels, len(splits.classes)):
        raise ConfigError(
            f"plan '{plan.name}' takes {plan.input.channels} channels and tells {len(plan.classes)} classes apart, "
            f"'{splits.name}' has {splits.input.channels} and {len(splits.classes)}: make the plan for this data set"
        )
    return plan.for_data(splits.input, splits.classes)


def _run_epochs(loop: Loop, run: Path, records: list[EpochRecord], listener: Listener) -> None:
    """Train to the last epoch; behind each of them everything is on disk before the next begins."""
    main = loop.accelerator.is_main_process
    with deferred_interrupts() as interrupts:
        while loop.epoch < loop.config.epochs:
            started, first_step, saved = time.perf_counter(), loop.step, time.monotonic()
            for step in loop.train_epoch():
                seen = loop.look()
                if seen:
                    listener.stepped(loop.epoch + 1, step, loop.steps, *seen)
                due = time.monotonic() - saved > 60 * loop.config.checkpoint_minutes
                if (interrupts.requested or due) and step < loop.steps:
                    loop.check()
                    if main:
                        save_state(loop, run / "resume.safetensors")
                    saved = time.monotonic()
                    _stop_if(interrupts.requested, loop, run)
            seconds = time.perf_counter() - started
            record, best = loop.end_epoch(listener.evaluating, (loop.steps - first_step) * loop.images_per_step, seconds)
            records.append(record)
            if main:
                _save_epoch(loop, run, records, best)
            loop.accelerator.log(
                {name: value for name, value in record.to_table().items() if value is not None}, step=record.epoch
            )
            listener.epoch_ended(record, best)
            _stop_if(interrupts.requested and loop.epoch < loop.config.epochs, loop, run)


def _stop_if(requested: bool, loop: Loop, run: Path) -> None:
    if requested:
        raise Interrupted(
            f"stopped in epoch {loop.epoch + 1} of {loop.config.epochs}, the state is saved: "
            f"go on with `dacnn train --resume --out {run}`"
        )


def _save_epoch(loop: Loop, run: Path, records: Iterable[EpochRecord], best: bool) -> None:
    """Write weights and metrics, and last the state: what is ahead of the state is written again after a resume."""
    network = loop.network
    assert isinstance(network, Network)
    save(network, run / "last.safetensors")
    if best:
        save(network, run / "best.safetensors")
    _write_records(run / "metrics.jsonl", records)
    save_state(loop, run / "resume.safetensors")


def _write_records(path: Path, records: Iterable[EpochRecord]) -> None:
    with replacing(path) as beside:
        beside.write_text("".join(json.dumps(record.to_table()) + "\n" for record in records), encoding="utf-8")


def _read_records(path: Path, epochs: int) -> list[EpochRecord]:
    """The records of the epochs that the state knows of; later ones are cut off."""
    if epochs == 0:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[:epochs]
        records = [EpochRecord(**json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}: start the run again") from None
    if len(records) < epochs:
        raise CheckpointError(f"{path}: holds {len(records)} epochs, the state is behind epoch {epochs}: start the run again")
    return records

"""From a recipe and images to a trained network in a run directory."""

import contextlib
import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from dacnn.checkpoint import load, load_tensors, stored_once, weights_path
from dacnn.config import Config, NetworkConfig, TrainingConfig, read_config
from dacnn.data.sources import Splits, load_data
from dacnn.errors import CheckpointError, ConfigError, Interrupted, TrainingError
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapted_as, is_factory, rule_of
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan
from dacnn.networks.zoo import design_of, plan_of
from dacnn.training.interrupt import deferred_interrupts
from dacnn.training.listener import Listener
from dacnn.training.loop import EpochRecord, Loop
from dacnn.training.precision import Execution, best_device, choose
from dacnn.training.recipe import load_recipe
from dacnn.training.run import Run
from dacnn.training.state import restore_state

N = TypeVar("N", bound=Classifier)

# settings of a run that a training from its weights keeps
_KEPT = ("batch_size", "accumulate", "crop", "flip", "cutout", "label_smoothing", "anchor_lr")
# begins the name, in a config, of a module that was handed over
_FROM_PYTHON = "python:"


@dataclass(frozen=True)
class TrainResult:
    """What a training leaves.

    Attributes:
        network: The best network on the validation images (the last one, where there are none), in evaluation mode.
        run: The run directory.
        config: Everything that was chosen.
        records: What was measured behind each epoch.
    """

    network: Classifier
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


def configure(network: str | None = None, data: str | None = None, recipe: str | None = None, **overrides: Any) -> Config:
    """Put a config together: a recipe, and what is chosen over it.

    Args:
        network: Name of a network, over the recipe's.
        data: A data set, over the recipe's.
        recipe: A recipe's name or file; None: `int8` where that is asked for, `digits` for the digits, `fast`
            for everything else.
        **overrides: Fields of the three configs by name: `epochs`, `width`, `lr`, ... None leaves the recipe's value.

    Returns:
        The config.

    Raises:
        UnknownNameError: There is no such recipe, network, regulator or setting.
        ConfigError: A value is out of range.
    """
    start = overrides.get("weights")
    recipe = recipe or ("int8" if overrides.get("quantize") == "int8" else "digits" if data in (None, "digits") else "fast")
    base = load_recipe(recipe)
    if start is not None and (Path(start) / "config.toml").is_file():
        # network and data are those of the run that it goes on from, and what is done to its images
        before = read_config(Path(start) / "config.toml")
        kept = {name: getattr(before.training, name) for name in _KEPT}
        base = Config(before.network, before.data, dataclasses.replace(base.training, **kept))
    if network is not None and _is_foreign(network) != _is_foreign(base.network.name):
        # what a recipe says of a network of the zoo does not fit a foreign one, nor the other way round
        base = dataclasses.replace(base, network=NetworkConfig())
    config = base.merged(Config.sorted_into_tables({"name": network, "source": data, **overrides}))
    _check_network(config.network)
    return config


def _is_foreign(name: str) -> bool:
    """Whether a network's name is none of the zoo's."""
    return is_factory(name) or name.startswith(_FROM_PYTHON)


def _check_network(config: NetworkConfig) -> None:
    """Refuse settings that do not fit the network."""
    if is_factory(config.name):
        rule_of(config)
    elif not _is_foreign(config.name):
        design_of(config)


def train(
    network: str | Plan | nn.Module | None = None,
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
        network: A name of the zoo, or FILE.py:factory; a plan, whose layers are kept while input and classes come from
            the data; or any module that takes N x C x H x W and gives logits, converted by `dacnn.anchor` or not, which is
            left as it is. None: the recipe's.
        data: A data set: `digits`, `cifar10`, a folder, ... None: the recipe's.
        recipe: A recipe's name or TOML file; None: `digits` for the digits, else `fast`.
        out: The run directory; None: a new one under `runs/`.
        resume: Go on with the run in `out` where it stopped, under its own config; a run that was killed before it
            began is begun.
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

    Example::

        result = dacnn.train("dacnn14", data="digits", epochs=8)
        print(result.best.validation_top1, result.weights)
    """
    says_what = any(given is not None for given in (network, data, recipe, config, *overrides.values()))
    plan = network if isinstance(network, Plan) else None
    module = _module_of(network)
    name = f"{_FROM_PYTHON}{type(module).__name__}" if module is not None else None if plan else cast(str | None, network)
    chosen = {"name": name, "source": data, **overrides}
    of_network = Config.sorted_into_tables(overrides)["network"]
    if config is None and network is None and all(value is None for value in of_network.values()):
        plan = _plan_in(overrides.get("weights"))
    if config is None:
        config = configure(name, data, recipe, **overrides)
    elif recipe or any(value is not None for key, value in chosen.items() if key != "name" or module is None):
        raise ConfigError("train got a config and settings beside it: change the config instead")
    elif name is not None:
        config = dataclasses.replace(config, network=dataclasses.replace(config.network, name=name))
    if resume and out is None:
        raise ConfigError("--resume: which run? name its directory with --out")
    if out is not None and str(out) == "":
        raise ConfigError("--out is empty: expected a directory for the run")
    # one process chooses the directory, and all are told which it is
    found = [Run(Path(out)) if out else Run.unused(_stem(config))]
    PartialState(cpu=_on_cpu(config))
    run: Run = broadcast_object_list(found)[0]
    if run.exists:
        if not resume:
            raise CheckpointError(f"{run.path}: already holds a run: go on with it by --resume, or choose another --out")
        config, plan = run.config(), run.plan()
        run.check_same(config, Config.sorted_into_tables(chosen))
    elif resume and not says_what:
        raise CheckpointError(f"{run.path}: holds no run to go on with: expected the --out of `dacnn train`")
    elif resume and PartialState().is_main_process and listener:
        listener.log(f"{run.path} holds no run yet: it is begun")
    return _train(config, plan, module, run, listener or Listener())


def _on_cpu(config: Config) -> bool:
    """Whether to train on the CPU: of several processes, accelerate joins those on a CPU only where it is told so."""
    return config.training.device == "cpu" or best_device() == "cpu"


def _plan_in(weights: str | None) -> Plan | None:
    """The plan in a file of weights that stands by itself; None: there is no such file, or it holds none."""
    if weights is None or not Path(weights).is_file():
        return None
    _, metadata = load_tensors(Path(weights))
    return Plan.from_json(json.dumps(metadata["plan"])) if "plan" in metadata else None


def _module_of(network: object) -> nn.Module | None:
    """A module that was handed over; what was trained before is taken out of its frame."""
    if isinstance(network, Network):
        raise ConfigError("a network of the zoo is trained anew from its plan: dacnn.train(network.plan)")
    if network is not None and not isinstance(network, str | Plan | nn.Module):
        raise ConfigError(f"train got a {type(network).__name__}: expected the name of a network, a plan or a module")
    module = network.module if isinstance(network, Adapted) else network
    return module if isinstance(module, nn.Module) else None


def _stem(config: Config) -> str:
    """The beginning of a new run directory's name."""
    network = Path(config.network.name.removeprefix(_FROM_PYTHON)).name.replace(".py:", "-")
    return f"{network}-{Path(config.data.source).name}"


def _train(config: Config, plan: Plan | None, module: nn.Module | None, run: Run, listener: Listener) -> TrainResult:
    if config.training.quantize != "no" and config.training.weights is None:
        raise ConfigError(
            f"training.quantize is '{config.training.quantize}', but nothing is trained yet whose values have ranges: train in "
            "floats first, and name that run with --weights"
        )
    accelerator = Accelerator(cpu=_on_cpu(config), log_with="tensorboard", project_dir=str(run.path))
    if accelerator.device.type not in ("cpu", "cuda"):
        raise TrainingError(f"device '{accelerator.device.type}' is not supported: use --device cpu")
    if not accelerator.is_main_process:
        listener = Listener()
    stamp, state = run.stamp, run.state()
    foreign = plan is None and _is_foreign(config.network.name)
    execution = _execution(config.training, accelerator, foreign, state[1]["execution"] if state else {})
    if config.training.weights is not None:
        # what holds none is refused before the images are read
        load_tensors(weights_path(Path(config.training.weights)))
    splits = load_data(config.data, progress=listener.loading)
    listener.log(execution.describe())
    network = _network(plan, module, config, splits)
    if isinstance(network, Adapted) and network.owner is None and config.network.share not in (None, "none"):
        listener.log(f"share '{config.network.share}': no two layers can read one kernel, so nothing is shared")
    # what no file can hold is refused before an epoch is spent on it
    stored_once(network.state_dict())
    # training may leave something in a module that cannot be copied, such as activations
    into = copy.deepcopy(network.module) if isinstance(network, Adapted) else None
    torch.manual_seed(config.training.seed)
    loop = Loop(network, splits, config.training, accelerator, execution)
    if loop.segments:
        listener.log(loop.segments.describe())
    if state:
        restore_state(loop, *state, run.state_path)
    records = run.records(loop.epoch)
    # nothing is written before everything that was given has been looked at
    with run.locked(stamp) if accelerator.is_main_process else contextlib.nullcontext():
        if accelerator.is_main_process:
            run.create(config, plan)
            run.write_records(records)
        accelerator.wait_for_everyone()
        accelerator.init_trackers("tensorboard")
        listener.started(config, loop.epoch, loop.steps, loop.images_per_step)
        try:
            _run_epochs(loop, run, records, listener)
        finally:
            # not accelerator.end_training(), which would end the process group that a next training needs
            for tracker in accelerator.trackers:
                tracker.finish()
        accelerator.wait_for_everyone()
        best = load(run.path) if into is None else cast(Classifier, load(run.path, into))
    return TrainResult(best.cpu(), run.path, config, tuple(records))


def _execution(config: TrainingConfig, accelerator: Accelerator, foreign: bool, before: dict[str, Any]) -> Execution:
    """How to run here; a resumed run takes the threads it had before where none are asked for."""
    threads = config.threads or before.get("threads")
    if threads is not None:
        torch.set_num_threads(threads)
    return choose(config, accelerator.device.type, accelerator.num_processes, foreign=foreign)


def _network(plan: Plan | None, module: nn.Module | None, config: Config, splits: Splits) -> Classifier:
    """What is trained; its start values follow from the seed, but for a module that came with its own."""
    seed, name, start = config.training.seed, config.network.name, config.training.weights
    if plan is None and (module is not None or is_factory(name)):
        torch.manual_seed(seed)
        adapted = adapted_as(config.network, splits.input, splits.classes, module)
        return adapted if start is None else _same_images(cast(Classifier, load(start, adapted)), splits, start)
    if plan is None and name.startswith(_FROM_PYTHON):
        raise ConfigError(f"'{name}' was given from Python: go on from there, dacnn.train(module, out=..., resume=True)")
    plan = _fitted(plan, config, splits)
    if start is None:
        return Network(plan, torch.Generator().manual_seed(seed))
    network = _same_images(load(start), splits, start)
    if network.plan != plan:
        raise ConfigError(f"{start}: holds another '{network.plan.name}' than is asked for: leave out settings of the network")
    return network


def _same_images(network: N, splits: Splits, start: str) -> N:
    """Refuse weights that learnt from other images."""
    if (network.input, network.classes) != (splits.input, splits.classes):
        raise ConfigError(
            f"{start}: learnt from {network.input.channels} channels of {network.input.height}x{network.input.width} pixels "
            f"and {len(network.classes)} classes, which '{splits.name}' has not: name the data that it was trained on"
        )
    return network


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


def _run_epochs(loop: Loop, run: Run, records: list[EpochRecord], listener: Listener) -> None:
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
                        run.save_state(loop)
                    saved = time.monotonic()
                    _stop_if(interrupts.requested, loop, run)
            images, seconds = (loop.steps - first_step) * loop.images_per_step, time.perf_counter() - started
            record, best = loop.end_epoch(listener.evaluating, images, seconds)
            records.append(record)
            if main:
                run.save_epoch(loop, records, best)
            measured = {name: value for name, value in record.to_table().items() if value is not None}
            loop.accelerator.log(measured, step=record.epoch)
            listener.epoch_ended(record, best)
            _stop_if(interrupts.requested and loop.epoch < loop.config.epochs, loop, run)


def _stop_if(requested: bool, loop: Loop, run: Run) -> None:
    if requested:
        given = run.config().network.name.startswith(_FROM_PYTHON)
        again = f"dacnn.train(module, out='{run.path}', resume=True)" if given else f"dacnn train --resume --out {run.path}"
        raise Interrupted(
            f"stopped in epoch {loop.epoch + 1} of {loop.config.epochs}, the state is saved: go on with `{again}`"
        )

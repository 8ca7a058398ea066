"""The command line: it composes what stands above it and has no logic of its own.

Nothing that imports torch is imported before a command needs it, so that `dacnn --help` answers at once.
"""

import dataclasses
import json
import os
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from dacnn import __version__
from dacnn.config import DataConfig, NetworkConfig, TrainingConfig, read_config
from dacnn.errors import ConfigError, DacnnError, Interrupted

if TYPE_CHECKING:
    from dacnn.networks.classifier import Classifier
    from dacnn.networks.plan import Input, Plan


def _spelled(kind: Any) -> str:
    """What stands for a value of the annotated type `kind` in --help."""
    choices = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(choices)
    if typing.get_origin(kind) is tuple:
        return "INT ..."
    inner = [choice for choice in choices if choice is not type(None)]
    return _spelled(inner[0]) if inner else "TRUE|FALSE" if kind is bool else kind.__name__.upper()


def _optional(kind: Any, *, without: frozenset[str] = frozenset()) -> list[tuple[str, Any, None]]:
    """The fields of a config as optional flags: None leaves the recipe's value."""
    return [
        (
            item.name,
            Annotated[
                cast(Any, item.type) | None, arg(help=item.metadata["help"], metavar=_spelled(item.type), help_behavior_hint="")
            ],
            None,
        )
        for item in dataclasses.fields(kind)
        if item.name not in without
    ]


NetworkFlags = dataclasses.make_dataclass("NetworkFlags", _optional(NetworkConfig, without=frozenset({"name"})), frozen=True)
DataFlags = dataclasses.make_dataclass("DataFlags", _optional(DataConfig, without=frozenset({"source"})), frozen=True)
TrainingFlags = dataclasses.make_dataclass("TrainingFlags", _optional(TrainingConfig), frozen=True)
_STEP = {"batch_size", "accumulate", "optimizer", "precision", "memory_format"}
_NOT_OF_A_STEP = frozenset(item.name for item in dataclasses.fields(TrainingConfig)) - _STEP
StepFlags = dataclasses.make_dataclass("StepFlags", _optional(TrainingConfig, without=_NOT_OF_A_STEP), frozen=True)
for _flags in (NetworkFlags, DataFlags, TrainingFlags):
    # the heading of the group in --help, instead of the generated signature
    _flags.__doc__ = "Over the recipe's values."
StepFlags.__doc__ = "Of the training whose memory is told."

NetworkName = Annotated[
    str | None, arg(help="network of the zoo (see `dacnn models`), or FILE.py:factory", metavar="NAME", help_behavior_hint="")
]
NetworkOrFile = Annotated[
    str,
    arg(help="network of the zoo, run directory, .safetensors file or FILE.py:factory", metavar="NAME", help_behavior_hint=""),
]
Classes = Annotated[int, arg(help="number of classes, for a network of the zoo")]
InChannels = Annotated[int, arg(help="channels of an image, for a network of the zoo")]
Size = Annotated[int, arg(help="side of an image in pixels, for a network of the zoo")]
RunPath = Annotated[Path, arg(help="run directory, or a .safetensors file", metavar="RUN", help_behavior_hint="")]
Into = Annotated[
    str | None,
    arg(help="FILE.py:factory that makes the layers of a converted network", metavar="FACTORY", help_behavior_hint=""),
]
Source = Annotated[
    str | None,
    arg(
        help="digits, cifar10, cifar100, svhn, a hub data set, or a local folder or archive",
        metavar="SOURCE",
        help_behavior_hint="",
    ),
]
Json = Annotated[bool, arg(help="print one JSON object on standard output", help_behavior_hint="")]


def _given(*flags: object) -> dict[str, Any]:
    """The flags that were given."""
    pairs = ((item.name, getattr(group, item.name)) for group in flags for item in dataclasses.fields(group))  # type: ignore[arg-type]
    return {name: value for name, value in pairs if value is not None}


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, default=str, ensure_ascii=False))


def train(
    network: Positional[NetworkName] = None,
    /,
    *,
    data: Source = None,
    recipe: Annotated[
        str | None, arg(help="digits, fast, paper, or a TOML file", metavar="RECIPE", help_behavior_hint="")
    ] = None,
    out: Annotated[
        Path | None, arg(help="run directory (default: a new one under runs/)", metavar="RUN", help_behavior_hint="")
    ] = None,
    resume: Annotated[bool, arg(help="go on with the run in --out where it stopped", help_behavior_hint="")] = False,
    json: Json = False,
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
    data_settings: OmitArgPrefixes[DataFlags] = DataFlags(),  # type: ignore[valid-type]  # noqa: B008
    training_settings: OmitArgPrefixes[TrainingFlags] = TrainingFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Train a network on images, into a run directory. Without any argument: dacnn14 on handwritten digits.

    Example: dacnn train dacnn14 --data cifar10 --recipe fast --width 64 --epochs 8 --out runs/first
    """
    from accelerate import PartialState

    from dacnn import tables
    from dacnn.measure.count import count
    from dacnn.progress import TrainingProgress
    from dacnn.training.train import train as train_run

    listener = TrainingProgress()
    try:
        result = train_run(
            network,
            data=data,
            recipe=recipe,
            out=out,
            resume=resume,
            listener=listener,
            **_given(network_settings, data_settings, training_settings),
        )
    finally:
        listener.close()
    if not PartialState().is_main_process:
        return
    counts = count(result.network)
    if not json:
        tables.show(tables.training_summary(result, counts))
        return
    _print_json(
        {
            "run": str(result.run),
            "weights": str(result.weights),
            "weights_bytes": result.weights.stat().st_size,
            **{f"best_{name}": value for name, value in result.best.to_table().items()},
            **counts.to_table(),
            "epochs": [record.to_table() for record in result.records],
        }
    )


def eval(
    run: Positional[RunPath],
    /,
    *,
    data: Source = None,
    into: Into = None,
    png: Annotated[
        Path | None, arg(help="draw the confusion matrix into this file", metavar="FILE", help_behavior_hint="")
    ] = None,
    json: Json = False,
    data_settings: OmitArgPrefixes[DataFlags] = DataFlags(),  # type: ignore[valid-type]  # noqa: B008
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Measure a trained network on the test images of its data set, or of another: top-1, top-5, loss, every class.

    Of a FILE.py:factory, the weights that the factory gives are measured, its kernels shared by --share.

    Example: dacnn eval runs/first --png confusion.png
    """
    from dacnn import tables
    from dacnn.data.sources import load_test
    from dacnn.draw import draw_confusion
    from dacnn.measure.count import count
    from dacnn.networks.factory import is_factory
    from dacnn.progress import bar
    from dacnn.training.evaluate import evaluate
    from dacnn.training.precision import best_device

    given = _given(network_settings)
    trained = None if is_factory(str(run)) else _trained(run, into, given)
    config = _data_of(run, data, _given(data_settings))
    network = (trained or _untrained(NetworkConfig(str(run), **given), config)).to(best_device())
    with bar("loading") as tick:
        images = load_test(config, network.input, network.classes, progress=lambda what, done, total: tick(done, total))
    with bar("evaluating") as tick:
        result = evaluate(network, images, tick=tick)
    if png:
        draw_confusion(result, png)
    counts = count(network)
    if not json:
        tables.show(tables.evaluation_table(result, config.source, counts))
        return
    _print_json(
        {
            "data": config.source,
            "images": result.images,
            "top1": result.top1,
            "top5": result.top5,
            "loss": result.loss,
            "per_class": result.per_class(),
            "confusion": result.confusion.tolist(),
            **counts.to_table(),
        }
    )


def predict(
    run: Positional[RunPath],
    images: Positional[
        Annotated[tuple[Path, ...], arg(help="image files, and folders of them", metavar="IMAGE", help_behavior_hint="")]
    ],
    /,
    *,
    top: Annotated[int, arg(help="how many classes to name for each image")] = 3,
    into: Into = None,
    json: Json = False,
) -> None:
    """Classify image files: the likeliest classes and their probabilities.

    Example: dacnn predict runs/first photo.jpg holiday/
    """
    from dacnn import tables
    from dacnn.prediction import predict as predict_images
    from dacnn.progress import bar
    from dacnn.training.precision import best_device

    if not images:
        raise ConfigError("no images: name one or more files or folders")
    if top < 1:
        raise ConfigError(f"--top is {top}: expected 1 or more")
    with bar("classifying") as tick:
        predictions = predict_images(_trained(run, into, {}).to(best_device()), images, top=top, tick=tick)
    if not json:
        tables.show(tables.prediction_table(predictions))
        return
    _print_json(
        [
            {
                "path": str(prediction.path),
                "class": prediction.classes[0],
                "probabilities": dict(zip(prediction.classes, prediction.probabilities, strict=True)),
            }
            for prediction in predictions
        ]
    )


def models(
    *,
    classes: Annotated[int, arg(help="number of classes")] = 100,
    json: Json = False,
) -> None:
    """List the networks of the zoo: what they store, what they use, what they compute.

    Example: dacnn models --classes 10
    """
    from dacnn import tables
    from dacnn.measure.count import count
    from dacnn.networks.zoo import DESIGNS

    rows: list[dict[str, Any]] = []
    for name, design in DESIGNS.items():
        plan = _plan(NetworkConfig(name), classes, 3, 32)
        regulator = design.regulator.kind if design.regulator else None
        rows.append(
            {
                "name": name,
                "topology": design.topology,
                "depths": design.depths,
                "widths": design.widths,
                "share": design.share,
                "regulator": regulator,
                **count(plan).to_table(),
            }
        )
    if json:
        _print_json(rows)
    else:
        tables.show(tables.zoo_table(rows, classes))


def show(
    network: Positional[NetworkOrFile],
    /,
    *,
    classes: Classes = 100,
    in_channels: InChannels = 3,
    size: Size = 32,
    png: Annotated[Path | None, arg(help="draw the plan into this file", metavar="FILE", help_behavior_hint="")] = None,
    json: Json = False,
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Show a network's plan: who reads which kernel, parameters stored against used, multiply-adds.

    Example: dacnn show dacnn18-mix-reg --png plan.png
    """
    from dacnn import tables
    from dacnn.draw import draw_plan
    from dacnn.measure.count import count
    from dacnn.networks.factory import is_factory

    if is_factory(network):
        if png:
            raise ConfigError(f"--png: {network} has no plan to draw: leave it out")
        _show_foreign(NetworkConfig(network, **_given(network_settings)), classes, in_channels, size, json)
        return
    plan = _plan_of(network, classes, in_channels, size, _given(network_settings))
    counts = count(plan)
    if png:
        draw_plan(plan, png)
    if not json:
        tables.show(tables.plan_table(plan, counts))
        return
    readers = {name: [layer.name for layer in layers] for name, layers in plan.readers().items()}
    _print_json({"plan": _plain(plan), "readers": readers, **counts.to_table()})


def fold(
    run: Positional[RunPath],
    /,
    *,
    out: Annotated[
        Path, arg(help="write the folded network into this .safetensors file", metavar="FILE", help_behavior_hint="")
    ],
    kernels: Annotated[int | None, arg(help="kernels that come out of each bank", metavar="INT", help_behavior_hint="")] = None,
    similarity: Annotated[
        float | None,
        arg(help="or how alike layers must be to read one, 0 to 1 (default: 0.9)", metavar="FLOAT", help_behavior_hint=""),
    ] = None,
    data: Source = None,
    json: Json = False,
    data_settings: OmitArgPrefixes[DataFlags] = DataFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Let layers of a template network that have become alike read one kernel; measure what that costs.

    Example: dacnn fold runs/template --kernels 2 --out folded.safetensors
    """
    from dacnn import tables
    from dacnn.checkpoint import load, save
    from dacnn.data.sources import load_test
    from dacnn.measure.count import count
    from dacnn.networks.fold import alike
    from dacnn.networks.fold import fold as fold_network
    from dacnn.progress import bar
    from dacnn.training.evaluate import evaluate
    from dacnn.training.precision import best_device

    network = load(run)
    folded, done = fold_network(network, kernels=kernels, similarity=similarity)
    with bar("loading") as tick:
        images = load_test(
            _data_of(run, data, _given(data_settings)),
            network.input,
            network.classes,
            progress=lambda what, done, total: tick(done, total),
        )
    measured = []
    for candidate in (network, folded):
        with bar("evaluating") as tick:
            measured.append((evaluate(candidate.to(best_device()), images, tick=tick), count(candidate)))
    save(folded, out)
    if not json:
        tables.show(tables.fold_table(alike(network), done, measured))
        return
    names = ("before", "after")
    _print_json(
        {
            "groups": done.groups,
            "errors": done.errors,
            "similarity": {bank.name: {"layers": bank.layers, "cosines": bank.similarity.tolist()} for bank in alike(network)},
            **{name: {"top1": found.top1, **counts.to_table()} for name, (found, counts) in zip(names, measured, strict=True)},
        }
    )


def _show_foreign(config: NetworkConfig, classes: int, channels: int, size: int, as_json: bool) -> None:
    """Show who reads which kernel in a converted module."""
    from dacnn import tables
    from dacnn.measure.count import count
    from dacnn.networks.factory import adapt
    from dacnn.sharing.convert import conversion_of
    from dacnn.sharing.survey import survey

    network = adapt(config, _input(channels, size), tuple(map(str, range(classes))))
    refused = survey(adapt(NetworkConfig(config.name), network.input, network.classes).module).refused
    conversion = dataclasses.replace(conversion_of(network.module), refused=refused)
    counts = count(network)
    if as_json:
        _print_json({**conversion.to_table(), **counts.to_table()})
    else:
        tables.show(tables.conversion_table(network, conversion, counts))


def plan(
    network: Positional[
        Annotated[str, arg(help="network of the zoo, or FILE.py:factory", metavar="NAME", help_behavior_hint="")]
    ],
    /,
    *,
    budget: Annotated[
        str | None,
        arg(
            help="propose the least sharing that stores no more than this, such as 100kB",
            metavar="BYTES",
            help_behavior_hint="",
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"], arg(help="format in which the values are stored", help_behavior_hint="")
    ] = "float32",
    classes: Annotated[int, arg(help="number of classes")] = 10,
    in_channels: Annotated[int, arg(help="channels of an image")] = 3,
    size: Annotated[int, arg(help="side of an image in pixels")] = 32,
    json: Json = False,
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Print what sharing would save, before anything is changed: every way of sharing, or those that are named.

    Example: dacnn plan net.py:make --budget 100kB
    """
    from dacnn import tables
    from dacnn.measure.proposals import SCHEMES, fitting, parse_bytes, proposals
    from dacnn.networks.factory import adapt, is_factory, make_module

    given, foreign = _given(network_settings), is_factory(network)
    sharing = {name: given.pop(name) for name in ("share", "groups", "templates") if name in given}
    unshared, *schemes = SCHEMES[: -1 if foreign else None]
    input, names = _input(in_channels, size), tuple(map(str, range(classes)))
    module = make_module(network, num_classes=classes, in_channels=in_channels) if foreign else None

    def make(settings: Mapping[str, Any]) -> "Classifier | Plan":
        config = NetworkConfig(network, **given | dict(settings))
        return adapt(config, input, names, module) if foreign else _plan(config, classes, in_channels, size)

    size_of = {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    found = proposals(make, (unshared, *([sharing] if sharing else schemes)), size_of)
    chosen = fitting(make, found, parse_bytes(budget), size_of) if budget else None
    if json:
        rows = [{**dataclasses.asdict(proposal), "flags": proposal.flags} for proposal in found]
        _print_json({"proposals": rows, "chosen": {**dataclasses.asdict(chosen), "flags": chosen.flags} if chosen else None})
        return
    tables.show(tables.proposal_table(f"{network}, values in {dtype}", found))
    if chosen:
        tables.show(f"fits {budget}: {chosen.flags} ({chosen.stored_bytes:,} bytes)")


def _data_of(run: Path, data: str | None, given: Mapping[str, Any]) -> DataConfig:
    """The data set of a run, or another that was named."""
    recorded = (run if run.is_dir() else run.parent) / "config.toml"
    if data is None and not recorded.is_file():
        raise ConfigError(f"{run}: no config.toml beside it tells the data set: name one with --data")
    config = read_config(recorded).data if recorded.is_file() else DataConfig()
    changes: dict[str, Any] = {"source": data} if data else {}
    return dataclasses.replace(config, **changes, **given)


def _trained(run: Path, into: str | None, given: Mapping[str, Any]) -> "Classifier":
    """A trained network; of a converted one, the layers that a factory makes."""
    from dacnn.checkpoint import described, load
    from dacnn.networks.classifier import Classifier
    from dacnn.networks.factory import make_module

    if given:
        raise _takes_no(str(run), given)
    if into is None:
        return load(run)
    input, classes = described(run)
    network = load(run, make_module(into, num_classes=len(classes), in_channels=input.channels))
    assert isinstance(network, Classifier)
    return network


def _takes_no(trained: str, given: Mapping[str, Any]) -> ConfigError:
    flags = ", ".join("--" + name.replace("_", "-") for name in given)
    return ConfigError(f"{trained} is a trained network: it takes no {flags}")


def _untrained(config: NetworkConfig, data: DataConfig) -> "Classifier":
    """What a factory gives for a data set."""
    from dacnn.data.sources import load_data
    from dacnn.networks.factory import adapt

    splits = load_data(data)
    return adapt(config, splits.input, splits.classes).eval()


def _input(channels: int, size: int) -> "Input":
    """What a network takes that has no data set yet."""
    from dacnn.networks.plan import Input

    return Input(size, size, channels, mean=(0.5,) * channels, std=(0.25,) * channels)


def audit(
    artefact: Positional[
        Annotated[
            Path, arg(help="run directory, .safetensors, .pt, .pt2 or .onnx file", metavar="ARTEFACT", help_behavior_hint="")
        ]
    ],
    /,
    *,
    against: Annotated[
        Path | None,
        arg(
            help="what it was made from: also find kernels that were altered or lost",
            metavar="REFERENCE",
            help_behavior_hint="",
        ),
    ] = None,
    memory: Annotated[
        bool, arg(help="load it in a fresh process and report the memory that adds (Linux)", help_behavior_hint="")
    ] = False,
    json: Json = False,
) -> None:
    """Find every copy of every kernel in a saved or exported model, scaled, transposed and blocked ones too.

    Exit status: 0 each kernel is there once, 1 copies or altered kernels, 2 it could not be read.

    Example: dacnn audit model.onnx --against runs/first --memory
    """
    from dacnn import tables
    from dacnn.measure.audit import audit as audit_artefact
    from dacnn.measure.runtimes import artefact_memory

    found = audit_artefact(artefact, against=against)
    added = artefact_memory(artefact) if memory else None
    if json:
        _print_json({**found.to_table(), **({"memory": dataclasses.asdict(added)} if added else {})})
    else:
        tables.show(tables.audit_table(found, added))
    if not found.single:
        sys.exit(1)


def count(
    network: Positional[NetworkOrFile],
    /,
    *,
    classes: Classes = 100,
    in_channels: InChannels = 3,
    size: Size = 32,
    measure: Annotated[
        bool, arg(help="train two steps for each, and tell what the allocator says as well", help_behavior_hint="")
    ] = False,
    json: Json = False,
    step_settings: OmitArgPrefixes[StepFlags] = StepFlags(),  # type: ignore[valid-type]  # noqa: B008
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Count parameters, bytes, multiply-adds and memory, beside the unshared twin and the rival that stores as much.

    Example: dacnn count dacnn14 --batch-size 64 --measure
    """
    from dacnn import tables
    from dacnn.measure.count import count as count_plan
    from dacnn.measure.memory import measure_training_memory, predict_training_memory
    from dacnn.networks.rival import rival
    from dacnn.training.precision import best_device, choose

    plan = _plan_of(network, classes, in_channels, size, _given(network_settings))
    training = TrainingConfig(**_given(step_settings))
    execution = choose(training, best_device())
    if measure:
        # the profiler that measures would tell of itself on standard error
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    columns: list[dict[str, Any]] = []
    for role, side in (("network", plan), ("unshared twin", plan.unshared()), ("equal-bytes rival", rival(plan))):
        predicted = predict_training_memory(side, training, execution)
        memory: dict[str, float] = {**predicted.to_table()}
        if measure:
            measured = measure_training_memory(side, training, execution)
            memory |= {"measured_peak_bytes": measured, "ratio": predicted.peak_bytes / measured}
        sizes = count_plan(side).to_table()
        columns.append({"role": role, "name": side.name, "width": side.stem.out_channels, **sizes, "training": memory})
    if json:
        _print_json({"training": training.to_table(), "execution": execution.to_table(), "columns": columns})
    else:
        tables.show(tables.count_table(columns, training, execution))


def _plan_of(network: str, classes: int, in_channels: int, size: int, given: dict[str, Any]) -> "Plan":
    """The plan of a network of the zoo, with what was given for it, or of a trained one."""
    from dacnn.checkpoint import load
    from dacnn.networks.zoo import DESIGNS

    if network in DESIGNS or not Path(network).exists():
        return _plan(NetworkConfig(network, **given), classes, in_channels, size)
    if given:
        raise _takes_no(network, given)
    return load(network).plan


def _plan(config: NetworkConfig, classes: int, channels: int, size: int) -> "Plan":
    """The plan of a network that has no data set yet."""
    from dacnn.networks.zoo import plan_of

    return plan_of(config, _input(channels, size), tuple(map(str, range(classes))))


def _plain(plan: "Plan") -> object:
    return json.loads(plan.to_json())


_COMMANDS: dict[str, Any] = {
    "train": train,
    "eval": eval,
    "predict": predict,
    "models": models,
    "show": show,
    "plan": plan,
    "fold": fold,
    "count": count,
    "audit": audit,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a refusal is one line on standard error and exit status 2.

    Args:
        arguments: The words behind `dacnn`; None: those of this process.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words == ["--version"]:
        print(f"dacnn {__version__}")
        return
    try:
        tyro.extras.subcommand_cli_from_dict(
            _COMMANDS,
            prog="dacnn",
            description="Anchored convolutional networks: many layers read one kernel, and it is stored once.",
            args=words,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    except Interrupted as stop:
        print(f"dacnn: {stop}", file=sys.stderr)
        sys.exit(130)
    except DacnnError as error:
        print(f"dacnn: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dacnn: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output (`| head`) has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

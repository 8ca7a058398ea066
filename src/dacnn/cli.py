"""The command line: it composes what stands above it and has no logic of its own.

Nothing that imports torch is imported before a command needs it, so that `dacnn --help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from dacnn import __version__
from dacnn.config import DataConfig, NetworkConfig
from dacnn.errors import ConfigError, DacnnError, Interrupted
from dacnn.flags import DataFlags, Into, Json, NetworkFlags, NetworkName, RunPath, Source, TrainingFlags, settings_of, word

if TYPE_CHECKING:
    from dacnn.networks.plan import Input, Plan


def _print_json(content: object) -> None:
    print(json.dumps(content, indent=2, default=str, ensure_ascii=False))


def train(
    network: Positional[NetworkName | None] = None,
    /,
    *,
    data: Source = None,
    recipe: Annotated[str | None, word("digits, fast, paper, or a TOML file", "RECIPE")] = None,
    out: Annotated[Path | None, word("run directory (default: a new one under runs/)", "RUN")] = None,
    resume: Annotated[bool, word("go on with the run in --out where it stopped")] = False,
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
            **settings_of(network_settings, data_settings, training_settings),
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
    png: Annotated[Path | None, word("draw the confusion matrix into this file", "FILE")] = None,
    json: Json = False,
    data_settings: OmitArgPrefixes[DataFlags] = DataFlags(),  # type: ignore[valid-type]  # noqa: B008
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Measure a trained network on the test images of its data set, or of another: top-1, top-5, loss, every class.

    Of a FILE.py:factory, the weights that the factory gives are measured, its kernels shared by --share.

    Example: dacnn eval runs/first --png confusion.png
    """
    from dacnn import tables
    from dacnn.checkpoint import load
    from dacnn.data.sources import load_data, load_test
    from dacnn.draw import draw_confusion
    from dacnn.measure.count import count
    from dacnn.networks.classifier import Classifier
    from dacnn.networks.factory import adapt, is_factory
    from dacnn.progress import bar
    from dacnn.training.evaluate import evaluate
    from dacnn.training.precision import best_device
    from dacnn.training.run import data_of

    network: Classifier
    if is_factory(str(run)):
        if data is None or into:
            raise ConfigError(f"{run} makes a network that saw no data set: name one with --data, and leave out --into")
        config = DataConfig(data, **settings_of(data_settings))
        splits = load_data(config)
        network = adapt(NetworkConfig(str(run), **settings_of(network_settings)), splits.input, splits.classes).eval()
    else:
        _refuse_settings(str(run), network_settings)
        network = load(run, into)
        config = data_of(run, data, **settings_of(data_settings))
    network = network.to(best_device())
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
    images: Positional[Annotated[tuple[Path, ...], word("image files, and folders of them", "IMAGE")]],
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
    from dacnn.checkpoint import load
    from dacnn.prediction import predict as predict_images
    from dacnn.progress import bar
    from dacnn.training.precision import best_device

    if not images:
        raise ConfigError("no images: name one or more files or folders")
    if top < 1:
        raise ConfigError(f"--top is {top}: expected 1 or more")
    with bar("classifying") as tick:
        predictions = predict_images(load(run, into).to(best_device()), images, top=top, tick=tick)
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
    network: Positional[
        Annotated[
            str,
            word("network of the zoo, run directory, .safetensors file or FILE.py:factory", "NAME"),
        ]
    ],
    /,
    *,
    classes: Annotated[int, arg(help="number of classes, for an untrained network")] = 100,
    in_channels: Annotated[int, arg(help="channels of an image, for an untrained network")] = 3,
    size: Annotated[int, arg(help="side of an image in pixels, for an untrained network")] = 32,
    into: Into = None,
    png: Annotated[Path | None, word("draw the plan into this file", "FILE")] = None,
    json: Json = False,
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Show a network's plan: who reads which kernel, parameters stored against used, multiply-adds.

    Example: dacnn show dacnn18-mix-reg --png plan.png
    """
    from dacnn import tables
    from dacnn.checkpoint import load
    from dacnn.draw import draw_plan
    from dacnn.measure.count import count
    from dacnn.networks.adapted import Adapted
    from dacnn.networks.classifier import Classifier
    from dacnn.networks.factory import adapt, is_factory
    from dacnn.networks.network import Network
    from dacnn.networks.plan import Plan
    from dacnn.networks.zoo import DESIGNS

    shown: Classifier | Plan
    if is_factory(network):
        config = NetworkConfig(network, **settings_of(network_settings))
        shown = adapt(config, _input(in_channels, size), _names(classes))
    elif network in DESIGNS or not Path(network).exists():
        shown = _plan(NetworkConfig(network, **settings_of(network_settings)), classes, in_channels, size)
    else:
        _refuse_settings(network, network_settings)
        shown = load(network, into)
    shown = shown.plan if isinstance(shown, Network) else shown
    counts = count(shown)
    if isinstance(shown, Plan):
        if png:
            draw_plan(shown, png)
        readers = {name: [layer.name for layer in layers] for name, layers in shown.readers().items()}
        table, content = tables.plan_table(shown, counts), {"plan": _plain(shown), "readers": readers}
    else:
        assert isinstance(shown, Adapted)
        if png:
            raise ConfigError(f"--png: {network} has no plan to draw: leave it out")
        table, content = tables.conversion_table(shown, counts), shown.conversion.to_table()
    if json:
        _print_json({**content, **counts.to_table()})
    else:
        tables.show(table)


def fold(
    run: Positional[RunPath],
    /,
    *,
    out: Annotated[Path, word("write the folded network into this .safetensors file", "FILE")],
    kernels: Annotated[int | None, word("kernels that come out of each bank", "INT")] = None,
    similarity: Annotated[
        float | None,
        word("or how alike layers must be to read one, 0 to 1 (default: 0.9)", "FLOAT"),
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
    from dacnn.training.run import data_of

    network = load(run)
    folded, done = fold_network(network, kernels=kernels, similarity=similarity)
    with bar("loading") as tick:
        images = load_test(
            data_of(run, data, **settings_of(data_settings)),
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


def plan(
    network: Positional[Annotated[str, word("network of the zoo, or FILE.py:factory", "NAME")]],
    /,
    *,
    budget: Annotated[
        str | None,
        word("propose the least sharing that stores no more than this, such as 100kB", "BYTES"),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "int8"], word("format in which the values are stored")] = "float32",
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
    from dacnn.measure.proposals import parse_bytes, propose_sharing

    config = NetworkConfig(network, **settings_of(network_settings))
    found, chosen = propose_sharing(
        config,
        _input(in_channels, size),
        _names(classes),
        budget_bytes=None if budget is None else parse_bytes(budget),
        bytes_per_value={"float32": 4, "bfloat16": 2, "int8": 1}[dtype],
    )
    if json:
        _print_json({"proposals": [proposal.to_table() for proposal in found], "chosen": chosen.to_table() if chosen else None})
        return
    tables.show(tables.proposal_table(f"{network}, values in {dtype}", found))
    if chosen:
        tables.show(f"fits {budget}: {chosen.flags} ({chosen.stored_bytes:,} bytes)")


def _refuse_settings(trained: str, flags: object) -> None:
    given = ", ".join("--" + name.replace("_", "-") for name in settings_of(flags))
    if given:
        raise ConfigError(f"{trained} is a trained network: it takes no {given}")


def _input(channels: int, size: int) -> "Input":
    """What a network takes that has no data set yet."""
    from dacnn.networks.plan import Input

    return Input(size, size, channels, mean=(0.5,) * channels, std=(0.25,) * channels)


def _names(classes: int) -> tuple[str, ...]:
    """Names of so many classes."""
    return tuple(map(str, range(classes)))


def _plan(config: NetworkConfig, classes: int, channels: int, size: int) -> "Plan":
    """The plan of a network that has no data set yet."""
    from dacnn.networks.zoo import plan_of

    return plan_of(config, _input(channels, size), _names(classes))


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
        print("dacnn: error:", *str(error).splitlines(), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("dacnn: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # the reader of our output (`| head`) has gone; nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)

"""Commands that train a network, and that use a trained one.

Nothing that imports torch is imported before a command needs it.
"""

import math
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, arg

from dacnn.config import DataConfig, NetworkConfig
from dacnn.errors import ConfigError, TrainingError
from dacnn.flags import (
    DataFlags,
    Into,
    Json,
    NetworkFlags,
    NetworkName,
    RunPath,
    Source,
    TestFlags,
    TrainingFlags,
    refuse_settings,
    settings_of,
    word,
)


def train(
    network: Positional[NetworkName] = None,
    /,
    *,
    data: Source = None,
    recipe: Annotated[str | None, word("digits, fast, paper, int8, or a TOML file", "RECIPE")] = None,
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
    tables.show_json(
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
    from dacnn.draw import check_picture, draw_confusion
    from dacnn.measure.count import count
    from dacnn.networks.classifier import Classifier
    from dacnn.networks.factory import adapted_as, is_factory
    from dacnn.progress import bar
    from dacnn.training.evaluate import evaluate
    from dacnn.training.precision import best_device
    from dacnn.training.run import data_of, own_data

    if png:
        # before the images are gone through
        check_picture(png)
    network: Classifier
    if is_factory(str(run)):
        if data is None or into:
            raise ConfigError(f"{run} makes a network that saw no data set: name one with --data, and leave out --into")
        config = DataConfig(data, **settings_of(data_settings))
        splits = load_data(config)
        network = adapted_as(NetworkConfig(str(run), **settings_of(network_settings)), splits.input, splits.classes).eval()
    else:
        refuse_settings(str(run), network_settings, data_settings)
        network = load(run, into)
        config = data_of(run, data, **settings_of(data_settings))
    network = network.to(best_device())
    with bar("loading") as tick, own_data(run, data, "--data"):
        images = load_test(config, network.input, network.classes, progress=lambda what, done, total: tick(done, total))
    with bar("evaluating") as tick:
        result = evaluate(network, images, tick=tick)
    if not math.isfinite(result.loss):
        raise TrainingError(f"{run}: gives values that are no numbers: the training went astray, or the file was damaged")
    if png:
        draw_confusion(result, png)
    counts = count(network)
    if not json:
        tables.show(tables.evaluation_table(result, config.source, counts))
        return
    tables.show_json(
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
    tables.show_json(
        [
            {
                "path": str(prediction.path),
                "class": prediction.classes[0],
                "probabilities": dict(zip(prediction.classes, prediction.probabilities, strict=True)),
            }
            for prediction in predictions
        ]
    )


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
    data_settings: OmitArgPrefixes[TestFlags] = TestFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Let layers of a template network that have become alike read one kernel; measure what that costs.

    Example: dacnn fold runs/template --kernels 2 --out folded.safetensors
    """
    from dacnn import tables
    from dacnn.checkpoint import check_place, load, save
    from dacnn.data.sources import load_test
    from dacnn.measure.count import count
    from dacnn.networks.fold import alike
    from dacnn.networks.fold import fold as fold_network
    from dacnn.progress import bar
    from dacnn.training.evaluate import evaluate
    from dacnn.training.precision import best_device
    from dacnn.training.run import data_of

    check_place(out)
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
    tables.show_json(
        {
            "groups": done.groups,
            "errors": done.errors,
            "similarity": {bank.name: {"layers": bank.layers, "cosines": bank.similarity.tolist()} for bank in alike(network)},
            **{name: {"top1": found.top1, **counts.to_table()} for name, (found, counts) in zip(names, measured, strict=True)},
        }
    )

"""Commands that tell what a network is made of, and what it takes, before it is trained or after.

Nothing that imports torch is imported before a command needs it.
"""

import json as json_text
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from dacnn.config import NetworkConfig, TrainingConfig
from dacnn.errors import ConfigError
from dacnn.flags import (
    Classes,
    InChannels,
    Into,
    Json,
    NetworkFlags,
    NetworkOrFile,
    Size,
    StepFlags,
    refuse_settings,
    settings_of,
    word,
)

if TYPE_CHECKING:
    from dacnn.networks.adapted import Adapted
    from dacnn.networks.plan import Input, Plan

# classes in the paper's tables
_PAPER_CLASSES = 100


def models(
    *,
    classes: Annotated[int, arg(help="number of classes")] = _PAPER_CLASSES,
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
        plan = _plan(NetworkConfig(name), _numbers(classes), 3, 32)
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
        tables.show_json(rows)
    else:
        tables.show(tables.zoo_table(rows, classes))


def show(
    network: Positional[NetworkOrFile],
    /,
    *,
    classes: Classes = None,
    in_channels: InChannels = 3,
    size: Size = 32,
    into: Into = None,
    png: Annotated[Path | None, word("draw the plan into this file", "FILE")] = None,
    steps: Annotated[bool, word("print the steps that are run elsewhere instead: what `dacnn export` writes")] = False,
    json: Json = False,
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Show a network's plan: who reads which kernel, parameters stored against used, multiply-adds.

    Example: dacnn show dacnn18-mix-reg --png plan.png
    """
    from dacnn import tables
    from dacnn.deploy.lower import lower
    from dacnn.deploy.roll import roll
    from dacnn.draw import draw_plan
    from dacnn.measure.count import count
    from dacnn.networks.network import create
    from dacnn.networks.plan import Plan

    shown = _shown(network, into, classes, in_channels, size, network_settings)
    counts = count(shown)
    if steps:
        lines = str(roll(lower(create(shown) if isinstance(shown, Plan) else shown))).splitlines()
        tables.show_json({"steps": lines, **counts.to_table()}) if json else print("\n".join(lines))
        return
    if isinstance(shown, Plan):
        if png:
            draw_plan(shown, png)
        readers = {name: [layer.name for layer in layers] for name, layers in shown.readers().items()}
        table, content = tables.plan_table(shown, counts), {"plan": json_text.loads(shown.to_json()), "readers": readers}
    else:
        if png:
            raise ConfigError(f"--png: {network} has no plan to draw: leave it out")
        table, content = tables.conversion_table(shown, counts), shown.conversion.to_table()
    if json:
        tables.show_json({**content, **counts.to_table()})
    else:
        tables.show(table)


def plan(
    network: Positional[Annotated[str, word("network of the zoo, or FILE.py:factory", "NAME")]],
    /,
    *,
    budget: Annotated[
        str | None,
        word("propose the least sharing that stores no more than this, such as 100kB; a file adds some kB", "BYTES"),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "int8"], word("format in which the values are stored")] = "float32",
    classes: Classes = None,
    in_channels: InChannels = 3,
    size: Size = 32,
    json: Json = False,
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Print what sharing would save, before anything is changed: every way of sharing, or those that are named.

    Example: dacnn plan net.py:make --budget 100kB
    """
    from dacnn import tables
    from dacnn.measure.proposals import parse_bytes, propose_sharing
    from dacnn.networks.zoo import DESIGNS

    if network not in DESIGNS and (Path(network).is_dir() or network.endswith(".safetensors")):
        raise ConfigError(
            f"{network}: shares as it was trained to: plan takes a network of the zoo or FILE.py:factory; "
            "`dacnn show` tells who reads what in a run"
        )
    config = NetworkConfig(network, **settings_of(network_settings))
    found, chosen = propose_sharing(
        config,
        _input(in_channels, size),
        _names(classes, network, in_channels, size),
        budget_bytes=None if budget is None else parse_bytes(budget),
        bytes_per_value={"float32": 4, "bfloat16": 2, "int8": 1}[dtype],
    )
    if json:
        tables.show_json(
            {"proposals": [proposal.to_table() for proposal in found], "chosen": chosen.to_table() if chosen else None}
        )
        return
    tables.show(tables.proposal_table(f"{network}, values in {dtype}", found))
    if chosen:
        # not wrapped: the flags are there to be copied
        print(f"fits {budget}: {chosen.flags} ({chosen.stored_bytes:,} bytes)")


def count(
    network: Positional[NetworkOrFile],
    /,
    *,
    classes: Classes = None,
    in_channels: InChannels = 3,
    size: Size = 32,
    into: Into = None,
    measure: Annotated[bool, word("train two steps for each, and tell what the allocator says as well")] = False,
    json: Json = False,
    step_settings: OmitArgPrefixes[StepFlags] = StepFlags(),  # type: ignore[valid-type]  # noqa: B008
    network_settings: OmitArgPrefixes[NetworkFlags] = NetworkFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Count parameters, bytes, multiply-adds and memory, beside the unshared twin and the rival that stores as much.

    Example: dacnn count dacnn14 --batch-size 64 --measure
    """
    from dacnn import tables
    from dacnn.measure.count import count as count_network
    from dacnn.measure.memory import measure_training_memory, predict_training_memory
    from dacnn.networks.adapted import Adapted
    from dacnn.networks.factory import adapted_as
    from dacnn.networks.plan import Plan
    from dacnn.networks.rival import rival
    from dacnn.training.precision import best_device, choose

    shown = _shown(network, into, classes, in_channels, size, network_settings)
    training = TrainingConfig(**settings_of(step_settings))
    sides: dict[str, Adapted | Plan] = {"network": shown}
    if isinstance(shown, Plan):
        sides |= {"unshared twin": shown.unshared(), "equal-bytes rival": rival(shown)}
    else:
        sides["unshared twin"] = adapted_as(NetworkConfig(into or network), shown.input, shown.classes)
    execution = choose(training, best_device(), foreign=not isinstance(shown, Plan))
    if measure:
        # the profiler that measures would tell of itself on standard error
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    columns: list[dict[str, Any]] = []
    for role, side in sides.items():
        predicted = predict_training_memory(side, training, execution)
        memory: dict[str, float] = {**predicted.to_table()}
        if measure:
            measured = measure_training_memory(side, training, execution)
            memory |= {"measured_peak_bytes": measured, "ratio": predicted.peak_bytes / measured}
        sizes = count_network(side).to_table()
        name, width = (side.name, side.stem.out_channels) if isinstance(side, Plan) else (network, None)
        columns.append({"role": role, "name": name, "width": width, **sizes, "training": memory})
    if json:
        tables.show_json({"training": training.to_table(), "execution": execution.to_table(), "columns": columns})
    else:
        tables.show(tables.count_table(columns, training, execution))


def _shown(network: str, into: str | None, classes: int | None, in_channels: int, size: int, flags: object) -> "Adapted | Plan":
    """The plan of a network of the zoo, or of a trained one; of a foreign one, which has none, the network itself."""
    from dacnn.checkpoint import load
    from dacnn.networks.adapted import Adapted
    from dacnn.networks.factory import adapted_as, is_factory
    from dacnn.networks.network import Network
    from dacnn.networks.zoo import DESIGNS

    names = _names(classes, network, in_channels, size)
    if is_factory(network):
        return adapted_as(NetworkConfig(network, **settings_of(flags)), _input(in_channels, size), names)
    if network in DESIGNS or not Path(network).exists():
        return _plan(NetworkConfig(network, **settings_of(flags)), names, in_channels, size)
    refuse_settings(network, flags)
    loaded = load(network, into)
    assert isinstance(loaded, Adapted | Network)
    return loaded if isinstance(loaded, Adapted) else loaded.plan


def _input(channels: int, size: int) -> "Input":
    """What a network takes that has no data set yet."""
    from dacnn.networks.plan import Input

    return Input(size, size, channels, mean=(0.5,) * channels, std=(0.25,) * channels)


def _names(classes: int | None, network: str, channels: int, size: int) -> tuple[str, ...]:
    """Names of so many classes, of an untrained network; where nobody says how many, those that a factory's module has."""
    from dacnn.networks.factory import classes_of, is_factory

    if classes is None and is_factory(network):
        return classes_of(network, _input(channels, size))
    return _numbers(_PAPER_CLASSES if classes is None else classes)


def _numbers(classes: int) -> tuple[str, ...]:
    return tuple(map(str, range(classes)))


def _plan(config: NetworkConfig, classes: tuple[str, ...], channels: int, size: int) -> "Plan":
    """The plan of a network that has no data set yet."""
    from dacnn.networks.zoo import plan_of

    return plan_of(config, _input(channels, size), classes)

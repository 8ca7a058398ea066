"""The networks by name: those of the paper, their regulated and mixed forms, the unshared ones they are compared with.

Source: Huang, Dwivedi, Roig, CVPR 2019 workshops, arXiv:1904.09764, and the model files its authors released.
Deviations: every reader has its own norm, also in the chains of 3 to 11 layers.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from dacnn.config import NetworkConfig, Share
from dacnn.errors import ConfigError, UnknownNameError
from dacnn.networks.plan import Block, Input, Layer, Plan, Regulator, Stage
from dacnn.sharing.anchors import Combine, Repeat, parameter_name
from dacnn.sharing.groups import match_groups
from dacnn.sharing.regulators import check_regulator


@dataclass(frozen=True)
class Design:
    """The few words from which a plan of the zoo is spelled out.

    Attributes:
        topology: `chain`: convolutions one behind the other, a pooling behind each stage. `residual`: blocks of two
            convolutions, a pooling between stages.
        depths: Convolutions (chain; the first stage counts the stem) or blocks (residual) of each stage.
        widths: Channels of each stage.
        share: `all`: layers of equal shape read one kernel; `stage` (which is `isomorphic` here): those of one stage do;
            `template`: they combine the templates of one bank; `none`. A stem, a layer that widens and a shortcut own their
            kernels. `repeat`: all but the stem tile one kernel, and shortcuts one of their own size.
        regulator: What stands behind shared kernels.
        templates: Templates of a bank.
        base_width: Channels of the kernel that is tiled; None: those of the narrowest stage.
    """

    topology: Literal["chain", "residual"]
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    share: Share = "all"
    regulator: Regulator | None = None
    templates: int = 4
    base_width: int | None = None


_PLAIN = (128,) * 5
_MIX = (64, 128, 256, 512, 512)
_POINTWISE = Regulator("pointwise")
# the paper's place in the mix networks: behind the second norm of a block, before the addition
_POINTWISE_BLOCK = Regulator("pointwise", "after-norm")

DESIGNS: dict[str, Design] = {
    "dacnn3": Design("chain", (2, 1), _PLAIN[:2]),
    "dacnn5": Design("chain", (2, 1, 1, 1), _PLAIN[:4]),
    "dacnn7": Design("chain", (2, 1, 2, 2), _PLAIN[:4]),
    "dacnn9": Design("chain", (3, 2, 2, 2), _PLAIN[:4]),
    "dacnn11": Design("chain", (3, 2, 3, 3), _PLAIN[:4]),
    "dacnn14": Design("chain", (2, 2, 3, 3, 3), _PLAIN),
    "dacnn18": Design("residual", (2, 2, 2, 2), _PLAIN[:4]),
    "dacnn24": Design("residual", (2, 3, 4, 2), _PLAIN[:4]),
    "dacnn34": Design("residual", (3, 4, 6, 3), _PLAIN[:4]),
    "dacnn14-reg": Design("chain", (2, 2, 3, 3, 3), _PLAIN, regulator=_POINTWISE),
    "dacnn18-reg": Design("residual", (2, 2, 2, 2), _PLAIN[:4], regulator=_POINTWISE),
    "dacnn24-reg": Design("residual", (2, 3, 4, 2), _PLAIN[:4], regulator=_POINTWISE),
    "dacnn34-reg": Design("residual", (3, 4, 6, 3), _PLAIN[:4], regulator=_POINTWISE),
    "dacnn14-mix": Design("chain", (2, 2, 3, 3, 3), _MIX),
    "dacnn18-mix": Design("residual", (2, 2, 2, 2), _MIX[:4]),
    "dacnn34-mix": Design("residual", (3, 4, 6, 3), _MIX[:4]),
    "dacnn18-mix-reg": Design("residual", (2, 2, 2, 2), _MIX[:4], regulator=_POINTWISE_BLOCK),
    "dacnn34-mix-reg": Design("residual", (3, 4, 6, 3), _MIX[:4], regulator=_POINTWISE_BLOCK),
    "vgg16": Design("chain", (2, 2, 3, 3, 3), _MIX, share="none"),
    "resnet18": Design("residual", (2, 2, 2, 2), _MIX[:4], share="none"),
    "resnet34": Design("residual", (3, 4, 6, 3), _MIX[:4], share="none"),
}


def design_of(config: NetworkConfig) -> Design:
    """The design that a config names, with the config's changes.

    Args:
        config: The name and the changes.

    Returns:
        The changed design.

    Raises:
        UnknownNameError: The zoo has no such network.
        ConfigError: A change does not fit the design.
    """
    if config.name not in DESIGNS:
        if "/" in config.name or config.name.endswith(".safetensors"):
            raise ConfigError(f"{config.name}: there is no such run or file, and no network of the zoo is called so")
        raise UnknownNameError("network", config.name, DESIGNS)
    if config.start is not None:
        raise ConfigError(
            f"network.start is '{config.start}': kernels of the zoo are drawn, those of FILE.py:factory are not: leave it out"
        )
    design = DESIGNS[config.name]
    depths = config.depths or design.depths
    # more stages than the design has go on at its last width
    widths = (design.widths + design.widths[-1:] * len(depths))[: len(depths)]
    if config.width is not None:
        scaled = [width * config.width / widths[0] for width in widths]
        if any(width != int(width) for width in scaled):
            raise ConfigError(
                f"network.width is {config.width}: "
                f"the stages of '{config.name}' have widths {widths}, whose ratio it cannot keep"
            )
        widths = tuple(map(int, scaled))
    if design.topology == "chain" and depths[0] < 1:
        raise ConfigError("network.depths: a chain's first stage counts the stem: expected 1 or more")
    share = config.share or ("none" if config.groups else design.share)
    for name, wanted in (("templates", "template"), ("base_width", "repeat")):
        if getattr(config, name) is not None and share != wanted:
            raise ConfigError(f"network.{name} is {getattr(config, name)}, but network.share is '{share}': expected '{wanted}'")
    return Design(
        design.topology,
        depths,
        widths,
        share,
        _regulator(config, design.regulator),
        config.templates or design.templates,
        config.base_width,
    )


def _regulator(config: NetworkConfig, designed: Regulator | None) -> Regulator | None:
    kind = config.regulator or (designed.kind if designed else "none")
    if kind == "none":
        if config.regulator_place or config.regulator_rank:
            raise ConfigError(
                "network.regulator_place and regulator_rank need a network.regulator: name one, or leave them out"
            )
        return None
    place = config.regulator_place or (designed.place if designed else "before-norm")
    rank = config.regulator_rank or (designed.rank if designed else None)
    check_regulator(kind, rank)
    return Regulator(kind, place, rank)


def spell(name: str, design: Design, input: Input, classes: tuple[str, ...]) -> Plan:
    """Spell a design out into a plan.

    Args:
        name: The plan's name.
        design: The design.
        input: What the network takes.
        classes: Names of the classes.

    Returns:
        The plan.

    Raises:
        PlanError: The plan cannot exist, such as one that halves its input too often.
    """
    channels = design.widths[0]
    stem = Layer("stem", "stem", input.channels, channels)
    stages = []
    for index, (depth, width) in enumerate(zip(design.depths, design.widths, strict=True)):
        blocks: list[Block] = []
        chain = design.topology == "chain"
        for position in range(depth - (chain and index == 0)):
            before = f"stage{index}." if chain else f"stage{index}.block{position}."
            if chain:
                blocks.append(Block((_layer(f"{before}conv{position}", channels, width, index, design),)))
            else:
                layers = (
                    _layer(f"{before}conv0", channels, width, index, design),
                    _layer(f"{before}conv1", width, width, index, design),
                )
                shortcut = _layer(f"{before}shortcut", channels, width, index, design, kernel_size=1)
                blocks.append(Block(layers, residual=True, shortcut=shortcut if channels != width else None))
            channels = width
        stages.append(Stage(tuple(blocks), pool=chain or index < len(design.depths) - 1))
    return Plan(name, input, classes, stem, tuple(stages))


def _layer(name: str, in_channels: int, out_channels: int, stage: int, design: Design, kernel_size: int = 3) -> Layer:
    """A layer and the kernel it reads."""
    kernel: str | Combine | Repeat = parameter_name(name)
    if design.share == "repeat":
        width = design.base_width or min(design.widths)
        kernel = Repeat("base" if kernel_size == 3 else f"base{kernel_size}x{kernel_size}", width, width)
    elif in_channels == out_channels and design.share == "template":
        kernel = Combine(f"width{out_channels}", design.templates)
    elif in_channels == out_channels and design.share != "none":
        kernel = f"width{out_channels}" if design.share == "all" else f"stage{stage}"
    return Layer(name, kernel, in_channels, out_channels, kernel_size)


def _grouped(plan: Plan, groups: tuple[str, ...]) -> Plan:
    """The plan with one kernel for the layers of each group."""
    kernels: dict[str, str | Combine | Repeat] = {}
    for name, layers in match_groups(groups, [layer.name for layer in plan.layers()]).items():
        kernels |= dict.fromkeys(layers, name)
    return plan.with_kernels(kernels)


def _regulated(plan: Plan, regulator: Regulator | None) -> Plan:
    """The plan with a regulator behind each shared convolution, or once a block where it stands behind the norm."""
    if regulator is None:
        return plan
    readers = plan.readers()

    def regulate(block: Block) -> Block:
        layers = [
            dataclasses.replace(layer, regulator=regulator)
            if len(readers[layer.anchor]) > 1 and (regulator.place == "before-norm" or layer is block.layers[-1])
            else layer
            for layer in block.layers
        ]
        return dataclasses.replace(block, layers=tuple(layers))

    stages = tuple(Stage(tuple(map(regulate, stage.blocks)), stage.pool) for stage in plan.stages)
    return dataclasses.replace(plan, stages=stages)


def plan_of(config: NetworkConfig, input: Input, classes: tuple[str, ...]) -> Plan:
    """The plan of a network of the zoo.

    Args:
        config: Which network, and what is changed in it.
        input: What it takes.
        classes: Names of the classes it tells apart.

    Returns:
        The plan.

    Raises:
        UnknownNameError: The zoo has no such network.
        ConfigError: A change does not fit the design.
        PlanError: The plan cannot exist.
    """
    design = design_of(config)
    plan = spell(config.name, design, input, classes)
    if config.groups:
        plan = _grouped(plan, config.groups)
    plan = _regulated(plan, design.regulator)
    if config.regulator not in (None, "none") and not any(layer.regulator for layer in plan.layers()):
        raise ConfigError(
            f"network.regulator is '{config.regulator}': no kernel of '{plan.name}' has several readers for it to stand behind"
        )
    return plan

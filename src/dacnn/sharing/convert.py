"""Any nn.Module and a rule -> the same module with one owner of kernels and readers of them.

Source of the rule `isomorphic`: Azadbakht et al. 2022, arXiv:2210.14151.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from dacnn.config import Start
from dacnn.errors import ConfigError, PlanError, UnknownNameError
from dacnn.sharing.anchors import Anchors, Combine, Expression, Shape, Stored, parameter_name
from dacnn.sharing.conversion import Conversion
from dacnn.sharing.readers import ForeignReader, become_reader, owner_of, regulator_behind
from dacnn.sharing.regulators import regulator_kind
from dacnn.sharing.rules import TRACED_RULES, Rule, check_group, check_rule, group
from dacnn.sharing.start import start_bank, start_value, take_up
from dacnn.sharing.survey import Layer, Survey, survey
from dacnn.sharing.trace import Example, Trace, copy_of, trace

_STARTS = ("mean", "first", "fit")
# a container runs or counts all its parts, and so may a forward pass that asks for them by one of these names
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_ALL_PARTS = {"children", "named_children", "modules", "named_modules", "_modules"}


def propose(
    module: nn.Module,
    rule: Rule = "all",
    *,
    regulator: str | None = None,
    regulator_rank: int | None = None,
    templates: int | None = None,
    example: Example | None = None,
) -> Conversion:
    """Find out what `anchor` would do; the arguments are those of `anchor`, and so are the errors."""
    settings = Conversion({}, {}, regulator, regulator_rank, templates)
    check_rule(rule, example is not None)
    found = survey(module, regulator)
    traced = trace(module, found.layers, example) if example is not None and rule in TRACED_RULES else None
    return _propose(found, rule, settings, traced)


def anchor(
    module: nn.Module,
    rule: Rule = "all",
    *,
    regulator: str | None = None,
    regulator_rank: int | None = None,
    templates: int | None = None,
    start: Start = "first",
    example: Example | None = None,
    generator: torch.Generator | None = None,
) -> tuple[nn.Module, Conversion]:
    """Let layers of a module share kernels: convolutions and linear layers of equal kernel shape and groups.

    Args:
        module: Any module; left as it is.
        rule: `all`: layers of equal kernel shape share; `stage`: those of them between two changes of resolution;
            `isomorphic`: those of a stage that also agree in stride, padding and dilation; `none`; a function from a
            layer's name and the layer to its group, within which those of equal shape share (False or None: it shares
            nothing); or lists of names and patterns such as `layer1.*.conv2`, a group each.
        regulator: What stands behind every reader: `pointwise`, `depthwise`, `low-rank`, `shift`; None: nothing.
        regulator_rank: Rank of a low-rank regulator.
        templates: Let a group combine this many templates instead of reading one kernel.
        start: Where a shared kernel begins: `first`: at the first layer's; `mean`; `fit`: at the least-squares fit to all,
            up to a gain per output channel that the batch norm behind a layer takes up. A bank begins at the best fit.
        example: What the module takes, for one traced forward pass of a copy: a tensor, a tuple of arguments or named
            arguments. Needed for the rules `stage` and `isomorphic`, and for `fit`.
        generator: Source of the start of low-rank regulators; None is PyTorch's global one.

    Returns:
        A converted copy, in which one `Anchors` module owns the kernels, and which layer reads which.

    Raises:
        UnknownNameError: There is no such rule, start or regulator.
        PlanError: Layers that were listed cannot share, or the module cannot be converted.
        ConfigError: An example is needed, or the rule is none.

    Example:
        >>> import dacnn, torch
        >>> block = lambda: torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> shared, mapping = dacnn.anchor(torch.nn.Sequential(block(), block(), block()))
        >>> dict(mapping.groups)
        {'conv8x8x3x3': ('0.0', '1.0', '2.0')}
    """
    settings = Conversion({}, {}, regulator, regulator_rank, templates)
    if start not in _STARTS:
        raise UnknownNameError("start", str(start), _STARTS)
    check_rule(rule, example is not None)
    fits = start == "fit" and templates is None
    if fits and example is None:
        raise ConfigError("start 'fit' needs to see which norm follows which layer: give an example of what the module takes")
    found = survey(module, regulator)
    traced = trace(module, found.layers, example) if example is not None and (fits or rule in TRACED_RULES) else None
    conversion = _propose(found, rule, settings, traced)
    return convert(module, conversion, start, traced.norms if fits and traced is not None else None, generator), conversion


def _propose(found: Survey, rule: Rule, settings: Conversion, traced: Trace | None) -> Conversion:
    if traced is not None and rule in TRACED_RULES:
        idle = [name for name in found.layers if name not in traced.stages]
        found = found.without(dict.fromkeys(idle, "was not called in the traced forward pass, so that its stage is unknown"))
    groups = group(found, rule, traced)
    if settings.templates is not None and (isinstance(rule, str) or callable(rule)):
        # of what a rule finds, some groups may be too small for a bank: they share nothing, unless all are
        groups = {name: readers for name, readers in groups.items() if len(readers) >= settings.templates} or groups
    return replace(settings, groups=groups, refused=found.refused)


def convert(
    module: nn.Module,
    conversion: Conversion,
    start: Start = "first",
    norms: Mapping[str, str] | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Do what a conversion says.

    Args:
        module: The module; left as it is.
        conversion: Who reads what.
        start: Where shared kernels begin.
        norms: Names of the batch norms that take up gains, by name of the layer.
        generator: Source of the start of low-rank regulators; None is PyTorch's global one.

    Returns:
        The converted copy.

    Raises:
        PlanError: The module has no such layers, or they cannot share.
    """
    found = survey(module, conversion.regulator)
    for name, members in conversion.groups.items():
        check_group(name, members, found)
    module = copy_of(module)
    if not conversion.groups:
        return module
    readers: dict[str, tuple[Expression, Shape]] = {
        reader: (_expression(kernel, conversion.templates), tuple(found.layers[reader].weight.shape))
        for kernel, names in conversion.groups.items()
        for reader in names
    }
    # no memory yet: every tensor is put in its place with its start value
    with torch.device("meta"):
        anchors = Anchors(readers).train(module.training)
    # channels that a shift moves no longer meet the norm's
    norms = norms if norms is not None and conversion.regulator != "shift" else {}
    for kernel, names in conversion.groups.items():
        _fill(anchors, kernel, module, {name: norms.get(name) for name in names}, start)
    home = _home(module, readers)
    for name in readers:
        layer = cast(Layer, module.get_submodule(name))
        kind = conversion.regulator
        behind = None if kind is None else regulator_behind(layer, kind, conversion.regulator_rank, generator)
        become_reader(layer, anchors, name, behind)
    home.add_module("anchors", anchors)
    return module


def _expression(kernel: str, templates: int | None) -> Expression:
    return Stored(kernel) if templates is None else Combine(kernel, templates)


@torch.no_grad()
def _fill(anchors: Anchors, kernel: str, module: nn.Module, norms: Mapping[str, str | None], start: Start) -> None:
    """Give a shared kernel its start value, and the norms behind its readers their gains.

    Args:
        anchors: The owner of the kernel.
        kernel: Its name.
        module: The module, its layers still with weights of their own.
        norms: For every reader the norm that takes up its gains, or None.
        start: Where the kernel begins.
    """
    layers = [cast(Layer, module.get_submodule(name)) for name in norms]
    weights = [layer.weight for layer in layers]
    templates = anchors[kernel].shape[0] if anchors.own_tensors(next(iter(norms))) else None
    if templates is not None or start == "fit":
        _check_numbers(dict(zip(norms, weights, strict=True)))
    if templates is None:
        value = start_value(weights, start, [norm is not None for norm in norms.values()])
    else:
        value = start_bank(weights, templates)
    learns = weights[0].requires_grad
    setattr(anchors, kernel, nn.Parameter(value.kernel, learns))
    for index, (name, norm) in enumerate(norms.items()):
        if norm is not None:
            take_up(module.get_submodule(norm), value.gains[index], layers[index].bias)
        if value.coefficients is not None:
            own = cast(nn.ParameterDict, anchors.own[parameter_name(name)])
            own["coefficients"] = nn.Parameter(value.coefficients[index].clone(), learns)


def _check_numbers(weights: Mapping[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        if not weight.is_meta and not bool(weight.sum(dtype=torch.float64).isfinite()):
            raise PlanError(f"layer '{name}' has weights that are infinite or no numbers: start with 'first', or mend them")


def _home(module: nn.Module, readers: Mapping[str, object]) -> nn.Module:
    """Where the owner of the kernels stands: at the root, or, where the root would run it or uses the name, in a reader."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    runs_all_parts = isinstance(module, _CONTAINERS) or (code is not None and _ALL_PARTS & set(code.co_names))
    places = [] if runs_all_parts else [module]
    for home in (*places, *(module.get_submodule(name) for name in readers)):
        if not hasattr(home, "anchors"):
            return home
    raise PlanError(
        "the module and its layers have an attribute 'anchors' already, where the shared kernels would stand: rename it"
    )


def conversion_of(module: nn.Module) -> Conversion:
    """Which layers of a converted module read which kernel, read off the module itself.

    Args:
        module: What `anchor` gave, or any other module, which then shares nothing.

    Returns:
        The conversion; what was refused is not known any more.
    """
    anchors = owner_of(module)
    if anchors is None:
        return Conversion({})
    reader, expression = next(iter(anchors.expressions.items()))
    regulator = cast(ForeignReader, module.get_submodule(reader)).regulator
    kind, rank = regulator_kind(regulator) if regulator is not None else (None, None)
    groups = {name: tuple(readers) for name, readers in anchors.readers().items()}
    return Conversion(groups, {}, kind, rank, expression.templates if isinstance(expression, Combine) else None)

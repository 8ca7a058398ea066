"""Any nn.Module and a rule -> the same module with one owner of kernels and readers of them.

Source of the rule `isomorphic`: Azadbakht et al. 2022, arXiv:2210.14151.
"""

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from dacnn.config import Start
from dacnn.errors import ConfigError, PlanError, UnknownNameError
from dacnn.sharing.anchors import Anchors, Combine, Expression, Shape, Stored
from dacnn.sharing.groups import match_groups
from dacnn.sharing.readers import Behind, become_reader, owner_of, regulator_behind
from dacnn.sharing.regulators import check_regulator, regulator_kind
from dacnn.sharing.start import start_bank, start_value, take_up
from dacnn.sharing.survey import Example, Layer, Survey, Trace, kernel_kind, regulated_past, survey, trace

# which layers share: a word, a function from a layer's name and the layer to its group (None or False: none), or lists of names
Rule = str | Callable[[str, nn.Module], Hashable] | Sequence[Sequence[str] | str]

_WORDS = ("all", "stage", "isomorphic", "none")
_NEED_A_TRACE = ("stage", "isomorphic")
_STARTS = ("mean", "first", "fit")


@dataclass(frozen=True)
class Conversion:
    """Which layers of a module read which kernel: what `anchor` did, or would do.

    Attributes:
        groups: For every shared kernel, the layers that read it.
        refused: Layers that cannot share, and why.
        regulator: What stands behind every reader.
        regulator_rank: Its rank, where it is low-rank.
        templates: Templates of every group's bank; None: the group reads one kernel.
    """

    groups: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str] = field(default_factory=dict)
    regulator: str | None = None
    regulator_rank: int | None = None
    templates: int | None = None

    def to_table(self) -> dict[str, Any]:
        """The fields that are set, as plain values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> "Conversion":
        """Read what `to_table` wrote.

        Args:
            table: The fields.

        Returns:
            The conversion.

        Raises:
            PlanError: The table is no conversion.
        """
        try:
            groups = {str(name): tuple(map(str, readers)) for name, readers in table["groups"].items()}
            return cls(**dict(table) | {"groups": groups})
        except (TypeError, AttributeError, KeyError) as error:
            raise PlanError(f"not a conversion: {error}") from None


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
    if regulator is not None:
        check_regulator(regulator, regulator_rank)
    found = survey(module)
    if regulator is not None:
        found = _without(found, regulated_past(module))
    traced = trace(module, found.layers, example) if example is not None and isinstance(rule, str) else None
    groups = _group(found, rule, traced)
    if templates is not None and (isinstance(rule, str) or callable(rule)):
        # a bank of as many templates as layers would store what they store
        groups = {name: readers for name, readers in groups.items() if len(readers) > templates}
    for name, readers in groups.items():
        if templates is not None and len(readers) < templates:
            raise PlanError(f"{name} has {len(readers)} layers for {templates} templates: expected at most as many templates")
    return Conversion(groups, found.refused, regulator, regulator_rank, templates)


def anchor(
    module: nn.Module,
    rule: Rule = "all",
    *,
    regulator: str | None = None,
    regulator_rank: int | None = None,
    templates: int | None = None,
    start: Start = "first",
    example: Example | None = None,
) -> tuple[nn.Module, Conversion]:
    """Let layers of a module share kernels: convolutions and linear layers of equal kernel shape and groups.

    Args:
        module: Any module; left as it is.
        rule: `all`: layers of equal kernel shape share; `stage`: those of them between two changes of resolution;
            `isomorphic`: those of a stage that also agree in stride, padding and dilation; `none`; a function from a
            layer's name and the layer to its group (False or None: it shares nothing; True: those of equal shape); or
            lists of names and patterns such as `layer1.*.conv2`, a group each.
        regulator: What stands behind every reader: `pointwise`, `depthwise`, `low-rank`, `shift`; None: nothing.
        regulator_rank: Rank of a low-rank regulator.
        templates: Let a group combine this many templates instead of reading one kernel.
        start: Where a shared kernel begins: `first`: at the first layer's; `mean`; `fit`: at the least-squares fit to all,
            up to a gain per output channel that the batch norm behind a layer takes up. A bank begins at the best fit.
        example: What the module takes, for one traced forward pass: a tensor, a tuple of arguments or named arguments. Needed
            for the rules `stage` and `isomorphic`, and for `fit`.

    Returns:
        A converted copy, in which one `Anchors` module owns the kernels, and which layer reads which.

    Raises:
        UnknownNameError: There is no such rule or regulator.
        PlanError: Layers that were listed cannot share, or the module cannot be converted.
        ConfigError: An example is needed, or the start is unknown.

    Example:
        >>> import dacnn, torch
        >>> block = lambda: torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        >>> shared, mapping = dacnn.anchor(torch.nn.Sequential(block(), block(), block()))
        >>> dict(mapping.groups)
        {'conv8x8x3x3': ('0.0', '1.0', '2.0')}
    """
    if start not in _STARTS:
        raise UnknownNameError("start", start, _STARTS)
    if start == "fit" and example is None and templates is None:
        raise ConfigError("start 'fit' needs to see which norm follows which layer: give an example of what the module takes")
    settings: dict[str, Any] = {"regulator": regulator, "regulator_rank": regulator_rank, "templates": templates}
    conversion = propose(module, rule, example=example, **settings)
    norms = trace(module, survey(module).layers, example).norms if start == "fit" and example is not None else {}
    return convert(module, conversion, start, norms), conversion


def convert(
    module: nn.Module, conversion: Conversion, start: Start = "first", norms: Mapping[str, str] | None = None
) -> nn.Module:
    """Do what a conversion says.

    Args:
        module: The module; left as it is.
        conversion: Who reads what.
        start: Where shared kernels begin.
        norms: Names of the batch norms that take up gains, by name of the layer.

    Returns:
        The converted copy.

    Raises:
        PlanError: The module has no such layers, or they cannot share.
    """
    layers = survey(module).layers
    for name, members in conversion.groups.items():
        _check_group(name, members, layers)
    module = copy.deepcopy(module)
    if not conversion.groups:
        return module
    readers: dict[str, tuple[Expression, Shape]] = {
        reader: (_expression(kernel, conversion.templates), tuple(layers[reader].weight.shape))
        for kernel, names in conversion.groups.items()
        for reader in names
    }
    anchors = Anchors(readers)
    for kernel, names in conversion.groups.items():
        _fill(anchors, kernel, names, module, conversion, start, norms or {})
    for name in readers:
        layer = cast(Layer, module.get_submodule(name))
        behind = regulator_behind(layer, conversion.regulator, conversion.regulator_rank) if conversion.regulator else None
        become_reader(layer, anchors, name, behind)
    _place(anchors, module, next(iter(readers)))
    return module


def _without(found: Survey, reasons: Mapping[str, str]) -> Survey:
    layers = {name: layer for name, layer in found.layers.items() if name not in reasons}
    return Survey(layers, found.refused | {name: why for name, why in reasons.items() if name in found.layers})


def _group(found: Survey, rule: Rule, traced: Trace | None) -> dict[str, tuple[str, ...]]:
    """The groups of a rule; a layer that is alone in its own shares nothing."""
    if isinstance(rule, str):
        if rule not in _WORDS:
            raise UnknownNameError("rule", rule, _WORDS)
        if rule in _NEED_A_TRACE and traced is None:
            raise ConfigError(
                f"rule '{rule}' needs to see where the resolution changes: give an example of what the module takes"
            )
        return _named(found, _keys(found, rule, traced))
    if callable(rule):
        wanted = {name: rule(name, layer) for name, layer in found.layers.items()}
        keys = {name: (key, kernel_kind(found.layers[name])) for name, key in wanted.items() if key not in (None, False)}
        return _named(found, cast(dict[str, Hashable], keys))
    groups = match_groups(rule, [*found.layers, *found.refused])
    if not groups:
        raise PlanError("the rule lists no groups: expected one or more, such as ['layer1.*.conv2']")
    for name, readers in groups.items():
        for reader in readers:
            if reader in found.refused:
                raise PlanError(f"layer '{reader}' cannot share: it {found.refused[reader]}")
        _check_group(name, readers, found.layers)
    return groups


def _keys(found: Survey, rule: str, traced: Trace | None) -> dict[str, Hashable]:
    """For every layer, what it must have in common with the others of its group."""
    if rule == "none":
        return {}
    keys: dict[str, Hashable] = {name: kernel_kind(layer) for name, layer in found.layers.items()}
    if rule == "all" or traced is None:
        return keys
    keys = {name: (key, traced.stages[name]) for name, key in keys.items() if name in traced.stages}
    return {name: (key, _geometry(found.layers[name])) for name, key in keys.items()} if rule == "isomorphic" else keys


def _geometry(layer: Layer) -> Hashable:
    if not isinstance(layer, _ConvNd):
        return None
    return layer.stride, layer.padding, layer.dilation, layer.padding_mode, layer.output_padding


def _named(found: Survey, keys: Mapping[str, Hashable]) -> dict[str, tuple[str, ...]]:
    """Groups of several layers, named after their kernels."""
    members: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    groups: dict[str, tuple[str, ...]] = {}
    for names in (names for names in members.values() if len(names) > 1):
        family, shape, channel_groups, *_ = kernel_kind(found.layers[names[0]])
        stem = f"{family}{'x'.join(map(str, cast(Shape, shape)))}{f'_groups{channel_groups}' if channel_groups != 1 else ''}"
        again = sum(name == stem or name.startswith(f"{stem}_at") for name in groups)
        groups[f"{stem}_at{again}" if again else stem] = tuple(names)
    return groups


def _check_group(name: str, readers: Sequence[str], layers: Mapping[str, Layer]) -> None:
    if len(readers) < 2:
        raise PlanError(f"{name} has {len(readers)} layers, {', '.join(readers)}: expected two or more to share a kernel")
    for reader in readers:
        if reader not in layers:
            raise PlanError(
                f"{name}: the module has no layer '{reader}' that can share a kernel: expected the module it was made for"
            )
        mine, first = kernel_kind(layers[reader]), kernel_kind(layers[readers[0]])
        if mine != first:
            what = ("kind", "kernel shape", "groups", "type", "device", "requires_grad")
            word, found, expected = next(item for item in zip(what, mine, first, strict=True) if item[1] != item[2])
            raise PlanError(
                f"layer '{reader}' has {word} {found}, '{readers[0]}' of the same group has {expected}: put them in two groups"
            )


def _expression(kernel: str, templates: int | None) -> Expression:
    return Stored(kernel) if templates is None else Combine(kernel, templates)


@torch.no_grad()
def _fill(
    anchors: Anchors,
    kernel: str,
    names: Sequence[str],
    module: nn.Module,
    conversion: Conversion,
    start: Start,
    norms: Mapping[str, str],
) -> None:
    """Give a shared kernel its start value, and the norms behind its readers their gains."""
    layers = [cast(Layer, module.get_submodule(name)) for name in names]
    weights = [layer.weight for layer in layers]
    behind = [_norm_of(module, norms.get(name), layer) for name, layer in zip(names, layers, strict=True)]
    if conversion.templates is None:
        value = start_value(weights, start, [norm is not None for norm in behind])
    else:
        value = start_bank(weights, conversion.templates)
    stored = anchors[kernel]
    assert isinstance(stored, nn.Parameter)
    stored.data, stored.requires_grad = value.kernel, weights[0].requires_grad
    for index, (name, layer, norm) in enumerate(zip(names, layers, behind, strict=True)):
        if norm is not None:
            take_up(norm, value.gains[index], layer.bias)
        if value.coefficients is not None:
            anchors.own_tensors(name)["coefficients"].data = value.coefficients[index].clone()


def _norm_of(module: nn.Module, name: str | None, layer: Layer) -> nn.Module | None:
    """The norm that takes up a layer's gains; a transposed convolution's channels are not its kernel's first dimension."""
    norm = module.get_submodule(name) if name else None
    fits = isinstance(norm, _BatchNorm) and norm.affine and not isinstance(layer, _ConvTransposeNd)
    return norm if fits else None


def _place(anchors: Anchors, module: nn.Module, first_reader: str) -> None:
    """Give the owner a place among the module's parts: at the root, where it can be told apart from what the root runs."""
    # a container runs or counts all its parts: there the first reader holds the owner
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    home = module.get_submodule(first_reader) if isinstance(module, containers) else module
    if hasattr(home, "anchors"):
        raise PlanError("the module has an attribute 'anchors' already, where the shared kernels would stand: rename it")
    home.add_module("anchors", anchors)


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
    expression = next(iter(anchors.expressions.values()))
    behind = module.get_submodule(next(iter(anchors.expressions))).regulator
    inner = behind.inner if isinstance(behind, Behind) else behind
    kind, rank = regulator_kind(cast(nn.Module, inner)) if inner is not None else (None, None)
    groups = {name: tuple(readers) for name, readers in anchors.readers().items()}
    return Conversion(groups, {}, kind, rank, expression.templates if isinstance(expression, Combine) else None)

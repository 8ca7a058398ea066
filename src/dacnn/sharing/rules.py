"""Which layers share: a rule and the layers of a module -> groups of layers, each with the name of its kernel."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import cast

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from dacnn.errors import ConfigError, PlanError, UnknownNameError
from dacnn.sharing.anchors import Shape
from dacnn.sharing.groups import match_groups
from dacnn.sharing.survey import Layer, Survey, kernel_kind
from dacnn.sharing.trace import Trace

# a word, a function from a layer's name and the layer to its group (None or False: none), or lists of names
Rule = str | Callable[[str, nn.Module], Hashable] | Sequence[Sequence[str] | str]
Groups = dict[str, tuple[str, ...]]

RULES = ("all", "stage", "isomorphic", "none")
TRACED_RULES = ("stage", "isomorphic")


def group(found: Survey, rule: Rule, traced: Trace | None = None) -> Groups:
    """Put layers into groups.

    Args:
        found: The layers.
        rule: See `dacnn.anchor`.
        traced: What a forward pass showed, for the rules that need it.

    Returns:
        For every shared kernel, by name, the layers that read it.

    Raises:
        UnknownNameError: There is no such rule.
        ConfigError: The rule is no rule.
        PlanError: Layers that were listed cannot share.
    """
    if isinstance(rule, str):
        return _named(found, _by_word(found, rule, traced))
    if callable(rule):
        return _named(found, _by_function(found, rule))
    if not isinstance(rule, Sequence) or not all(_is_names(names) for names in rule):
        raise ConfigError(f"rule is {rule!r}: expected one of {', '.join(RULES)}, a function, or lists of names of layers")
    return _listed(found, rule)


def check_rule(rule: Rule, has_example: bool) -> None:
    """Refuse words that are no rule, or that need an example where there is none."""
    if isinstance(rule, str) and rule not in RULES:
        raise UnknownNameError("rule", rule, RULES)
    if rule in TRACED_RULES and not has_example:
        raise ConfigError(f"rule '{rule}' needs to see where the resolution changes: give an example of what the module takes")


def check_group(name: str, readers: Sequence[str], found: Survey) -> None:
    """Refuse a group whose layers cannot read one kernel.

    Args:
        name: Name of the kernel.
        readers: Names of the layers.
        found: All layers.

    Raises:
        PlanError: There are fewer than two, one of them cannot share, or two differ in kind.
    """
    for reader in readers:
        if reader in found.refused:
            raise PlanError(f"layer '{reader}' cannot share: it {found.refused[reader]}")
        if reader not in found.layers:
            raise PlanError(
                f"{name}: the module has no layer '{reader}' that can share a kernel: expected the module it was made for"
            )
    if len(readers) < 2:
        raise PlanError(f"{name} has {len(readers)} layers, {', '.join(readers)}: expected two or more to share a kernel")
    first = kernel_kind(found.layers[readers[0]])
    what = ("kind", "kernel shape", "groups", "type", "device", "requires_grad")
    for reader in readers:
        for word, mine, expected in zip(what, kernel_kind(found.layers[reader]), first, strict=True):
            if mine != expected:
                other = f"'{readers[0]}' of the same group has {expected}"
                raise PlanError(f"layer '{reader}' has {word} {mine}, {other}: put them in two groups")


def _is_names(names: object) -> bool:
    return isinstance(names, str) or (isinstance(names, Sequence) and all(isinstance(name, str) for name in names))


def _by_word(found: Survey, rule: str, traced: Trace | None) -> dict[str, Hashable]:
    """For every layer, what it must have in common with the others of its group."""
    check_rule(rule, traced is not None)
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


def _by_function(found: Survey, rule: Callable[[str, nn.Module], Hashable]) -> dict[str, Hashable]:
    keys: dict[str, Hashable] = {}
    for name, layer in found.layers.items():
        key = rule(name, layer)
        key = bool(key) if isinstance(key, np.bool_) else key
        if isinstance(key, Tensor) or not _can_be_hashed(key):
            raise ConfigError(f"the rule gave {key!r} for layer '{name}': expected a name, a number, True, False or None")
        # not `in (None, False)`: a group may be called 0
        if key is not None and key is not False:
            keys[name] = (type(key), key, kernel_kind(layer))
    return keys


def _can_be_hashed(key: object) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _listed(found: Survey, rule: Sequence[Sequence[str] | str]) -> Groups:
    matched = match_groups(rule, [*found.layers, *found.refused, *found.aliases])
    if not matched:
        raise PlanError("the rule lists no groups: expected one or more, such as ['layer1.*.conv2']")
    groups: Groups = {}
    for name, readers in matched.items():
        # a layer that stands at several places is one layer
        first_names = dict.fromkeys(found.aliases.get(reader, reader) for reader in readers)
        for other, reader in ((other, reader) for other, taken in groups.items() for reader in taken if reader in first_names):
            raise PlanError(f"layer '{reader}' is in {other} and, by another of its names, in {name}: leave it in one of them")
        groups[name] = tuple(first_names)
        check_group(name, groups[name], found)
    return groups


def _named(found: Survey, keys: Mapping[str, Hashable]) -> Groups:
    """Groups of several layers, named after their kernels; a layer that is alone in its own shares nothing."""
    members: dict[Hashable, list[str]] = {}
    for name, key in keys.items():
        members.setdefault(key, []).append(name)
    groups: Groups = {}
    for names in (names for names in members.values() if len(names) > 1):
        family, shape, channel_groups, *_ = kernel_kind(found.layers[names[0]])
        stem = f"{family}{'x'.join(map(str, cast(Shape, shape)))}{f'_groups{channel_groups}' if channel_groups != 1 else ''}"
        again = sum(name == stem or name.startswith(f"{stem}_at") for name in groups)
        groups[f"{stem}_at{again}" if again else stem] = tuple(names)
    return groups

"""What changes no number: other shapes for the same numbers, copies, dropout; and channels that change places."""

import dataclasses

import torch
from torch.fx import Node

from dacnn.deploy.lowering.graph import shape_of
from dacnn.deploy.lowering.translation import Arguments, Step, Translation, Value
from dacnn.deploy.program import Rotate


def _roll(to: Translation, node: Node, given: Arguments) -> Value:
    x = to.as_seen(node, given["self"])
    if len(given["shifts"]) != 1 or [int(dim) % len(x.shape) for dim in given["dims"]] != [1]:
        raise to.refuse(node, "it moves more than the channels: expected one shift along dimension 1")
    by = -int(given["shifts"][0]) % x.shape[1]
    return to.emit(node, lambda out: Rotate(out, x.name, by)) if by else x


def _same(to: Translation, node: Node, given: Arguments) -> Value:
    """The same numbers in the same order, in whatever shape."""
    return to.seen(node, given["self"] if "self" in given else given["input"])


def _cloned(to: Translation, node: Node, given: Arguments) -> Value:
    return dataclasses.replace(_same(to, node, given), memory=to.new_memory())


def _dropout(to: Translation, node: Node, given: Arguments) -> Value:
    if given["train"] and given["p"]:
        raise to.refuse(node, "it drops values in evaluation mode too: let it follow the module's mode")
    return _same(to, node, given)


def _permute(to: Translation, node: Node, given: Arguments) -> Value:
    """Of another order are only dimensions of one: the numbers stay where they are."""
    shape = shape_of(given["self"])
    order = [dim % len(shape) for dim in given["dims"]]
    if [dim for dim in order if shape[dim] != 1] != [dim for dim in range(len(shape)) if shape[dim] != 1]:
        raise to.refuse(node, "it puts the numbers in another order: no step does this: replace the layer")
    return _same(to, node, given)


def _converted(to: Translation, node: Node, given: Arguments) -> Value:
    if node.meta["val"].dtype != torch.float32:
        raise to.refuse(node, f"it makes {str(node.meta['val'].dtype).removeprefix('torch.')}: expected float32 throughout")
    return _same(to, node, given)


_SAME = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "alias", "detach")
RESHAPES: dict[str, Step] = {
    **dict.fromkeys(_SAME, _same),
    "roll": _roll,
    "dropout": _dropout,
    "feature_dropout": _dropout,
    "permute": _permute,
    "clone": _cloned,
    "to": _converted,
    "_to_copy": _converted,
}

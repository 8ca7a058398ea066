"""What is done to every value by itself, or to two values that stand in one place, as steps."""

import math

import torch
from torch import Tensor
from torch.fx import Node

from dacnn.deploy.lowering.graph import shape_of
from dacnn.deploy.lowering.translation import Arguments, Step, Translation, Value, written
from dacnn.deploy.program import Activate, ActivationKind, Add, Multiply


def _activate(kind: ActivationKind) -> Step:
    def step(to: Translation, node: Node, given: Arguments) -> Value:
        x = to.as_seen(node, given["self"])
        return to.emit(node, lambda out: Activate(out, x.name, kind))

    return step


def _gelu(to: Translation, node: Node, given: Arguments) -> Value:
    if given["approximate"] != "none":
        raise to.refuse(node, f"its form is '{given['approximate']}': expected the exact one, approximate='none'")
    return _activate("gelu")(to, node, given)


def _clip(to: Translation, node: Node, given: Arguments) -> Value:
    x = to.as_seen(node, given["self"])
    bounds = [given.get(key, given.get(f"{key}_val")) for key in ("min", "max")]
    known = [to.known(bound) for bound in bounds]
    if any(
        (tensor is None and bound is not None) or (tensor is not None and tensor.numel() != 1)
        for tensor, bound in zip(known, bounds, strict=True)
    ):
        raise to.refuse(node, "its bounds are no two numbers")
    low, high = (end if tensor is None else float(tensor) for tensor, end in zip(known, (-math.inf, math.inf), strict=True))
    if (low, high) == (0.0, math.inf):
        return to.emit(node, lambda out: Activate(out, x.name))
    return to.emit(node, lambda out: Activate(out, x.name, "clip", low, high))


def _relu6(to: Translation, node: Node, given: Arguments) -> Value:
    return _clip(to, node, given | {"min": 0.0, "max": 6.0})


def _add(to: Translation, node: Node, given: Arguments, sign: float = 1.0) -> Value:
    left, right = given["self"], given["other"]
    factor = sign * float(given.get("alpha") or 1.0)
    known_left, known_right = to.known(left), to.known(right)
    if known_right is not None:
        return _moved(to, node, left, None, known_right * factor, right)
    if known_left is not None:
        scale = None if factor == 1 else torch.tensor(factor, dtype=torch.float64)
        return _moved(to, node, right, scale, known_left, left)
    x, y = to.as_seen(node, left), to.as_seen(node, right)
    if x.shape != y.shape:
        raise to.refuse(node, f"it adds {written(x.shape)} and {written(y.shape)}: expected two values of one shape")
    if factor != 1:
        y = to.affine(node, y, torch.full((y.shape[1],), factor, dtype=torch.float64), None)
    return to.emit(node, lambda out: Add(out, x.name, y.name))


def _subtract(to: Translation, node: Node, given: Arguments) -> Value:
    return _add(to, node, given, sign=-1.0)


def _subtract_from(to: Translation, node: Node, given: Arguments) -> Value:
    return _add(to, node, given | {"self": given["other"], "other": given["self"]}, sign=-1.0)


def _multiply(to: Translation, node: Node, given: Arguments) -> Value:
    left, right = given["self"], given["other"]
    for argument, factor in ((left, right), (right, left)):
        known = to.known(factor)
        if known is not None:
            return _moved(to, node, argument, known, None, factor)
    x, y = to.as_seen(node, left), to.as_seen(node, right)
    if x.shape != y.shape and x.shape == (*y.shape[:2], 1, 1):
        x, y = y, x
    if x.shape != y.shape and y.shape != (*x.shape[:2], 1, 1):
        raise to.refuse(
            node,
            f"it multiplies {written(x.shape)} and {written(y.shape)}: expected one shape, or one number for each channel",
        )
    return to.emit(node, lambda out: Multiply(out, x.name, y.name))


def _divide(to: Translation, node: Node, given: Arguments) -> Value:
    divisor = to.known(given["other"])
    if divisor is None or given.get("rounding_mode"):
        raise to.refuse(node, "it divides by what follows from the images, or rounds: expected a known number for each channel")
    return _moved(to, node, given["self"], 1 / divisor, None, given["other"])


def _negate(to: Translation, node: Node, given: Arguments) -> Value:
    return _moved(to, node, given["self"], torch.tensor(-1.0, dtype=torch.float64), None, -1)


def _moved(to: Translation, node: Node, argument: object, scale: Tensor | None, shift: Tensor | None, source: object) -> Value:
    """A value times or plus known numbers, which come from `source`."""
    x = to.as_seen(node, argument)
    if x.shape != shape_of(node):
        raise to.refuse(node, f"it makes {written(shape_of(node))} of {written(x.shape)}: expected one number for each channel")
    vectors = [None if tensor is None else to.per_channel(node, tensor, x.shape) for tensor in (scale, shift)]
    scale_name, shift_name = (None if tensor is None else to.kernels.name_of(tensor, source) for tensor in (scale, shift))
    return to.affine(node, x, *vectors, scale_name=scale_name, shift_name=shift_name)


POINTWISE: dict[str, Step] = {
    "relu": _activate("relu"),
    "sigmoid": _activate("sigmoid"),
    "silu": _activate("silu"),
    "hardsigmoid": _activate("hardsigmoid"),
    "hardswish": _activate("hardswish"),
    "tanh": _activate("tanh"),
    "gelu": _gelu,
    "relu6": _relu6,
    "hardtanh": _clip,
    "clamp": _clip,
    "clamp_min": _clip,
    "clamp_max": _clip,
    "add": _add,
    "sub": _subtract,
    "rsub": _subtract_from,
    "mul": _multiply,
    "div": _divide,
    "neg": _negate,
}

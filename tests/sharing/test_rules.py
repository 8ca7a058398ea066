"""Rules say which layers share; what they cannot mean is refused with the layer's name."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dacnn
from dacnn.errors import ConfigError, PlanError, UnknownNameError
from foreign import NETWORKS, WIDTH, chain, make

X = torch.randn(2, WIDTH, 9, 9, generator=torch.Generator().manual_seed(0))


def groups(module: nn.Module, rule: Any, **settings: Any) -> dict[str, tuple[str, ...]]:
    return dict(dacnn.anchor(module, rule, **settings)[1].groups)


# ---------------------------------------------------------------- words


EXPECTED: dict[str, dict[str, int]] = {
    "resnet": {"conv8x8x3x3": 4, "conv16x16x3x3": 3},
    "resnet-bottleneck": {"conv4x4x3x3": 2, "conv16x4x1x1": 2, "conv8x8x3x3": 2, "conv32x8x1x1": 2},
    "convnext": {
        "conv8x1x7x7_groups8": 2,
        "linear32x8": 2,
        "linear8x32": 2,
        "conv16x1x7x7_groups16": 2,
        "linear64x16": 2,
        "linear16x64": 2,
    },
    "unet": {"conv8x8x3x3": 7, "transposed8x8x2x2": 2, "conv8x16x3x3": 2},
    "convmixer": {"conv8x1x5x5_groups8": 3, "conv8x8x1x1": 3},
    "mlp-mixer": {"linear32x16": 2, "linear16x32": 2, "linear16x8": 2, "linear8x16": 2},
    "attention": {"linear8x8": 2, "linear16x8": 2, "linear8x16": 2},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_all_puts_layers_of_equal_kernels_together(name: str) -> None:
    module, _ = make(name)
    found = groups(module, "all")
    assert {kernel: len(readers) for kernel, readers in found.items()} == EXPECTED[name]
    for readers in found.values():
        assert len({tuple(module.get_submodule(reader).weight.shape) for reader in readers}) == 1


@pytest.mark.parametrize("name", NETWORKS)
def test_a_stage_is_in_a_group_of_all_and_isomorphic_layers_in_a_stage(name: str) -> None:
    module, x = make(name)
    found = [groups(module, rule, example=x) for rule in ("all", "stage", "isomorphic")]
    for wide, narrow in itertools.pairwise(found):
        for readers in narrow.values():
            assert any(set(readers) <= set(others) for others in wide.values())
    assert all(len(readers) > 1 for each in found for readers in each.values())


def test_stages_of_a_unet_are_told_apart_though_shapes_are_equal() -> None:
    module, x = make("unet")
    assert groups(module, "stage", example=x) == {
        "conv8x8x3x3": ("down.1.0", "down.1.3"),
        "conv8x8x3x3_at1": ("middle.0", "middle.3"),
    }


def test_isomorphic_layers_agree_in_stride_padding_and_dilation() -> None:
    module, x = make("resnet")
    stage, isomorphic = (groups(module, rule, example=x) for rule in ("stage", "isomorphic"))
    assert len(stage["conv16x16x3x3"]) == len(isomorphic["conv16x16x3x3"]) == 3
    layers = [
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
    ]
    assert groups(nn.Sequential(*layers), "isomorphic", example=X) == {
        "conv8x8x3x3": ("0", "3"),
        "conv8x8x3x3_at1": ("2", "4"),
    }
    assert groups(nn.Sequential(*layers), "stage", example=X) == {"conv8x8x3x3": ("0", "1", "2", "3", "4")}


def test_frozen_layers_share_among_themselves() -> None:
    module = chain(depth=4)
    module[1].requires_grad_(False)
    module[2].requires_grad_(False)
    assert groups(module, "all") == {"conv8x8x3x3": ("0.0", "3.0"), "conv8x8x3x3_at1": ("1.0", "2.0")}


# ---------------------------------------------------------------- functions


FUNCTIONS: dict[str, tuple[Callable[[str, nn.Module], Any], list[str]]] = {
    "all": (lambda name, layer: True, ["0123"]),
    "none": (lambda name, layer: None, []),
    "no": (lambda name, layer: False, []),
    "some": (lambda name, layer: name != "1.0", ["023"]),
    "numpy": (lambda name, layer: np.any([name == "1.0", name == "2.0"]), ["12"]),
    "halves": (lambda name, layer: "early" if name < "2" else "late", ["01", "23"]),
    "numbers from 0": (lambda name, layer: int(name[0]) // 2, ["01", "23"]),
    "a number is not True": (lambda name, layer: True if name < "2" else 1, ["01", "23"]),
    "pairs": (lambda name, layer: (layer.stride, int(name[0]) % 2), ["02", "13"]),
    "alone": (lambda name, layer: name, []),
}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_a_function_gives_each_layer_its_group(case: str) -> None:
    rule, expected = FUNCTIONS[case]
    found = groups(chain(depth=4), rule)
    assert list(found.values()) == [tuple(f"{digit}.0" for digit in digits) for digits in expected]


def test_a_group_of_a_function_is_parted_by_shape() -> None:
    module = nn.Sequential(*[nn.Conv2d(8, 8, side) for side in (3, 1, 3, 1)], nn.Linear(8, 8))
    assert groups(module, lambda name, layer: "block") == {"conv8x8x3x3": ("0", "2"), "conv8x8x1x1": ("1", "3")}


def test_what_a_function_cannot_mean_is_refused() -> None:
    for rule in (lambda name, layer: [name], lambda name, layer: layer.weight.sum() > 0, lambda name, layer: ([],)):
        with pytest.raises(ConfigError, match=r"the rule gave .* for layer '0\.0': expected a name, a number, True, False or"):
            dacnn.anchor(chain(), rule)


# ---------------------------------------------------------------- lists


def test_lists_of_names_and_patterns_are_a_group_each() -> None:
    module, _ = make("unet")
    rule = [["down.*"], "join.0.3+join.1.3", ["up.0", "up.1"]]
    with pytest.raises(PlanError, match=r"layer 'down\.0\.3' has kernel shape \(8, 8, 3, 3\), 'down\.0\.0' of the same group"):
        dacnn.anchor(module, rule)
    rule = [["down.1.*", "down.0.3"], "join.0.3+join.1.3", ("up.?",)]
    assert groups(module, rule) == {
        "group0": ("down.0.3", "down.1.0", "down.1.3"),
        "group1": ("join.0.3", "join.1.3"),
        "group2": ("up.0", "up.1"),
    }
    assert groups(module, tuple(rule)) == groups(module, rule)


LISTS: dict[str, tuple[Any, str]] = {
    "nothing": ([], "the rule lists no groups: expected one or more"),
    "an empty group": ([[]], r"group 0 is \[\]: expected names of layers or patterns"),
    "an empty name": ([""], "group 0 is ''"),
    "unknown": ([["0.0", "7.0"]], "group 0 names '7.0', which is no layer: expected some of 0.0, 1.0"),
    "a norm": (["0.1+1.1"], "group 0 names '0.1', which is no layer"),
    "overlapping": (["0.0+1.0", "1.0+2.0"], "layer '1.0' is in group0 and in group1: leave it in one"),
    "one layer": (["0.0"], "group0 has 1 layers, 0.0: expected two or more to share a kernel"),
    "shapes": ([["0.0", "5"]], r"layer '5' has kernel shape \(8, 8, 1, 1\), '0.0' of the same group has \(8, 8, 3, 3\): put"),
    "groups": ([["0.0", "6"]], "layer '6' has groups 2, '0.0' of the same group has 1: put them in two groups"),
    "kinds": ([["0.0", "7"]], "layer '7' has kind transposed, '0.0' of the same group has conv"),
    "types": ([["0.0", "8"]], "layer '8' has type torch.float64, '0.0' of the same group has torch.float32"),
    "devices": ([["0.0", "9"]], "layer '9' has device meta, '0.0' of the same group has cpu"),
    "frozen": ([["0.0", "10"]], "layer '10' has requires_grad False, '0.0' of the same group has True"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_cannot_be_meant_is_refused(case: str) -> None:
    rule, message = LISTS[case]
    others = [
        nn.Conv2d(8, 8, 1),
        # of the same kernel shape
        nn.Conv2d(16, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, dtype=torch.float64),
        nn.Conv2d(8, 8, 3, device="meta"),
        nn.Conv2d(8, 8, 3).requires_grad_(False),
    ]
    module = nn.ModuleList([*chain(depth=5), *others])
    with pytest.raises(PlanError, match=message):
        dacnn.anchor(module, rule)


def test_what_is_no_rule_is_refused_with_the_rules_there_are() -> None:
    for word in ("", "every", "layer1.conv"):
        with pytest.raises(UnknownNameError, match=f"unknown rule '{word}': expected one of all, isomorphic, none, stage"):
            dacnn.anchor(chain(), word)
    for rule in (None, 3, {"first": ["0.0"]}, {"0.0", "1.0"}, [["0.0", 1]], [None]):
        with pytest.raises(ConfigError, match="rule is .*: expected one of all, stage, isomorphic, none, a function"):
            dacnn.anchor(chain(), rule)  # type: ignore[arg-type]

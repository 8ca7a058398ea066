"""Groups are found as listed, and what cannot be meant is refused."""

from collections.abc import Sequence

import pytest

from dacnn.errors import PlanError
from dacnn.sharing.groups import match_groups

NAMES = ["stem", "a.conv0", "a.conv1", "b.conv0", "b.conv1"]


def test_names_and_patterns_are_found_in_the_order_of_the_network() -> None:
    assert match_groups(["a.*"], NAMES) == {"group0": ("a.conv0", "a.conv1")}
    assert match_groups(["b.conv1+a.conv?", "stem"], NAMES) == {
        "group0": ("a.conv0", "a.conv1", "b.conv1"),
        "group1": ("stem",),
    }
    assert match_groups([["b.conv1", "a.conv0"]], NAMES) == {"group0": ("a.conv0", "b.conv1")}


@pytest.mark.parametrize("group", ["", "a.*+", [], [""], "+"])
def test_an_empty_group_is_refused(group: str | Sequence[str]) -> None:
    with pytest.raises(PlanError, match="group 0 is .*: expected names of layers or patterns"):
        match_groups([group], NAMES)


def test_a_pattern_that_names_nothing_is_refused_with_the_layers_there_are() -> None:
    with pytest.raises(PlanError, match=r"group 1 names 'c\.\*', which is no layer: expected some of stem, a\.conv0"):
        match_groups(["stem", "a.conv0+c.*"], NAMES)


def test_of_many_layers_a_message_names_the_first() -> None:
    with pytest.raises(PlanError, match=r"expected some of layer0, .*, layer11, \.\.\. \(50 layers\)$"):
        match_groups(["conv"], [f"layer{index}" for index in range(50)])


def test_a_layer_in_two_groups_is_refused() -> None:
    with pytest.raises(PlanError, match=r"layer 'a\.conv1' is in group0 and in group1: leave it in one"):
        match_groups(["a.*", "*.conv1"], NAMES)

"""The rival stores as much as the network it is compared with, and is the widest that does."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import dacnn
from dacnn.config import NetworkConfig
from dacnn.errors import PlanError
from dacnn.networks.network import Network
from dacnn.networks.plan import Input, Layer, Plan
from dacnn.networks.rival import rival
from dacnn.networks.zoo import DESIGNS, plan_of

CLASSES = tuple("0123456789")


def planned(name: str, classes: tuple[str, ...] = CLASSES, channels: int = 3, **changes: Any) -> Plan:
    input = Input(channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels)
    return plan_of(NetworkConfig(name, **changes), input, classes)


def stored(plan: Plan) -> int:
    return sum(parameter.numel() for parameter in Network(plan).parameters())


def shapes(plan: Plan) -> list[tuple[int, ...]]:
    return [layer.kernel_shape for layer in plan.layers()]


def own(plan: Plan) -> Iterator[Layer]:
    """The layers, but for the names of the kernels they own."""
    return (replace(layer, kernel="own") for layer in plan.layers())


@pytest.mark.parametrize(("classes", "width"), [(10, 37), (100, 38)])
def test_the_rival_of_dacnn14_is_the_unshared_network_of_about_width_38(classes: int, width: int) -> None:
    names = tuple(map(str, range(classes)))
    found = rival(planned("dacnn14", names))
    expected = planned("dacnn14", names, share="none", width=width)
    assert list(own(found)) == list(own(expected))
    assert all(len(readers) == 1 for readers in found.readers().values())


@pytest.mark.parametrize("name", ["dacnn3", "dacnn14", "dacnn14-reg", "dacnn18", "dacnn34"])
def test_it_stores_at_most_as_much_and_one_channel_more_would_store_more(name: str) -> None:
    plan = planned(name, width=32)
    found = rival(plan)
    wider = planned(name, width=found.stem.out_channels + 1, share="none", regulator="none")
    assert stored(found) <= stored(plan) < stored(wider)


@pytest.mark.parametrize("name", ["dacnn14-mix", "dacnn18-mix-reg"])
def test_stages_keep_their_ratio_up_to_rounding(name: str) -> None:
    plan = planned(name, width=16)
    found = rival(plan)
    assert stored(found) <= stored(plan)
    factor = max(layer.out_channels for layer in found.layers()) / max(layer.out_channels for layer in plan.layers())
    for before, after in zip(plan.layers(), found.layers(), strict=True):
        assert abs(after.out_channels - factor * before.out_channels) <= 0.5
        assert before.name == after.name and before.kernel_size == after.kernel_size


@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_image_and_classes_stay(name: str) -> None:
    # as wide as the image has channels: the number of the stem's input is not that of a width
    plan = planned(name, channels=8, width=8)
    found = rival(plan)
    assert found.input == plan.input and found.classes == plan.classes
    assert found.stem.in_channels == 8
    assert not any(layer.regulator for layer in found.layers())


@pytest.mark.parametrize("name", ["vgg16", "resnet18"])
def test_an_unshared_network_is_its_own_rival(name: str) -> None:
    plan = planned(name, width=8)
    assert shapes(rival(plan)) == shapes(plan)


def test_a_network_that_is_mostly_regulators_has_a_rival_wider_than_itself() -> None:
    plan = planned("dacnn3", width=16, depths=(2, 2), regulator="low-rank", regulator_rank=100)
    found = rival(plan)
    assert found.stem.out_channels > 16
    assert stored(found) <= stored(plan)


def test_a_network_and_its_plan_have_the_same_rival() -> None:
    network = dacnn.create("dacnn14", width=16)
    assert rival(network) == rival(network.plan)


def test_a_network_too_narrow_for_a_rival_is_refused() -> None:
    plan = planned("dacnn18", width=2, depths=(25, 25, 25, 25))
    with pytest.raises(PlanError, match=r"its unshared twin of one channel .*: it has no rival, make it wider"):
        rival(plan)

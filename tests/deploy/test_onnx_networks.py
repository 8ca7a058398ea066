"""Networks of every kind go through both forms of ONNX, exact and with each kernel once."""

from typing import Any

import hypothesis.strategies as st
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import foreign
from dacnn.config import NetworkConfig
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.program import Program
from dacnn.deploy.roll import roll
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapted_as
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import DESIGNS
from interpreter import run
from onnx_programs import check_logits, optimised_bytes, uint8_images
from reference import PLACES, REGULATORS, one_thread, plans, randomise, rank_of  # noqa: F401  (a fixture)

FORMS = ("small", "fast")


def check(network: Classifier, relative: float = 1e-4) -> Program:
    """Both forms against the interpreter of the flat program; the loop form holds no kernel twice, however it is optimised."""
    flat = lower(network)
    images = uint8_images(2, flat.input.height, flat.input.width, flat.input.channels)
    expected = run(flat, images)
    rolled = roll(flat)
    for model in (to_onnx(flat), *(to_onnx_loop(rolled, form=form) for form in FORMS)):
        onnx.checker.check_model(model, full_check=True)
        check_logits(model, images, expected, relative)
        assert model.ByteSize() <= 1.05 * flat.stored_bytes + 32 * 1024
    return rolled


@pytest.mark.parametrize("name", DESIGNS)
def test_every_network_of_the_zoo_goes_through_both_forms(name: str) -> None:
    check(randomise(create(name, width=4, num_classes=3, seed=0)))


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18-mix"])
@pytest.mark.parametrize("share", ["stage", "template", "repeat", "none"])
def test_every_scheme_goes_through_both_forms(name: str, share: str) -> None:
    check(randomise(create(name, width=4, num_classes=3, seed=0, share=share)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", REGULATORS)
def test_every_regulator_goes_through_both_forms(kind: str, place: str) -> None:
    changes: dict[str, Any] = {"regulator": kind, "regulator_place": place, "regulator_rank": rank_of(kind)}
    check(randomise(create("dacnn18", width=4, num_classes=3, seed=0, **changes)))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(plan=plans(), seed=st.integers(0, 99))
def test_any_plan_goes_through_both_forms(plan: Plan, seed: int) -> None:
    # of deep networks of wild statistics, float32 itself is no better
    check(randomise(Network(plan, torch.Generator().manual_seed(seed)), seed), relative=1e-3)


@pytest.mark.parametrize(
    ("name", "sizes", "side"),
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [3, 3], "layer_type": "basic"}, 32),
        ("EfficientNet", {"width_coefficient": 0.1, "depth_coefficient": 0.2, "hidden_dim": 128, "image_size": 32}, 32),
        ("MobileNetV1", {"depth_multiplier": 0.25}, 33),
    ],
)
def test_converted_networks_of_transformers_go_through_both_forms(name: str, sizes: dict[str, Any], side: int) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=5, **sizes)
    module = foreign.stirred(getattr(transformers, f"{name}ForImageClassification")(config))
    rolled = check(adapted_as(NetworkConfig(name="foreign.py:make", share="all"), Input(side, side), tuple("abcde"), module))
    for form in FORMS:
        # what a runtime makes of it holds no kernel twice; blocks of channels are filled up
        assert optimised_bytes(to_onnx_loop(rolled, form=form)) <= 1.1 * rolled.stored_bytes + 32 * 1024

"""A lowered network computes what the network computes, names what it stores, and holds each kernel once, as it is."""

import copy
import dataclasses
import math
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import dacnn
import foreign
import interpreter
from dacnn.config import NetworkConfig
from dacnn.deploy.lower import lower
from dacnn.deploy.program import (
    CombinedKernel,
    Convolve,
    Flatten,
    Normalize,
    Program,
    RepeatedKernel,
    ScaleShift,
    StoredKernel,
    operands,
)
from dacnn.deploy.shapes import shapes
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapt
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import DESIGNS
from reference import PLACES, REGULATORS, one_thread, plans, randomise, rank_of  # noqa: F401  (a fixture)

# scales and shifts are rounded to float32, once
RELATIVE_ERROR = 1e-5
FIVE = tuple("abcde")


def images_of(of: Input, count: int = 2) -> Any:
    """uint8, N x H x W x C."""
    return torch.randint(0, 256, (count, of.height, of.width, of.channels), generator=torch.Generator().manual_seed(3)).byte()


def check_agrees(program: Program, network: Classifier) -> None:
    """The interpreter's logits against the network's own, both in float64, on uint8 and on normalised images."""
    exact = copy.deepcopy(network).double().eval()
    images = images_of(network.input)
    with torch.no_grad():
        expected = exact(images).numpy()
        floats = exact.normalize(images).numpy()
    tolerance = RELATIVE_ERROR * np.abs(expected).max()
    for given in (images.numpy(), floats):
        np.testing.assert_allclose(interpreter.run(program, given), expected, rtol=0, atol=tolerance)
    assert expected.shape == (len(images), len(program.classes))


def check_stores_what_the_network_stores(program: Program, network: Classifier) -> None:
    """Every tensor that has the name of a stored one is it, bit for bit, and all together are no more bytes."""
    state = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in program.tensors.items():
        assert tensor.dtype == np.float32
        if name in state:
            assert tensor.tobytes() == state[name].float().contiguous().numpy().tobytes(), name
        else:
            assert name.endswith((".scale", ".shift")), name
    assert program.stored_bytes <= sum(4 * tensor.numel() for tensor in state.values())


def check_anchors_are_read(program: Program, network: Classifier) -> None:
    """Each stored kernel is one tensor, named by as many steps as it has readers."""
    owner = network.owner
    assert owner is not None
    home = next(name for name, part in network.named_modules() if part is owner)
    read = program.readers()
    for name, readers in owner.readers().items():
        assert read[f"{home}.{name}"] == len(readers)


def check(network: Classifier) -> Program:
    program = lower(network)
    check_agrees(program, network)
    check_stores_what_the_network_stores(program, network)
    if network.owner is not None:
        check_anchors_are_read(program, network)
    return program


@pytest.mark.parametrize("name", DESIGNS)
def test_every_network_of_the_zoo_computes_the_same_as_a_program(name: str) -> None:
    program = check(randomise(create(name, width=4, num_classes=3, seed=0)))
    assert program.name == name
    assert isinstance(program.steps[0], Normalize) and program.steps[0].x == "images"
    assert all(isinstance(step.kernel, StoredKernel) for step in program.operations() if isinstance(step, Convolve))


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18"])
@pytest.mark.parametrize(
    "share",
    [
        {"share": "all"},
        {"share": "stage"},
        {"share": "template", "templates": 2},
        {"share": "repeat", "base_width": 2},
        {"share": "none"},
        {"groups": ("*conv*",)},
    ],
    ids=["all", "stage", "template", "repeat", "none", "groups"],
)
def test_every_scheme_computes_the_same_as_a_program(name: str, share: dict[str, Any]) -> None:
    program = check(randomise(create(name, width=4, depths=(2, 1), num_classes=3, seed=0, **share)))
    kinds = {type(step.kernel) for step in program.operations() if isinstance(step, Convolve)}
    own = {"template": CombinedKernel, "repeat": RepeatedKernel}.get(share.get("share", ""), StoredKernel)
    assert kinds == {StoredKernel, own}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", REGULATORS)
def test_every_regulator_computes_the_same_as_steps(kind: str, place: str) -> None:
    changes: dict[str, Any] = {"regulator": kind, "regulator_place": place, "regulator_rank": rank_of(kind)}
    check(randomise(create("dacnn18", width=4, depths=(1, 1), num_classes=3, seed=0, **changes)))


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(plan=plans(), seed=st.integers(0, 99))
def test_any_plan_computes_the_same_as_a_program(plan: Plan, seed: int) -> None:
    # statistics of 0 to 1 and scales of 1 / 0.05 make images of any size, which rounding follows
    check(randomise(Network(plan, torch.Generator().manual_seed(seed)), seed))


def test_the_network_is_left_as_it_is() -> None:
    network = create("dacnn18", width=4, depths=(1, 1), seed=0).train()
    network.stem.eval()
    modes = [part.training for part in network.modules()]
    before = copy.deepcopy(network.state_dict())
    kept = dict(network.named_parameters())
    program = lower(network)
    assert [part.training for part in network.modules()] == modes
    assert all(parameter is kept[name] and parameter.requires_grad for name, parameter in network.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    for tensor in program.tensors.values():
        tensor.fill(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_what_is_in_training_mode_is_lowered_as_in_evaluation_mode() -> None:
    network = randomise(create("dacnn3", width=4, seed=0))
    programs = lower(network.train()), lower(network.eval())
    assert programs[0].steps == programs[1].steps
    assert all(np.array_equal(programs[0].tensors[name], tensor) for name, tensor in programs[1].tensors.items())


def test_a_network_of_segments_that_run_again_is_lowered_like_any_other() -> None:
    network = randomise(create("dacnn18", width=4, depths=(2, 2), seed=0))
    plain = lower(network)
    network.segments = (1, 2)
    assert lower(network).steps == plain.steps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_type_is_stored_as_float32(dtype: torch.dtype) -> None:
    network = randomise(create("dacnn3", width=4, seed=0)).to(dtype)
    program = lower(network)
    check_stores_what_the_network_stores(program, network)
    # the statistics of the input are not rounded in a program: they are no tensors
    network.normalize.float().reset_statistics()
    check_agrees(program, network)


def test_values_and_tensors_have_short_and_readable_names() -> None:
    program = lower(create("dacnn3", width=4, seed=0))
    assert [step.out for step in program.operations()] == [f"x{index}" for index in range(len(program.steps))]
    assert list(program.tensors) == [
        "anchors.stem",
        "anchors.width4",
        "classifier.weight",
        "stem.norm.scale",
        "stem.norm.shift",
        "stages.0.0.readers.0.norm.scale",
        "stages.0.0.readers.0.norm.shift",
        "stages.1.0.readers.0.norm.scale",
        "stages.1.0.readers.0.norm.shift",
        "classifier.bias",
    ]
    assert "x2 = x1 * stem.norm.scale + stem.norm.shift" in str(program)


# ---------------------------------------------------------------- foreign networks


class Pooled(nn.Module):
    """A backbone of transformers as a classifier: the mean over all pixels and a linear layer."""

    def __init__(self, backbone: nn.Module, features: int) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(features, len(FIVE))

    def forward(self, x: torch.Tensor) -> Any:
        y = self.backbone(x)
        y = getattr(y, "last_hidden_state", y)
        return self.head(y.mean((2, 3)) if y.ndim == 4 else y.mean(1))


def foreign_network(name: str, share: Any = "none", **changes: Any) -> Adapted:
    module, example = foreign.make(name)
    if name not in ("convmixer", "mlp-mixer"):
        with torch.no_grad():
            shape = foreign.tensors_of(module(example))[0].shape
        module = Pooled(module, shape[1] if len(shape) == 4 else shape[2])
    config = NetworkConfig(name="foreign.py:make", share=share, **changes)
    return adapt(config, Input(*example.shape[2:]), FIVE, module)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet", {"share": "all"}),
        ("resnet", {"share": "template", "templates": 2}),
        ("resnet-bottleneck", {"share": "stage"}),
        ("regnet", {"share": "all", "regulator": "low-rank", "regulator_rank": 2}),
        ("regnet", {"share": "template", "templates": 2}),
        ("mobilenet", {"share": "all"}),
        ("convmixer", {"share": "all"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_converted_network_computes_the_same_as_a_program(name: str, changes: dict[str, Any]) -> None:
    network = foreign_network(name, **changes)
    program = check(network)
    assert max(program.readers().values()) > 1
    kinds = {type(step.kernel) for step in program.operations() if isinstance(step, Convolve)}
    assert (CombinedKernel in kinds) == (changes["share"] == "template")


@pytest.mark.parametrize(
    ("name", "settings", "side"),
    [
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}, 32),
        ("EfficientNet", {"width_coefficient": 0.1, "depth_coefficient": 0.2, "hidden_dim": 128, "image_size": 32}, 32),
        ("MobileNetV1", {"depth_multiplier": 0.25}, 33),
    ],
)
def test_classifiers_of_transformers_are_lowered(name: str, settings: dict[str, Any], side: int) -> None:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=len(FIVE), **settings)
    module = foreign.stirred(getattr(transformers, f"{name}ForImageClassification")(config))
    check(adapt(NetworkConfig(name="foreign.py:make", share="all"), Input(side, side), FIVE, module))

"""A lowered network computes what the network computes, names what it stores, and holds each kernel once, as it is."""

import copy
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import nn

import foreign
import interpreter
from dacnn.config import NetworkConfig
from dacnn.deploy.lower import lower
from dacnn.deploy.program import (
    CombinedKernel,
    Convolve,
    Normalize,
    Program,
    RepeatedKernel,
    ScaleShift,
    StoredKernel,
    operands,
)
from dacnn.deploy.shapes import shapes
from dacnn.errors import DeployError, ShapeError
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapted_as
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
    for taken in (images.numpy(), floats):
        np.testing.assert_allclose(interpreter.run(program, taken), expected, rtol=0, atol=tolerance)
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
    return adapted_as(config, Input(*example.shape[2:]), FIVE, module)


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
    check(adapted_as(NetworkConfig(name="foreign.py:make", share="all"), Input(side, side), FIVE, module))


# ---------------------------------------------------------------- one thing at a time


class Calls(nn.Module):
    """Some layers, and what is done with them."""

    def __init__(self, forward: Callable[[Any, torch.Tensor], Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.given = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> Any:
        return self.given(self, x)


def conv(inputs: int = 4, outputs: int = 4, size: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **settings})


def network_of(forward: Callable[[Any, torch.Tensor], Any], side: int = 8, classes: int = 4, **parts: Any) -> Adapted:
    """A network on images of 3 channels whose layers are all stirred; `stem` gives 4 channels."""
    module = foreign.stirred(Calls(forward, stem=conv(3), **parts))
    return Adapted(module, Input(side, side), tuple(map(str, range(classes)))).eval()


def pooled(x: torch.Tensor) -> torch.Tensor:
    return x.mean((2, 3))


def squeezed(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Squeeze-and-excitation as many write it: linear layers, and a view back."""
    x = self.stem(x)
    y = F.adaptive_avg_pool2d(x, 1).view(x.shape[0], 4)
    y = torch.sigmoid(self.up(F.relu(self.down(y)))).view(x.shape[0], 4, 1, 1)
    return pooled(x * y)


def preactivated(self: Any, x: torch.Tensor) -> torch.Tensor:
    """What is read behind the ReLU in place is what it made, by all its names."""
    x = self.stem(x)
    same = x.view(x.shape)
    before = x.clone()
    y = F.relu(x, inplace=True)
    return pooled(self.conv(y) + same + before)


def added_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.stem(x)
    z = y * 2
    y += self.conv(y)
    y.relu_()
    z.mul_(y).add_(1.5)
    return pooled(z + y)


def arithmetic(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    y = 3 - (x - 0.5) / 2
    z = torch.sub(y, x, alpha=2) + torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None]
    return -pooled((z * self.gamma.view(1, -1, 1, 1) - x / self.gamma.reshape(4, 1, 1)).clamp(max=9.0))


def hard_swish_by_hand(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    return pooled(x * F.relu6(x + 3) / 6)


def not_needed(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.stem(x)
    _ = F.layer_norm(x, x.shape[1:]).softmax(1)
    return pooled(x)


def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.calls += 1
    return pooled(self.stem(x))


def standardised(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The kernel is computed from a stored one, twice the same."""
    x = self.stem(x)
    for _ in range(2):
        weight = self.conv.weight
        x = F.conv2d(x, (weight - weight.mean((1, 2, 3), keepdim=True)) * 2, padding=1).relu()
    return pooled(x)


def gamma() -> nn.Parameter:
    return nn.Parameter(torch.arange(1.0, 5.0))


def activated(function: Callable[[torch.Tensor], torch.Tensor]) -> tuple[Callable[[Any, torch.Tensor], Any], dict[str, Any]]:
    return lambda self, x: pooled(function(self.stem(x))), {}


WORKING: dict[str, tuple[Callable[[Any, torch.Tensor], Any], dict[str, Any]]] = {
    "squeeze-and-excitation": (squeezed, {"down": nn.Linear(4, 2), "up": nn.Linear(2, 4)}),
    "relu-in-place": (preactivated, {"conv": conv()}),
    "sum-in-place": (added_in_place, {"conv": conv()}),
    "arithmetic": (arithmetic, {"gamma": gamma()}),
    "hard-swish-by-hand": (hard_swish_by_hand, {}),
    "dead": (not_needed, {}),
    "counter": (counted, {"calls": nn.Parameter(torch.zeros(()), requires_grad=False)}),
    "standardised": (standardised, {"conv": conv()}),
    "norm-without-weights": (
        lambda self, x: pooled(self.norm(self.stem(x))),
        {"norm": nn.BatchNorm2d(4, affine=False, eps=0.1)},
    ),
    "two-norms": (
        lambda self, x: self.last(pooled(self.second(self.first(self.stem(x))))),
        {"first": nn.BatchNorm2d(4), "second": nn.BatchNorm2d(4), "last": nn.BatchNorm1d(4)},
    ),
    "norm-read-twice": (
        lambda self, x: pooled(self.second(y := self.first(self.stem(x))) + y),
        {"first": nn.BatchNorm2d(4), "second": nn.BatchNorm2d(4)},
    ),
    "strided-dilated-grouped": (
        lambda self, x: pooled(self.conv(self.stem(x))),
        {"conv": conv(stride=(2, 1), dilation=(1, 2), groups=2, padding=(0, 2), bias=False)},
    ),
    "same": (lambda self, x: pooled(self.conv(self.stem(x))), {"conv": conv(size=4, padding="same", dilation=(1, 2))}),
    "valid": (lambda self, x: pooled(self.conv(self.stem(x))), {"conv": conv(padding="valid")}),
    "padded": (lambda self, x: pooled(self.conv(F.pad(F.pad(self.stem(x), (1, 0, 2, 1)), (0, 1)))), {"conv": conv()}),
    "pools": (lambda self, x: pooled(F.avg_pool2d(F.max_pool2d(self.stem(x), 3, 2, 1), (2, 1), stride=1)), {}),
    "ceil": (lambda self, x: pooled(F.max_pool2d(self.stem(x), 3, 2, ceil_mode=True)), {}),
    "ceil-without-need": (lambda self, x: pooled(F.avg_pool2d(self.stem(x), 2, ceil_mode=True)), {}),
    "padded-by-minus-infinity": (
        lambda self, x: pooled(F.max_pool2d(F.pad(self.stem(x), (0, 1, 0, 1), value=-math.inf), 3, 2)),
        {},
    ),
    "adaptive": (lambda self, x: F.adaptive_avg_pool2d(self.stem(x), (2, 4)).flatten(1), {}),
    "mean-of-rows": (lambda self, x: self.stem(x).flatten(2).mean(-1), {}),
    "mean-kept": (lambda self, x: self.stem(x).mean((-1, -2), keepdim=True).squeeze(-1).squeeze(-1), {}),
    "whole-images": (lambda self, x: self.stem(x).relu().flatten(1), {}),
    "rolled": (lambda self, x: pooled(self.stem(x).roll((5,), (-3,)).roll(4, 1)), {}),
    "dropout": (lambda self, x: self.drop(pooled(self.stem(x))), {"drop": nn.Dropout(0.5)}),
    "relu": activated(torch.relu),
    "relu6": activated(F.relu6),
    "hardtanh": activated(lambda x: F.hardtanh(x, -0.5, 0.7)),
    "clamp-below": activated(lambda x: x.clamp(min=0.25)),
    "clamp-above": activated(lambda x: x.clamp(max=0.25)),
    "clamp-in-place": activated(lambda x: x.clamp_(min=torch.tensor(0.25)) + x),
    "clamp-to-relu": activated(lambda x: x.clamp_min(0)),
    "sigmoid": activated(torch.sigmoid),
    "silu": activated(F.silu),
    "hardsigmoid": activated(F.hardsigmoid),
    "hardswish": activated(F.hardswish),
    "gelu": activated(F.gelu),
    "tanh": activated(torch.tanh),
    "without-gradients": (torch.no_grad()(lambda self, x: pooled(self.stem(x))), {}),
}


@pytest.mark.parametrize("name", WORKING)
def test_what_a_program_can_say_computes_the_same(name: str) -> None:
    forward, parts = WORKING[name]
    classes = {"whole-images": 256, "adaptive": 32}.get(name, 4)
    network = network_of(forward, classes=classes, **copy.deepcopy(parts))
    program = lower(network)
    check_agrees(program, network)
    assert shapes(program, batch=2)[program.result] == (2, classes)


def lowered(forward: Callable[[Any, torch.Tensor], Any], **parts: Any) -> Program:
    return lower(network_of(forward, **parts))


def test_squeeze_and_excitation_by_linear_layers_is_done_in_pixels() -> None:
    program = lowered(squeezed, down=nn.Linear(4, 2), up=nn.Linear(2, 4))
    assert [type(step).__name__ for step in program.steps[3:9]] == [
        "GlobalAverage", "Convolve", "ScaleShift", "Activate", "Convolve", "ScaleShift",
    ]  # fmt: skip
    assert program.tensors["module.down.weight"].shape == (2, 4, 1, 1)


def test_a_kernel_that_is_read_on_features_and_on_pixels_is_refused() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.linear(pooled(x)).view(-1, 4, 1, 1)
        return self.linear(pooled(x * y))

    with pytest.raises(DeployError, match=r"kernel 'module.linear.weight' is read by linear layers on features and on pixels"):
        lowered(forward, linear=nn.Linear(4, 4))


@pytest.mark.parametrize("kind", sorted({*REGULATORS} - {"depthwise"}))
def test_regulators_behind_linear_layers_compute_the_same(kind: str) -> None:
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 5)]
    config = NetworkConfig(name="x.py:f", share="all", regulator=kind, regulator_rank=rank_of(kind))
    module = foreign.stirred(nn.Sequential(conv(3), *layers))
    check(adapted_as(config, Input(8, 8), FIVE, module))


def test_linear_layers_that_share_a_kernel_read_one_tensor() -> None:
    layers = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 5)]
    config = NetworkConfig(name="x.py:f", share="template", templates=2)
    program = check(adapted_as(config, Input(8, 8), FIVE, foreign.stirred(nn.Sequential(conv(3), *layers))))
    assert sorted(program.readers().values()) == [1, 1, 2]


def test_parameters_that_are_tied_by_hand_are_one_tensor() -> None:
    second, third = conv(), conv()
    first = conv()
    second.weight = first.weight
    third.weight = nn.Parameter(first.weight.detach())
    network = network_of(
        lambda self, x: pooled(self.second(self.first(self.third(self.stem(x))).relu())),
        first=first,
        second=second,
        third=third,
    )
    program = lower(network)
    check_agrees(program, network)
    assert program.readers() == {"module.stem.weight": 1, "module.first.weight": 3}


def test_a_layer_that_runs_twice_is_named_by_two_steps() -> None:
    network = network_of(
        lambda self, x: pooled(self.norm(self.conv(self.norm(self.conv(self.stem(x)))))), conv=conv(), norm=nn.BatchNorm2d(4)
    )
    program = lower(network)
    check_agrees(program, network)
    assert program.readers()["module.conv.weight"] == 2
    scales = [step.scale for step in program.operations() if isinstance(step, ScaleShift) and step.scale]
    assert scales == ["module.norm.scale"] * 2


def test_a_kernel_that_is_computed_is_stored_once_for_all_who_compute_the_same() -> None:
    program = lowered(standardised, conv=conv())
    assert program.readers() == {"module.stem.weight": 1, "module.kernel": 2}


def test_scales_and_shifts_in_a_row_are_one_step_where_nobody_else_reads() -> None:
    program = lowered(WORKING["two-norms"][0], **copy.deepcopy(WORKING["two-norms"][1]))
    moved = [step for step in program.operations() if isinstance(step, ScaleShift)]
    # the stem's bias and two norms; behind the mean the third
    assert [(step.scale, step.shift) for step in moved] == [
        (f"module.{name}.scale", f"module.{name}.shift") for name in ("second", "last")
    ]
    program = lowered(WORKING["norm-read-twice"][0], **copy.deepcopy(WORKING["norm-read-twice"][1]))
    assert len([step for step in program.operations() if isinstance(step, ScaleShift)]) == 2


def test_what_is_stored_keeps_its_name_and_what_is_computed_from_it_has_another() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x).relu()
        scaled, moved, away = (f(y, self.gamma[:, None, None]).relu() for f in (torch.mul, torch.add, torch.sub))
        return pooled(scaled + moved + away)

    network = network_of(forward, gamma=gamma())
    program = lower(network)
    check_agrees(program, network)
    moved = [step for step in program.operations() if isinstance(step, ScaleShift)]
    assert [(step.scale, step.shift) for step in moved] == [
        (None, "module.stem.bias"), ("module.gamma", None), (None, "module.gamma"), (None, "module.shift"),
    ]  # fmt: skip
    assert np.array_equal(program.tensors["module.gamma"], network.state_dict()["module.gamma"].numpy())


def test_a_reshape_to_the_same_shape_is_no_step() -> None:
    program = lowered(lambda self, x: pooled(self.stem(x).flatten().view(x.shape[0], 4, 8, 8).contiguous()))
    names = [type(step).__name__ for step in program.steps]
    assert names == ["Normalize", "Convolve", "ScaleShift", "GlobalAverage", "Flatten"]


def test_padding_of_zeros_goes_into_the_convolution() -> None:
    program = lowered(lambda self, x: pooled(self.stem(F.pad(x, (1, 2, 3, 4)))))
    step = next(step for step in program.operations() if isinstance(step, Convolve))
    assert step.padding == (4, 2, 5, 3)


def test_what_the_logits_do_not_follow_from_is_no_step() -> None:
    program = lowered(not_needed)
    read = {name for step in program.operations() for name in operands(step)} | {program.result}
    assert read >= {step.out for step in program.operations()}


# ---------------------------------------------------------------- what is refused


def layer_norm(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self.norm(self.stem(x)).relu_())


REFUSED: dict[str, tuple[Callable[[Any, torch.Tensor], Any], dict[str, Any], str]] = {
    "layer-norm": (
        layer_norm,
        {"norm": nn.LayerNorm([4, 8, 8])},
        r"layer 'norm': aten.layer_norm \(node 'layer_norm'\)",
    ),
    "group-norm": (layer_norm, {"norm": nn.GroupNorm(2, 4)}, "layer 'norm': aten.group_norm"),
    "transposed": (layer_norm, {"norm": nn.ConvTranspose2d(4, 4, 2)}, "layer 'norm': aten.conv_transpose2d"),
    "statistics-of-the-batch": (
        layer_norm,
        {"norm": nn.BatchNorm2d(4, track_running_stats=False)},
        "layer 'norm': aten.batch_norm .* mean and variance of the batch",
    ),
    "softmax": (lambda self, x: pooled(self.stem(x)).softmax(1), {}, "Calls itself: aten.softmax"),
    "permute": (lambda self, x: pooled(self.stem(x).permute(0, 1, 3, 2)), {}, "aten.permute .* another order"),
    "concatenation": (lambda self, x: pooled(torch.cat([self.stem(x)[:, :2], x[:, :2]], 1)), {}, "aten.slice"),
    "part-in-place": (lambda self, x: pooled(zeroed(self.stem(x))), {}, "aten.(select|slice)"),
    "matrix-product": (lambda self, x: pooled(self.stem(x) @ self.stem(x)), {}, "aten.matmul"),
    "gelu-tanh": (
        lambda self, x: pooled(F.gelu(self.stem(x), approximate="tanh")),
        {},
        "aten.gelu .* 'tanh'",
    ),
    "leaky": (lambda self, x: pooled(F.leaky_relu(self.stem(x))), {}, "aten.leaky_relu"),
    "padded-by-ones": (lambda self, x: pooled(self.stem(F.pad(x, (1, 1), value=1.0))), {}, "layer 'stem': .* padded with 1.0"),
    "padded-and-read": (lambda self, x: pooled(F.pad(self.stem(x), (1, 1)).relu()), {}, "aten.pad .* only a convolution"),
    "circular": (lambda self, x: pooled(self.stem(F.pad(x, (1, 1, 1, 1), mode="circular"))), {}, "aten.pad .* mode 'circular'"),
    "dilated-pool": (lambda self, x: pooled(F.max_pool2d(self.stem(x), 2, dilation=2)), {}, "aten.max_pool2d .* dilated"),
    "padded-average": (lambda self, x: pooled(F.avg_pool2d(self.stem(x), 3, 2, 1)), {}, "aten.avg_pool2d .* padded"),
    "average-ceil": (
        lambda self, x: pooled(F.avg_pool2d(self.stem(x), 3, 2, ceil_mode=True)),
        {},
        "avg_pool2d .* ceil_mode",
    ),
    "uneven-windows": (lambda self, x: pooled(F.adaptive_avg_pool2d(self.stem(x), 3)), {}, "makes 3x3 of 8x8 pixels"),
    "mean-of-channels": (lambda self, x: pooled(self.stem(x) * self.stem(x).mean(1, keepdim=True)), {}, "aten.mean"),
    "one-number-for-each-pixel": (
        lambda self, x: pooled(self.stem(x) * torch.arange(8.0)),
        {},
        "one for each channel",
    ),
    "rows-rolled": (lambda self, x: pooled(self.stem(x).roll(1, 2)), {}, "aten.roll .* more than the channels"),
    "kernel-of-images": (
        lambda self, x: F.linear(pooled(x), pooled(self.conv(x))).repeat(1, 2),
        {"conv": conv(3, 3)},
        "aten.linear .* kernel follows from the images",
    ),
    "linear-on-channels-last": (
        lambda self, x: pooled(self.stem(x).unsqueeze(-1)[..., 0]),
        {},
        "aten.select",
    ),
    "linear-on-rows": (lambda self, x: pooled(self.linear(self.stem(x))), {"linear": nn.Linear(8, 8)}, "N x F, one row"),
    "drops-always": (lambda self, x: F.dropout(pooled(self.stem(x)), 0.5, True), {}, "aten.dropout .* evaluation mode too"),
    "noise": (lambda self, x: pooled(self.stem(x) + torch.rand(4, 1, 1)), {}, "aten.rand"),
    "bfloat16": (lambda self, x: pooled(self.stem(x).bfloat16()).float(), {}, "makes bfloat16"),
    "counter": (
        lambda self, x: pooled(self.stem(x) * self.calls.add_(1)),
        {"calls": nn.Parameter(torch.zeros(()), requires_grad=False)},
        "aten.add .* changes what is stored",
    ),
    "sum-into-a-constant": (lambda self, x: pooled(torch.zeros(2, 4, 8, 8).add_(self.stem(x))), {}, "aten.add .* changes"),
    "features-of-whole-images": (
        lambda self, x: pooled(self.conv(self.linear(self.stem(x).flatten(1)).view(-1, 4, 1, 1))),
        {"linear": nn.Linear(256, 4), "conv": conv(size=1)},
        "features of whole images become pixels",
    ),
}


def zeroed(x: torch.Tensor) -> torch.Tensor:
    x[:, 0].zero_()
    return x


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_step_can_say_is_refused_with_its_layer_and_node(name: str) -> None:
    forward, parts, message = REFUSED[name]
    with pytest.raises(DeployError, match=message) as caught:
        lowered(forward, **copy.deepcopy(parts))
    assert "\n" not in str(caught.value) and ("node '" in str(caught.value))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnext", "layer 'backbone.embeddings.layernorm': aten.permute"),
        ("vit", "layer 'backbone.embeddings.patch_embeddings': aten.transpose"),
        ("mlp-mixer", "MLPMixer itself: aten.mT"),
    ],
)
def test_foreign_networks_of_other_kinds_are_refused_with_the_node(name: str, message: str) -> None:
    with pytest.raises(DeployError, match=message):
        lower(foreign_network(name))


def test_a_network_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"UNet gives \(2, 4, 16, 16\) for 2 images"):
        lower(Adapted(foreign.UNet(), Input(16, 16), FIVE))


def decides(self: Any, x: torch.Tensor) -> torch.Tensor:
    return pooled(self.stem(x)) if x.sum() > 0 else pooled(x)


def leaves_torch(self: Any, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(pooled(self.stem(x)).numpy())


@pytest.mark.parametrize("forward", [decides, leaves_torch])
def test_a_network_that_cannot_be_exported_is_refused_in_one_line(
    forward: Callable[[Any, torch.Tensor], Any], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeployError, match="^Calls cannot be exported: .* no number of an image decides") as caught:
        lowered(forward)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_module_that_keeps_what_it_computed_keeps_what_it_had() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        self.last = self.stem(x)
        return pooled(self.last)

    network = network_of(forward)
    lower(network)
    assert not hasattr(network.module, "last")


def test_a_program_says_whether_it_holds_for_other_sizes() -> None:
    of = Input(32, 32)
    assert lower(create("dacnn3", width=8)).any_size
    averaged = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    assert lower(Adapted(averaged, of, tuple("abcd"))).any_size
    own = lower(Adapted(foreign.SamePadding(), of, tuple("abcd")))
    assert not own.any_size and "no other size" in str(own)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    network = create("dacnn3", width=8)
    next(network.parameters()).data.flatten()[0] = value
    with pytest.raises(DeployError, match="has values that are no numbers"):
        lower(network)

"""The memory of a training: what is predicted is what the allocator says."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetModel

import dacnn
from dacnn.config import NetworkConfig, TrainingConfig
from dacnn.errors import ConfigError
from dacnn.measure import memory
from dacnn.measure.memory import _cpu_peak_bytes, measure_training_memory, predict_training_memory
from dacnn.measure.workspace import cpu_workspace_bytes
from dacnn.networks.adapted import Adapted
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import plan_of
from dacnn.training.precision import choose, has_bfloat16_units
from reference import one_thread  # noqa: F401  (a fixture)

ATEN = torch.ops.aten
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format

# what is promised; a few percent are found where a thread's own buffers count, else a thousandth
TOLERANCE = 0.1

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16_units("cpu"), reason="this CPU computes bfloat16 in another way")
FLOAT32_SGD: Any = pytest.param("float32", "sgd", id="float32-sgd")
BFLOAT16_ADAMW: Any = pytest.param("bfloat16", "adamw", id="bfloat16-adamw", marks=needs_bfloat16)


def planned(name: str, width: int, **changes: Any) -> Plan:
    return plan_of(NetworkConfig(name, width=width, **changes), Input(), tuple("0123456789"))


def ratio(network: Plan | Adapted, training: TrainingConfig) -> float:
    execution = choose(training, "cpu", foreign=isinstance(network, Adapted))
    predicted = predict_training_memory(network, training, execution)
    return predicted.peak_bytes / measure_training_memory(network, training, execution)


@pytest.mark.parametrize(("precision", "optimizer"), [FLOAT32_SGD, BFLOAT16_ADAMW])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize(("name", "width"), [("dacnn14", 16), ("dacnn18", 12), ("dacnn34-mix-reg", 8)])
def test_prediction_is_what_the_allocator_hands_out(
    name: str, width: int, shared: bool, precision: Any, optimizer: Any
) -> None:
    plan = planned(name, width)
    training = TrainingConfig(batch_size=16, optimizer=optimizer, precision=precision, threads=1)
    assert ratio(plan if shared else plan.unshared(), training) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"accumulate": 3, "clip_norm": 1.0, "label_smoothing": 0.1},
        {"memory_format": "contiguous"},
        {"cutout": 8, "crop": 0, "flip": False},
        {"threads": 2},
        {"batch_size": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_it_follows_the_recipe(changes: dict[str, Any]) -> None:
    training = TrainingConfig(**{"batch_size": 8, "precision": "float32", "threads": 1, **changes})
    assert ratio(planned("dacnn14", 16), training) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("regulator", ["pointwise", "depthwise", "shift"])
@pytest.mark.parametrize("place", ["before-norm", "after-norm"])
def test_it_follows_regulators(regulator: str, place: Any) -> None:
    plan = planned("dacnn14", 8, regulator=regulator, regulator_place=place)
    training = TrainingConfig(batch_size=8, precision="float32", threads=1)
    assert ratio(plan, training) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("recompute", ["no", "activations", "segments"])
@pytest.mark.parametrize("scheme", [{"share": "template", "templates": 2}, {"share": "repeat", "base_width": 4}], ids=str)
def test_it_follows_expressions_and_what_runs_again(scheme: Any, recompute: Any) -> None:
    training = TrainingConfig(batch_size=8, precision="float32", threads=1, recompute=recompute)
    assert ratio(planned("dacnn18", 8, **scheme), training) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("recompute", ["no", "activations", "segments"])
def test_it_follows_convolutions_by_winograd(recompute: Any) -> None:
    training = TrainingConfig(batch_size=8, precision="float32", threads=1, recompute=recompute, convolution="winograd")
    assert ratio(planned("dacnn5", 64), training) == pytest.approx(1, abs=TOLERANCE)


def test_parts_are_those_of_a_real_step() -> None:
    network = dacnn.create("dacnn14", share="none", width=64)
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    parameters = sum(parameter.nbytes for parameter in network.parameters())
    memory = {
        name: predict_training_memory(
            network, TrainingConfig(batch_size=2, optimizer=name, precision="float32", momentum=momentum)
        )
        for name, momentum in (("sgd", 0.0), ("adamw", 0.9))
    }
    for name, moments in (("sgd", 0), ("adamw", 2)):
        assert memory[name].weight_bytes == weights
        # beside the moments, a number of four bytes for each parameter
        numbers = 4 * len(list(network.parameters())) * (moments > 0)
        assert memory[name].optimizer_bytes == moments * parameters + numbers
        assert 0 < memory[name].gradient_bytes <= parameters
        assert memory[name].peak_bytes == sum(dataclasses.astuple(memory[name]))


def test_outputs_that_are_made_again_are_missing_from_the_prediction() -> None:
    training = TrainingConfig(batch_size=8, precision="float32")
    execution = choose(training, "cpu")
    assert not execution.compiled
    plan = planned("dacnn14", 8)
    # what the forward pass of a plain network keeps for the gradient: every convolution's and every ReLU's output
    kept = sum(2 * 8 * 8 * side**2 * 4 * layers for side, layers in ((32, 2), (16, 2), (8, 3), (4, 3), (2, 3)))
    assert predict_training_memory(plan, training, execution).activation_bytes < kept


def test_predicting_leaves_the_network_and_the_generator_as_they_are() -> None:
    network = dacnn.create("dacnn3", width=8)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.get_rng_state()
    predict_training_memory(network, TrainingConfig(batch_size=4))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_step_that_could_not_be_trained_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.crop is 32"):
        predict_training_memory(planned("dacnn3", 8), TrainingConfig(crop=32))


# ---------------------------------------------------------------- what operators take for themselves


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=["channels-last", "contiguous"])
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs", "size", "side"),
    [(8, 32, 32, 3, 16), (4, 256, 256, 3, 4), (4, 32, 64, 1, 16), (4, 20, 38, 3, 8)],
)
def test_convolutions_take_what_the_allocator_says(
    batch: int, inputs: int, outputs: int, size: int, side: int, layout: Any, dtype: torch.dtype
) -> None:
    x = torch.randn(batch, inputs, side, side).to(dtype).contiguous(memory_format=layout)
    gradient = torch.randn(batch, outputs, side, side).to(dtype).contiguous(memory_format=layout)
    kernel = torch.randn(outputs, inputs, size, size).to(dtype)
    geometry = ([1, 1], [size // 2] * 2, [1, 1], False, [0, 0], 1)
    assert_workspace(ATEN.convolution.default, (x, kernel, None, *geometry))
    assert_workspace(ATEN.convolution_backward.default, (gradient, x, kernel, None, *geometry, [True, True, False]))


@pytest.mark.parametrize("layout", [CHANNELS_LAST, CONTIGUOUS], ids=["channels-last", "contiguous"])
def test_batch_norm_takes_what_the_allocator_says(layout: Any) -> None:
    norm = nn.BatchNorm2d(16)
    x = torch.randn(4, 16, 16, 16).contiguous(memory_format=layout)
    mean, scale = torch.zeros(16), torch.ones(16)
    arguments = (x, x.clone(), norm.weight.detach(), None, None, mean, scale, True, 1e-5, [True, True, True])
    assert_workspace(ATEN.native_batch_norm_backward.default, arguments)


def assert_workspace(operator: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Results and workspace together are the allocator's peak, but for 5 % and what each thread keeps for itself."""
    results: list[Any] = []
    peak = _cpu_peak_bytes(lambda: results.append(operator(*arguments)))
    tensors = results[0] if isinstance(results[0], tuple) else results
    given = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    taken = cpu_workspace_bytes(operator, arguments, results[0], threads=1, channels_last=False)
    assert peak == pytest.approx(given + taken, rel=0.05, abs=20_000)


class Pooled(nn.Module):
    """What a network of `transformers` without a classifier gives of a whole image, for logits."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled: torch.Tensor = self.body(images).pooler_output
        return pooled.flatten(1)


@pytest.mark.parametrize("rule", ["none", "all"])
def test_it_follows_a_foreign_network_of_whole_convolutions(rule: str) -> None:
    # contiguous images of fewer than 16 channels are predicted too high
    config = ResNetConfig(embedding_size=32, hidden_sizes=[32, 64], depths=[2, 2], layer_type="basic")
    shared, _ = dacnn.anchor(Pooled(ResNetModel(config)), rule)
    network = Adapted(shared, Input(32, 32), tuple(map(str, range(64))))
    training = TrainingConfig(batch_size=16, precision="float32", threads=1)
    assert ratio(network, training) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize("batch_size", [2, 33])
def test_the_first_part_of_a_loop_tells_the_memory_of_all(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    training = TrainingConfig(batch_size=batch_size, precision="float32", convolution="winograd", threads=1)
    plan = planned("dacnn9", 64)
    predicted = predict_training_memory(plan, training)
    monkeypatch.setattr(memory, "first_part_alone", contextlib.nullcontext)
    assert predict_training_memory(plan, training) == predicted


@pytest.mark.parametrize("part", ["norms", "stem"])
def test_what_is_frozen_is_predicted_too(part: str) -> None:
    network = dacnn.adapt(
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        ),
        Input(),
        list("abcd"),
    )
    frozen = [one for one in network.modules() if isinstance(one, nn.BatchNorm2d if part == "norms" else nn.Conv2d)]
    for parameter in (parameter for module in frozen for parameter in module.parameters()):
        parameter.requires_grad_(False)
    assert ratio(network, TrainingConfig(batch_size=16, precision="float32", threads=1)) == pytest.approx(1, abs=TOLERANCE)

"""The network against the reference in which every layer owns its kernel, and against whatever PyTorch does to modules."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from dacnn.checkpoint import load, save
from dacnn.errors import ShapeError
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import DESIGNS
from reference import (
    PLACES,
    REGULATORS,
    assert_equal_up_to_rounding,
    images_for,
    one_thread,  # noqa: F401  (a fixture)
    plans,
    randomise,
    rank_of,
    readers_by_name,
    tied_by_hand,
)

# both sides compute in float64 and differ in the order of sums only: about 1e-16 a step, times the growth of 34 layers
FLOAT64_RELATIVE = 1e-10
# float32 has 1.2e-7 a step
FLOAT32_RELATIVE = 1e-4


def randomised(name: str = "dacnn18", **changes: Any) -> Network:
    """A network in float64 of which no tensor is at its start."""
    changes = {"width": 8, "num_classes": 5, "seed": 0} | changes
    kind = changes.get("regulator", "none")
    network = create(name, **changes, **({"regulator_rank": rank_of(kind)} if rank_of(kind) else {}))
    return randomise(network).double()


def gradients(network: torch.nn.Module, images: Tensor) -> None:
    """Back-propagate a loss that weighs every logit differently."""
    logits = network(images)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()


# ---------------------------------------------------------------- forward and backward against the reference


@pytest.mark.parametrize("kind", ["none", *REGULATORS])
@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_forward_is_that_of_layers_tied_by_hand(name: str, kind: str) -> None:
    # regulators stand behind shared kernels, so a network that shares none is made to share for them
    shared: dict[str, Any] = {} if kind == "none" or DESIGNS[name].share != "none" else {"share": "all"}
    network = randomised(name, regulator=kind, **shared)
    images = images_for(network.plan, count=2)
    with torch.no_grad():
        for mode in (False, True):
            reference = tied_by_hand(network.train(mode))
            assert_equal_up_to_rounding(network(images), reference(images), FLOAT64_RELATIVE)


@pytest.mark.parametrize("kind", REGULATORS)
@pytest.mark.parametrize("name", ["dacnn7", "dacnn18-mix"])
def test_forward_with_regulators_behind_the_norm_is_that_of_layers_tied_by_hand(name: str, kind: str) -> None:
    network = randomised(name, regulator=kind, regulator_place="after-norm").eval()
    images = images_for(network.plan, count=2)
    with torch.no_grad():
        expected = tied_by_hand(network)(images)
        assert_equal_up_to_rounding(network(images), expected, FLOAT64_RELATIVE)
        # and the two places differ, so that the comparison means something
        before = randomised(name, regulator=kind).eval()
        assert float((before(images) - expected).abs().max()) > 1e-3 * float(expected.abs().max())


def test_training_mode_moves_the_running_statistics_of_each_reader_by_itself() -> None:
    network = randomised("dacnn14").train()
    reference = tied_by_hand(network)
    images = images_for(network.plan)
    with torch.no_grad():
        network(images)
        reference(images)
    means = []
    for name, reader in readers_by_name(network).items():
        layer = next(layer for layer in network.plan.layers() if layer.name == name)
        for buffer in ("running_mean", "running_var"):
            expected = getattr(reference.place(layer)["norm"], buffer)
            assert_equal_up_to_rounding(getattr(reader.norm, buffer), expected, FLOAT64_RELATIVE)
        means.append(reader.norm.running_mean)
    assert all(not torch.equal(first, second) for first, second in itertools.pairwise(means))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("dacnn3", {"depths": (2,)}),
    ("dacnn3", {"depths": (3,)}),
    ("dacnn3", {"depths": (8,)}),
    ("dacnn14", {}),
    ("dacnn18", {"share": "stage", "regulator": "shift"}),
    ("dacnn34", {"regulator": "low-rank"}),
    ("dacnn18-mix-reg", {}),
    ("dacnn14-mix", {"regulator": "depthwise"}),
    ("resnet18", {}),
]


@pytest.mark.parametrize(("name", "changes"), CASES, ids=lambda value: str(value))
def test_anchor_gradient_is_the_sum_over_its_unshared_twins(name: str, changes: dict[str, Any]) -> None:
    network = randomised(name, **changes).train()
    reference = tied_by_hand(network)
    images = images_for(network.plan)
    gradients(network, images)
    gradients(reference, images)
    sums = reference.kernel_gradients()
    assert set(sums) == set(network.anchors)
    for kernel, expected in sums.items():
        gradient = network.anchors[kernel].grad
        assert gradient is not None and float(expected.abs().max()) > 0
        assert_equal_up_to_rounding(gradient, expected, FLOAT64_RELATIVE)


@pytest.mark.parametrize("readers", [1, 2, 7])
def test_a_chain_of_so_many_readers_has_one_kernel_with_so_many_readers(readers: int) -> None:
    plan = create("dacnn3", width=4, depths=(readers + 1,)).plan
    assert {name: len(layers) for name, layers in plan.readers().items()} == {"stem": 1, "width4": readers}


def test_gradients_of_what_each_place_owns_are_those_of_the_reference() -> None:
    network = randomised("dacnn18-mix-reg").train()
    reference = tied_by_hand(network)
    images = images_for(network.plan)
    gradients(network, images)
    gradients(reference, images)
    readers = readers_by_name(network)
    for layer in network.plan.layers():
        place, reader = reference.place(layer), readers[layer.name]
        pairs = [(reader.norm.weight, place["norm"].weight), (reader.norm.bias, place["norm"].bias)]
        if reader.regulator is not None:
            pairs.append((reader.regulator.weight, place["regulator"].weight))
        for actual, expected in pairs:
            assert_equal_up_to_rounding(actual.grad, expected.grad, FLOAT64_RELATIVE)
    assert_equal_up_to_rounding(network.classifier.weight.grad, reference.linear.weight.grad, FLOAT64_RELATIVE)  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(plans())
def test_any_plan_computes_what_its_layers_tied_by_hand_compute(plan: Plan) -> None:
    network = randomise(Network(plan, torch.Generator().manual_seed(0))).double().eval()
    reference = tied_by_hand(network)
    images = images_for(plan)
    gradients(network, images)
    gradients(reference, images)
    assert_equal_up_to_rounding(network(images), reference(images), FLOAT64_RELATIVE)
    sums = reference.kernel_gradients()
    assert set(sums) == set(network.anchors)
    for kernel, expected in sums.items():
        assert_equal_up_to_rounding(network.anchors[kernel].grad, expected, FLOAT64_RELATIVE)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what goes in


def network_for_bytes(channels: int = 3) -> Network:
    mean, std = (0.48, 0.45, 0.4)[:channels], (0.2, 0.25, 0.3)[:channels]
    plan = create("dacnn18", width=8, in_channels=channels).plan.for_data(Input(32, 32, channels, mean, std), ("a", "b"))
    return randomise(Network(plan, torch.Generator().manual_seed(0))).eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_give_what_their_normalised_floats_give(channels: int) -> None:
    network = network_for_bytes(channels)
    images = torch.randint(0, 256, (3, 32, 40, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (network.plan.input.mean, network.plan.input.std))
    floats = ((images.double() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert_equal_up_to_rounding(network(images), network(floats.float()), FLOAT32_RELATIVE)
        expected = tied_by_hand(copy.deepcopy(network).double())(floats)
        assert_equal_up_to_rounding(network(images).double(), expected, FLOAT32_RELATIVE)


def test_black_and_white_are_normalised_to_the_ends_of_the_scale() -> None:
    network = network_for_bytes()
    for value in (0, 255):
        normal = network.normalize(torch.full((1, 1, 1, 3), value, dtype=torch.uint8)).flatten()
        expected = [(value / 255 - mean) / std for mean, std in zip((0.48, 0.45, 0.4), (0.2, 0.25, 0.3), strict=True)]
        assert normal.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (33, 47), (64, 32), (100, 37)])
@pytest.mark.parametrize("name", ["dacnn14", "dacnn18"])
def test_any_image_of_32_pixels_a_side_or_more_is_classified(name: str, rows: int, columns: int) -> None:
    network = randomise(create(name, width=4, seed=0)).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, rows, columns)).shape == (2, 10)
        logits = network(torch.zeros(2, rows, columns, 3, dtype=torch.uint8))
    assert logits.shape == (2, 10) and torch.isfinite(logits).all()


def test_an_image_does_not_know_its_batch() -> None:
    network = randomised().eval()
    images = images_for(network.plan, count=4)
    with torch.no_grad():
        alone = torch.cat([network(image[None]) for image in images])
        assert_equal_up_to_rounding(network(images), alone, FLOAT64_RELATIVE)
        assert network(images[:0]).shape == (0, 5)


WRONG = {
    "no batch": torch.zeros(3, 32, 32),
    "two dimensions": torch.zeros(3, 32),
    "a number": torch.zeros(()),
    "five dimensions": torch.zeros(1, 1, 3, 32, 32),
    "grey": torch.zeros(1, 1, 32, 32),
    "channels last": torch.zeros(1, 32, 32, 3),
    "too low": torch.zeros(1, 3, 31, 32),
    "too narrow": torch.zeros(1, 3, 32, 31),
    "no pixels": torch.zeros(1, 3, 0, 0),
    "bytes with channels first": torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
    "bytes without batch": torch.zeros(32, 32, 3, dtype=torch.uint8),
    "bytes too low": torch.zeros(1, 31, 32, 3, dtype=torch.uint8),
    "grey bytes": torch.zeros(1, 32, 32, 1, dtype=torch.uint8),
}


@pytest.mark.parametrize("case", WRONG)
def test_images_of_a_wrong_shape_are_refused_with_both_shapes(case: str) -> None:
    images = WRONG[case]
    with pytest.raises(ShapeError) as caught:
        create("dacnn14", width=4)(images)
    message = str(caught.value)
    assert str(tuple(images.shape)) in message and "N x" in message


# ---------------------------------------------------------------- one copy, whatever is done to the module


def assert_one_copy(network: Network) -> None:
    """Each kernel is stored once: in names, in bytes and in what forward reads."""
    kernels = network.plan.kernels()
    named = {name: tensor for name, tensor in network.named_parameters(remove_duplicate=False) if name.startswith("anchors.")}
    assert set(named) == {f"anchors.{name}" for name in kernels}
    assert [name for name in network.state_dict() if name.startswith("anchors.")] == [f"anchors.{name}" for name in kernels]
    tensors = list(network.state_dict().values())
    starts = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    assert len(starts) == len(tensors)
    own = [module for name, module in network.named_modules() if "regulator" not in name]
    assert not any(isinstance(module, torch.nn.Conv2d) for module in own)
    norms = sum(layer.out_channels * 2 for layer in network.plan.layers())
    stored = norms + sum(torch.Size(shape).numel() for shape in kernels.values()) + network.classifier.weight.numel()
    regulators = sum(p.numel() for name, p in network.named_parameters() if ".regulator." in name)
    assert sum(p.numel() for p in network.parameters()) == stored + regulators + network.classifier.bias.numel()


def assert_kernels_are_read(network: Network) -> None:
    """After a kernel changes in place, all its readers compute with the new one."""
    images = images_for(network.plan, dtype=network.classifier.weight.dtype)
    relative = FLOAT64_RELATIVE if images.dtype == torch.float64 else FLOAT32_RELATIVE
    with torch.no_grad():
        for kernel in list(network.anchors):
            before = network(images)
            network.anchors[kernel].mul_(-0.5)
            after = network(images)
            assert float((after - before).abs().max()) > 0, f"nobody reads '{kernel}'"
            assert_equal_up_to_rounding(after, tied_by_hand(network)(images), relative)
            network.anchors[kernel].zero_()
            assert not torch.equal(network(images), after)
            assert_equal_up_to_rounding(network(images), tied_by_hand(network)(images), relative)


def saved_and_loaded(network: Network, folder: Path) -> Network:
    save(network, folder / "network.safetensors")
    return load(folder / "network.safetensors")


def assigned(network: Network, folder: Path) -> Network:
    with torch.device("meta"):
        other = Network(network.plan)
    # clones: assigning a state dict shares memory with where it came from, which is not what is asked here
    other.load_state_dict({name: tensor.clone() for name, tensor in network.state_dict().items()}, assign=True)
    return other.eval()


def emptied(network: Network, folder: Path) -> Network:
    with torch.device("meta"):
        other = Network(network.plan)
    other = other.to_empty(device="cpu")
    other.load_state_dict(network.state_dict())
    return other.eval()


OPERATIONS: dict[str, Callable[[Network, Path], Network]] = {
    "deepcopy": lambda network, folder: copy.deepcopy(network),
    "double": lambda network, folder: copy.deepcopy(network).to(torch.float64),
    "there and back": lambda network, folder: copy.deepcopy(network).double().float(),
    "channels last": lambda network, folder: copy.deepcopy(network).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "contiguous": lambda network, folder: copy.deepcopy(network).to(memory_format=torch.contiguous_format),  # type: ignore[call-overload]
    "save and load": saved_and_loaded,
    "load_state_dict assign": assigned,
    "to_empty and load_state_dict": emptied,
    "in another module": lambda network, folder: torch.nn.Sequential(copy.deepcopy(network)).to(torch.float64)[0],
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_copy_of_each_kernel_is_kept_and_read_through(operation: str, tmp_path: Path) -> None:
    original = randomised("dacnn18-mix", depths=(2, 1), regulator="low-rank").float().eval()
    made = OPERATIONS[operation](original, tmp_path)
    images = images_for(original.plan, dtype=torch.float32)
    with torch.no_grad():
        actual = made(images.to(made.classifier.weight.dtype)).float()
        assert_equal_up_to_rounding(actual, original(images), FLOAT32_RELATIVE)
    mine = {tensor.untyped_storage().data_ptr() for tensor in original.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in mine for tensor in made.parameters())
    assert_one_copy(made)
    assert_kernels_are_read(made)


def test_assigned_tensors_are_the_ones_that_are_read() -> None:
    source, target = (randomised("dacnn18", depths=(2,), seed=seed).eval() for seed in (0, 1))
    target.load_state_dict(source.state_dict(), assign=True)
    assert_one_copy(target)
    kernel = "width8"
    assert target.anchors[kernel].data_ptr() == source.anchors[kernel].data_ptr()
    images = images_for(source.plan)
    with torch.no_grad():
        source.anchors[kernel].mul_(2)
        assert torch.equal(target(images), source(images))


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_network_made_without_memory_and_then_filled_classifies_bytes_too(way: str) -> None:
    source = network_for_bytes()
    with torch.device("meta"):
        target = Network(source.plan)
    if way == "to_empty":
        target = target.to_empty(device="cpu")
        for tensor in (*target.parameters(), *target.buffers()):
            # stands for whatever the memory held before
            tensor.data.fill_(99)
    target.load_state_dict(source.state_dict(), assign=way == "assign")
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(target.eval()(images), source(images))


@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_a_state_dict_names_each_kernel_once_and_holds_nothing_else_of_its_size(name: str) -> None:
    network = create(name, width=8, seed=0)
    kernels = {f"anchors.{kernel}": shape for kernel, shape in network.plan.kernels().items()}
    regulators = [key for key in network.state_dict() if ".regulator." in key]
    found = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if tensor.ndim == 4}
    assert {key: shape for key, shape in found.items() if key not in regulators} == kernels


def test_a_channels_last_network_keeps_contiguous_tensors_that_safetensors_takes(tmp_path: Path) -> None:
    network = randomise(create("dacnn18-mix-reg", width=8, seed=0)).eval()
    images = images_for(network.plan, dtype=torch.float32)
    with torch.no_grad():
        expected = network(images)
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        actual = network(images.to(memory_format=torch.channels_last))
    assert_equal_up_to_rounding(actual, expected, FLOAT32_RELATIVE)
    assert all(tensor.is_contiguous() for tensor in network.state_dict().values())
    safetensors.torch.save_file(network.state_dict(), tmp_path / "plain.safetensors")
    read = safetensors.torch.load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["dacnn18-mix-reg", "dacnn3"])
def test_a_channels_last_network_keeps_the_strides_of_every_tensor(name: str) -> None:
    # a 1x1 kernel is contiguous in both formats at once, and a convolution takes the format from its strides
    network = create(name, width=8, regulator="depthwise", seed=0)
    before = {key: tensor.stride() for key, tensor in network.state_dict().items()}
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert {key: tensor.stride() for key, tensor in network.state_dict().items()} == before


def test_activations_follow_the_memory_format_of_the_images() -> None:
    network = create("dacnn18", width=8, seed=0).eval()
    formats = []
    network.stem.register_forward_hook(
        lambda module, inputs, output: formats.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    with torch.no_grad():
        network(torch.zeros(2, 3, 32, 32).to(memory_format=torch.channels_last))
        network(torch.zeros(2, 32, 32, 3, dtype=torch.uint8))
    assert formats == [True, True]


def test_bfloat16_changes_every_tensor_and_computes_nearly_the_same() -> None:
    network = randomise(create("dacnn14", width=16, seed=0)).eval()
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = network(images)
        logits = network.to(torch.bfloat16)(images)
    assert logits.dtype == torch.bfloat16
    # bfloat16 has 8 bits, 0.4 % a rounding; fourteen layers of independent roundings stay well below ten per cent
    assert_equal_up_to_rounding(logits.float(), expected, 0.1)


# ---------------------------------------------------------------- compile and export


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_the_network_and_its_gradients_are_the_same(backend: str) -> None:
    torch.compiler.reset()
    network = randomised("dacnn18-mix", depths=(1, 1), regulator="pointwise").train()
    twin = copy.deepcopy(network)
    images = images_for(network.plan)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    assert_equal_up_to_rounding(compiled(images), twin(images), FLOAT64_RELATIVE)
    gradients(compiled, images)  # type: ignore[arg-type]
    gradients(twin, images)
    for (name, parameter), other in zip(network.named_parameters(), twin.parameters(), strict=True):
        assert parameter.grad is not None and other.grad is not None, name
        assert_equal_up_to_rounding(parameter.grad, other.grad, FLOAT64_RELATIVE)
    # the compiled network reads the kernel it was given, not a copy from when it was compiled
    with torch.no_grad():
        for anchored in (network, twin):
            anchored.anchors["width8"].zero_()
        assert_equal_up_to_rounding(compiled(images), twin(images), FLOAT64_RELATIVE)


@pytest.mark.parametrize("bytes_in", [False, True])
def test_exported_the_network_holds_each_kernel_once_and_computes_the_same(bytes_in: bool) -> None:
    network = randomise(create("dacnn18-mix", width=8, depths=(2, 1), regulator="pointwise", seed=0)).eval()
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8) + 77 if bytes_in else images_for(network.plan, 2, dtype=torch.float32)
    program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    kernels = [name for name in program.state_dict if name.startswith("anchors.")]
    assert kernels == [f"anchors.{name}" for name in network.anchors]
    tensors = [*program.state_dict.values(), *program.constants.values()]
    for name, shape in network.plan.kernels().items():
        if shape[-1] == 3:
            same = [t for t in tensors if isinstance(t, Tensor) and torch.equal(t, network.anchors[name])]
            assert len(same) == 1, name
    run = program.module()
    with torch.no_grad():
        for batch in (images, torch.cat([images, images, images])):
            assert_equal_up_to_rounding(run(batch), network(batch), FLOAT32_RELATIVE)


# ---------------------------------------------------------------- where networks start


@pytest.mark.parametrize("kind", ["pointwise", "depthwise", "low-rank"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["dacnn7", "dacnn18-mix"])
def test_regulators_start_as_the_identity(name: str, place: str, kind: str) -> None:
    changes: dict[str, Any] = {"width": 8, "seed": 4}
    plain = create(name, **changes)
    regulated = create(name, regulator=kind, regulator_place=place, regulator_rank=rank_of(kind), **changes)
    assert any(".regulator." in key for key in regulated.state_dict())
    # norms away from their start, or a residual network would hide its blocks
    for network in (plain, regulated):
        for number, reader in enumerate(readers_by_name(network).values()):
            torch.nn.init.constant_(reader.norm.weight, 0.7 + 0.01 * number)
    images = images_for(plain.plan, dtype=torch.float32)
    with torch.no_grad():
        assert_equal_up_to_rounding(regulated.eval()(images), plain.eval()(images), 1e-5)


def test_the_channel_shift_starts_as_a_shift() -> None:
    plain, shifted = (create("dacnn7", width=8, seed=4, regulator=kind).eval() for kind in ("none", "shift"))
    images = images_for(plain.plan, dtype=torch.float32)
    with torch.no_grad():
        assert float((shifted(images) - plain(images)).abs().max()) > 1e-3


def test_low_rank_regulators_can_leave_the_identity() -> None:
    network = create("dacnn7", width=8, regulator="low-rank", regulator_rank=2, seed=0)
    F.cross_entropy(network(images_for(network.plan, dtype=torch.float32)), torch.arange(3)).backward()
    ups = [parameter for name, parameter in network.named_parameters() if name.endswith("regulator.up.weight")]
    assert ups and all(float(up.grad.abs().max()) > 0 for up in ups if up.grad is not None)
    assert all(up.grad is not None for up in ups)


def test_a_residual_block_starts_as_the_identity() -> None:
    network = create("dacnn18", width=8, seed=0).eval()
    x = images_for(network.plan, dtype=torch.float32)[:, :1].expand(-1, 8, -1, -1).relu()
    with torch.no_grad():
        for block in network.stages[0]:  # type: ignore[union-attr]
            assert torch.equal(block(x, network.anchors), x)


def test_resetting_draws_the_kernels_that_a_new_network_of_that_seed_has() -> None:
    network = randomise(create("dacnn18", width=8, regulator="low-rank", regulator_rank=2, seed=0))
    network.reset_parameters(torch.Generator().manual_seed(9))
    fresh = create("dacnn18", width=8, regulator="low-rank", regulator_rank=2, seed=9)
    for name in ("anchors.stem", "anchors.width8", "classifier.weight", "stages.0.0.readers.0.regulator.down.weight"):
        assert torch.equal(network.state_dict()[name], fresh.state_dict()[name]), name


def test_two_hundred_readers_of_one_kernel_are_finite_and_learn() -> None:
    network = create("dacnn18", width=8, depths=(100,), seed=0)
    assert {name: len(layers) for name, layers in network.plan.readers().items()} == {"stem": 1, "width8": 200}
    images, labels = images_for(network.plan, 4, side=16, dtype=torch.float32), torch.arange(4)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses, sizes = [], []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        losses.append(float(loss.detach()))
        gradient = network.anchors["width8"].grad
        assert gradient is not None
        sizes.append(float(gradient.norm()))
    assert losses[-1] < losses[0]
    # blocks start as the identity: their norms learn in the first step, the kernel behind them from the second on
    assert sizes[0] == 0 and sizes[1] > 0 and sizes[2] > 0
    with torch.no_grad():
        assert torch.isfinite(network.eval()(images)).all()


def test_the_stem_learns_from_the_first_step() -> None:
    network = create("dacnn34", width=8, seed=0)
    F.cross_entropy(network(images_for(network.plan, 4, dtype=torch.float32)), torch.arange(4)).backward()
    gradient = network.anchors["stem"].grad
    assert gradient is not None and torch.isfinite(gradient).all() and float(gradient.norm()) > 0


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_array_is_no_tensor(dtype: type) -> None:
    with pytest.raises(ShapeError, match="images are a ndarray: expected a tensor: torch.from_numpy makes one"):
        create("dacnn3", width=8)(np.zeros((1, 32, 32, 3), dtype))

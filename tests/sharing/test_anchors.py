"""Kernels are stored once, and a reader's kernel is what the papers' formulas say."""

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import dacnn
from dacnn.errors import PlanError
from dacnn.networks.network import Network
from dacnn.networks.plan import Plan
from dacnn.sharing.anchors import Anchors, Combine, Repeat, Stored, parameter_name, repeat_kernel

# no rounding but that of float64 sums in another order
RELATIVE = 1e-10

SCHEMES: dict[str, dict[str, Any]] = {
    "template2": {"share": "template", "templates": 2},
    "template4": {"share": "template", "templates": 4},
    "repeat": {"share": "repeat"},
    "repeat-small": {"share": "repeat", "base_width": 4},
    "groups": {"groups": ("stage1.*1", "stage3.*1")},
}


def network_of(name: str, scheme: str, **changes: Any) -> Network:
    chosen = SCHEMES[scheme]
    if scheme == "groups" and name == "dacnn14":
        chosen = {"groups": ("stage1.*", "stage3.*")}
    return dacnn.create(name, width=8, seed=0, **chosen | changes)


def stirred(network: Network) -> Network:
    """The network in float64 with every number moved, so that nothing is at a special value."""
    generator = torch.Generator().manual_seed(1)
    network = network.double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.1)
    return network


def kernel_by_hand(network: Network, layer: Any) -> torch.Tensor:
    """What a layer reads, weight by weight, from the formulas of the papers."""
    stored = network.anchors[layer.anchor].detach()
    own = {key: tensor.detach() for key, tensor in network.anchors.own_tensors(layer.name).items()}
    if isinstance(layer.kernel, Combine):
        return sum(float(own["coefficients"][t]) * stored[t] for t in range(layer.kernel.templates))  # type: ignore[return-value]
    if isinstance(layer.kernel, Repeat):
        kernel = torch.empty(layer.kernel_shape, dtype=stored.dtype)
        for o in range(kernel.shape[0]):
            for i in range(kernel.shape[1]):
                r, s = o // layer.kernel.out_channels, i // layer.kernel.in_channels
                w = stored[o % layer.kernel.out_channels, i % layer.kernel.in_channels]
                kernel[o, i] = own["gain"][r, s] * w / (1 + torch.exp(own["steepness"][r, s] * w))
        return kernel
    return stored


def twin_of(network: Network) -> Network:
    """The network in which every layer owns what it reads."""
    plan = network.plan
    twin = Network(plan.with_kernels({layer.name: parameter_name(layer.name) for layer in plan.layers()})).double()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("anchors.")}
    for layer in plan.layers():
        state[f"anchors.{parameter_name(layer.name)}"] = kernel_by_hand(network, layer)
    twin.load_state_dict(state)
    return twin


def loss_of(network: Network) -> torch.Tensor:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return F.cross_entropy(network(images), torch.arange(4))


@pytest.mark.parametrize("regulator", ["none", "pointwise", "low-rank"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["dacnn14", "dacnn18", "dacnn18-mix"])
def test_outputs_and_gradients_are_those_of_kernels_written_out_by_the_formulas(name: str, scheme: str, regulator: str) -> None:
    rank = {"regulator_rank": 2} if regulator == "low-rank" else {}
    network = stirred(network_of(name, scheme, regulator=regulator, **rank))
    twin = twin_of(network)
    loss, expected = loss_of(network), loss_of(twin)
    torch.testing.assert_close(loss, expected, rtol=RELATIVE, atol=0)
    loss.backward()
    expected.backward()
    for anchor, layers in network.plan.readers().items():
        # by the chain rule of the formula, a reader's kernel gradient flows into what it stores and what all store
        stored = network.anchors[anchor].detach().clone().requires_grad_()
        total = torch.zeros_like(stored)
        for layer in layers:
            gradient = twin.anchors[parameter_name(layer.name)].grad
            own = {
                key: value.detach().clone().requires_grad_() for key, value in network.anchors.own_tensors(layer.name).items()
            }
            inputs = [stored, *own.values()]
            kernel = formula(layer.kernel, *inputs)
            gradients = torch.autograd.grad(kernel, inputs, gradient)
            total += gradients[0]
            for key, found in zip(own, gradients[1:], strict=True):
                reference = network.anchors.own_tensors(layer.name)[key].grad
                torch.testing.assert_close(reference, found, rtol=RELATIVE, atol=1e-13)
        torch.testing.assert_close(network.anchors[anchor].grad, total, rtol=RELATIVE, atol=1e-13)


def formula(kernel: Any, stored: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
    """The same formulas once more, in whole tensors that autograd can follow."""
    if isinstance(kernel, Combine):
        return torch.einsum("t,toihw->oihw", own[0], stored)
    if isinstance(kernel, Repeat):
        gain, steepness = (torch.kron(values, torch.ones(stored.shape[:2], dtype=stored.dtype)) for values in own)
        w = stored.repeat(*own[0].shape, 1, 1)
        return gain[..., None, None] * w / (1 + torch.exp(steepness[..., None, None] * w))
    return stored * 1


def test_a_curve_of_a_steep_tile_does_not_overflow() -> None:
    base = torch.tensor([[[[50.0]], [[-50.0]]]])
    kernel = repeat_kernel(base, torch.ones(1, 1), torch.full((1, 1), 100.0))
    assert kernel.flatten().tolist() == [0.0, -50.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kernel_is_in_the_file_once_and_comes_back(scheme: str, tmp_path: Path) -> None:
    network = network_of("dacnn18-mix", scheme)
    dacnn.save(network, tmp_path / "network.safetensors")
    again = dacnn.load(tmp_path / "network.safetensors")
    assert again.plan == network.plan
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in again.state_dict().items())
    bytes_stored = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
    assert (tmp_path / "network.safetensors").stat().st_size < bytes_stored + 100 * len(network.state_dict()) + 16_000
    save_file(network.state_dict(), tmp_path / "plain.safetensors")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_memory_format_leaves_what_is_stored_as_it_is(scheme: str) -> None:
    network = network_of("dacnn14", scheme)
    before = {name: (tensor.clone(), tensor.stride()) for name, tensor in network.anchors.state_dict().items()}
    for part in (network, network.anchors):
        part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        for name, tensor in network.anchors.state_dict().items():
            assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1]
    assert all(parameter.is_leaf and parameter.is_shared() for parameter in network.share_memory().parameters())
    assert {tensor.dtype for tensor in network.double().anchors.parameters()} == {torch.float64}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_compiled_and_exported_networks_read_the_same(scheme: str) -> None:
    network = network_of("dacnn14", scheme).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = network(images)
    assert torch.equal(copy.deepcopy(network)(images), expected)
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected)
    exported = torch.export.export(network, (images,))
    torch.testing.assert_close(exported.module()(images), expected)
    assert {key for key in exported.state_dict if key.startswith("anchors.")} == {
        f"anchors.{key}" for key in network.anchors.state_dict()
    }


def test_one_kernel_of_64_channels_serves_four_widths() -> None:
    network = dacnn.create("dacnn18-mix", share="repeat")
    shapes = {name: tuple(network.anchors[name].shape) for name in network.anchors}
    assert shapes == {"stem": (64, 3, 3, 3), "base": (64, 64, 3, 3), "base1x1": (64, 64, 1, 1)}
    assert sorted({layer.out_channels for layer in network.plan.readers()["base"]}) == [64, 128, 256, 512]
    counts = dacnn.count(network)
    assert counts.stored_parameters < 100_000
    assert counts.used_parameters == dacnn.count(dacnn.create("resnet18")).stored_parameters


@pytest.mark.parametrize("templates", [1, 2, 4, 7])
def test_a_combination_starts_with_the_variance_and_the_identity_of_a_template(templates: int) -> None:
    expression = Combine("bank", templates)
    anchors = Anchors({f"layer{index}": (expression, (32, 32, 3, 3)) for index in range(6)})
    anchors.reset_parameters(torch.Generator().manual_seed(0))
    for index in range(6):
        coefficients = anchors.own_tensors(f"layer{index}")["coefficients"]
        assert float(coefficients.detach().sum()) == pytest.approx(1, abs=1e-5)
        assert float(coefficients.detach().norm()) == pytest.approx(1, abs=1e-5)
        # 9,216 weights: their variance is known to 1.5 %, and four such deviations are allowed
        assert float(anchors.read(f"layer{index}").detach().var()) == pytest.approx(2 / 288, rel=0.06)
    anchors.reset_parameters(torch.Generator().manual_seed(0), near_identity=["bank"])
    kernel = anchors.read("layer0").detach()
    assert float(kernel[:, :, 1, 1].diag().mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 2), (1, 2), (4, 2)])
def test_tiles_start_with_the_variance_of_a_stored_kernel_and_apart(inputs: int, outputs: int) -> None:
    shape = (32 * outputs, 32 * inputs, 3, 3)
    anchors = Anchors({f"layer{index}": (Repeat("base", 32, 32), shape) for index in range(64)})
    anchors.reset_parameters(torch.Generator().manual_seed(0))
    variance = torch.stack([anchors.read(f"layer{index}").detach().var() for index in range(64)]).mean()
    # 64 readers draw at least one gain each, whose square has a deviation of sqrt(2): four of 0.18
    assert float(variance) == pytest.approx(2 / math.prod(shape[1:]), rel=0.72)
    gains = torch.cat([anchors.own_tensors(f"layer{index}")["gain"].detach().flatten() for index in range(64)])
    assert len(gains.unique()) == len(gains)


def test_readers_that_disagree_are_refused() -> None:
    with pytest.raises(PlanError, match="'b' needs 'k' to be"):
        Anchors({"a": (Stored("k"), (8, 8, 3, 3)), "b": (Stored("k"), (8, 8, 1, 1))})
    with pytest.raises(PlanError, match="'b' needs 'k' to be"):
        Anchors({"a": (Combine("k", 2), (8, 8, 3, 3)), "b": (Combine("k", 3), (8, 8, 3, 3))})
    with pytest.raises(PlanError, match="8 -> 12 channels is no tiling of base 'k', which is 8 -> 8: expected multiples"):
        Anchors({"a": (Repeat("k", 8, 8), (12, 8, 3, 3))})
    with pytest.raises(PlanError, match="kernel 'own' has the name of something that every module has"):
        Anchors({"a": (Stored("own"), (8, 8, 3, 3))})
    with pytest.raises(PlanError, match="bank 'k' has 0 templates"):
        Combine("k", 0)
    with pytest.raises(PlanError, match="base 'k' is 0 -> 8 channels"):
        Repeat("k", 8, 0)


def test_a_plan_whose_widths_are_no_multiples_of_the_base_is_refused_by_the_layers_name() -> None:
    with pytest.raises(PlanError, match=r"layer 'stage0\.conv0': a kernel of 8 -> 8 channels is no tiling of base 'base'"):
        dacnn.create("dacnn14", width=8, share="repeat", base_width=3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_with_expressions_survives_json(scheme: str) -> None:
    plan = network_of("dacnn18-mix", scheme).plan
    assert Plan.from_json(plan.to_json()) == plan
    assert any(not isinstance(layer.kernel, str) for layer in plan.layers()) == (scheme != "groups")


def test_readers_that_would_be_stored_under_one_name_are_refused() -> None:
    assert len({parameter_name(name) for name in ("a.b", "a_b", "a__b", "ab", "a.b.c", "a.b_c", "a_b.c")}) == 7
    shape = (8, 8, 3, 3)
    with pytest.raises(PlanError, match=r"'a_\.b' would be stored under the name of another layer: rename"):
        Anchors({"a._b": (Combine("k", 2), shape), "a_.b": (Combine("k", 2), shape)})
    plan = dacnn.create("dacnn3", width=8).plan
    names = iter(["a._b", "a_.b", "c"])
    with pytest.raises(PlanError, match=r"layers 'a\._b' and 'a_\.b' would be stored under one name"):
        plan.mapped(lambda layer: dataclasses.replace(layer, name=next(names)))

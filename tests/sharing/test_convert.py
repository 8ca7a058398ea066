"""A converted copy against its original: the same module but for the kernels, which one owner holds."""

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import dacnn
from dacnn.errors import PlanError
from dacnn.sharing.anchors import Anchors
from dacnn.sharing.conversion import Conversion
from dacnn.sharing.convert import propose
from dacnn.sharing.readers import owner_of
from dacnn.sharing.survey import survey
from dacnn.sharing.trace import trace
from foreign import NETWORKS, WIDTH, chain, make, stirred, tensors_of

# both sides compute in float64 and differ in the order of sums only
FLOAT64 = {"rtol": 1e-9, "atol": 1e-11}


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def tied_twin(module: nn.Module, shared: nn.Module, mapping: Conversion) -> nn.Module:
    """The original with every reader's weight set to what the reader reads."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name in (name for readers in mapping.groups.values() for name in readers):
            twin.get_submodule(name).weight.copy_(shared.get_submodule(name).weight)
    return twin


def assert_gradients_add_up(module: nn.Module, x: Tensor, rule: Any = "all") -> None:
    shared, mapping = dacnn.anchor(module, rule, start="mean", example=x)
    twin = tied_twin(module, shared, mapping)
    for network in (shared, twin):
        loss = sum((output * output.detach().cos()).sum() for output in tensors_of(network(x)))
        assert isinstance(loss, Tensor)
        loss.backward()
    torch.testing.assert_close(tensors_of(shared(x)), tensors_of(twin(x)), **FLOAT64)
    owner = owner_of(shared)
    for kernel, readers in mapping.groups.items():
        assert owner is not None
        gradients = [twin.get_submodule(reader).weight.grad for reader in readers]
        if all(gradient is None for gradient in gradients):
            assert owner[kernel].grad is None
        else:
            total = sum(gradient for gradient in gradients if gradient is not None)
            torch.testing.assert_close(owner[kernel].grad, total, **FLOAT64)
    mine = dict(shared.named_parameters())
    for name, parameter in twin.named_parameters():
        if name in mine and parameter.grad is not None:
            torch.testing.assert_close(mine[name].grad, parameter.grad, **FLOAT64)


# ---------------------------------------------------------------- the same but for the kernels


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_kernel_gets_the_sum_of_the_gradients_of_the_layers_it_replaces(name: str, training: bool) -> None:
    module, x = make(name)
    assert_gradients_add_up(module.double().train(training), x.double())


def test_so_does_a_kernel_whose_readers_are_called_again_and_again() -> None:
    again, once = (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, dtype=torch.float64) for _ in range(2))
    assert_gradients_add_up(nn.Sequential(again, nn.Tanh(), once, nn.Tanh(), again, again), drawn(2, WIDTH, 9, 9).double())


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Chains of convolutions of few shapes, with whatever strides, norms, activations and biases."""
    parts: list[nn.Module] = [nn.Conv2d(2, 4, 1)]
    for _ in range(draw(st.integers(2, 6))):
        side, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 4]))
        stride, dilation = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 2]))
        mode = draw(st.sampled_from(["zeros", "circular"]))
        convolution = nn.ConvTranspose2d if draw(st.integers(0, 4)) == 0 else nn.Conv2d
        extra: dict[str, Any] = {"padding_mode": mode} if convolution is nn.Conv2d else {}
        padding = dilation * (side // 2)
        bias = draw(st.booleans())
        parts.append(
            convolution(4, 4, side, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias, **extra)
        )
        parts += draw(st.sampled_from([[], [nn.BatchNorm2d(4)], [nn.BatchNorm2d(4), nn.Tanh()], [nn.GroupNorm(2, 4)]]))
    module = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    return stirred(module, seed=draw(st.integers(0, 99))).double().train(draw(st.booleans()))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(["all", "stage", "isomorphic"]))
def test_so_it_does_in_any_chain(module: nn.Module, rule: str) -> None:
    assert_gradients_add_up(copy.deepcopy(module), drawn(2, 2, 9, 9).double(), rule)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(networks(), st.sampled_from(["all", "stage"]), st.integers(0, 99))
def test_a_fit_keeps_outputs_where_normed_channels_differ_by_gains(module: nn.Module, rule: str, seed: int) -> None:
    x, module = drawn(2, 2, 9, 9).double(), copy.deepcopy(module).eval()
    norms = trace(module, survey(module).layers, x).norms
    generator = torch.Generator().manual_seed(seed)
    for readers in propose(module, rule, example=x).groups.values():
        kernel = module.get_submodule(readers[0]).weight.detach().clone()
        for name in readers:
            # smaller ones than a hundredth would be raised to that
            gain = torch.rand(len(kernel), generator=generator, dtype=torch.float64) + 0.5
            gain *= torch.where(torch.rand(len(kernel), generator=generator) < 0.5, -1, 1)
            gain = gain.view(-1, *[1] * (kernel.ndim - 1))
            module.get_submodule(name).weight.data = kernel * gain if name in norms else kernel.clone()
    shared, _ = dacnn.anchor(module, rule, start="fit", example=x)
    torch.testing.assert_close(shared(x), module(x), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"regulator": "pointwise"}, {"templates": 2}, {"start": "fit"}], ids=str)
@pytest.mark.parametrize("name", ["resnet", "unet", "convmixer", "attention"])
def test_the_argument_is_left_as_it_was(name: str, settings: dict) -> None:
    module, x = make(name)
    module.train()
    next(module.children()).eval()
    handle = module.register_forward_hook(lambda *_: None)
    before = {key: (value, value.clone(), value._version) for key, value in module.state_dict(keep_vars=True).items()}
    parts = [(part, type(part), part.training, set(vars(part)), dict(part._modules)) for part in module.modules()]
    shared, _ = dacnn.anchor(module, example=x, **settings)
    assert list(module._forward_hooks) == [handle.id]
    assert len(shared._forward_hooks) == 1
    for key, value in module.state_dict(keep_vars=True).items():
        assert value is before[key][0] and torch.equal(value, before[key][1]) and value._version == before[key][2]
    for part, kind, training, attributes, children in parts:
        assert type(part) is kind and part.training == training and set(vars(part)) == attributes
        assert part._modules == children
    # nor does the copy hold anything of it
    mine = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    assert not mine & {tensor.untyped_storage().data_ptr() for tensor in shared.state_dict().values()}
    modes = {name: part.training for name, part in module.named_modules()}
    assert all(part.training == modes[name] for name, part in shared.named_modules() if name in modes)


def test_strides_paddings_and_biases_stay_where_they_were() -> None:
    module, x = make("resnet")
    shared, mapping = dacnn.anchor(module, "stage", example=x)
    changed = {name for readers in mapping.groups.values() for name in readers}
    for name, part in module.named_modules():
        other = shared.get_submodule(name)
        assert other.extra_repr() == part.extra_repr() and isinstance(other, type(part))
        assert (type(other) is type(part)) == (name not in changed)
    kept = {key for key in module.state_dict() if key.removesuffix(".weight") not in changed}
    assert kept == {key for key in shared.state_dict() if not key.startswith("anchors.")}
    assert all(torch.equal(module.state_dict()[key], shared.state_dict()[key]) for key in kept)


def test_nothing_shareable_gives_an_equal_network() -> None:
    for module in (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Linear(3, 3)):
        stirred(module)
        for rule in ("all", "none"):
            shared, mapping = dacnn.anchor(module, rule, regulator="pointwise")
            assert mapping.groups == {} and shared is not module and owner_of(shared) is None
            assert repr(shared) == repr(module) and list(shared.state_dict()) == list(module.state_dict())
            assert all(torch.equal(value, shared.state_dict()[key]) for key, value in module.state_dict().items())


@pytest.mark.parametrize("settings", [{}, {"regulator": "pointwise"}, {"templates": 2}, {"start": "fit"}], ids=str)
def test_converting_twice_gives_the_same_bits(settings: dict) -> None:
    module, x = make("resnet")
    (one, mapping), (other, again) = (dacnn.anchor(module, "stage", example=x, **settings) for _ in range(2))
    assert mapping == again and list(one.state_dict()) == list(other.state_dict())
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


# ---------------------------------------------------------------- kernels of other kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "settings", [{"start": "mean"}, {"start": "fit"}, {"templates": 2}, {"regulator": "depthwise"}], ids=str
)
def test_kernels_keep_their_type(dtype: torch.dtype, settings: dict) -> None:
    module, x = stirred(chain()).to(dtype).eval(), drawn(2, WIDTH, 9, 9).to(dtype)
    shared, _ = dacnn.anchor(module, example=x, **settings)
    assert {parameter.dtype for parameter in shared.parameters()} == {dtype}
    assert shared(x).dtype == dtype and torch.isfinite(shared(x)).all()


@pytest.mark.parametrize("settings", [{}, {"start": "fit"}, {"templates": 2}], ids=str)
def test_a_network_without_memory_is_converted_and_filled_later(settings: dict) -> None:
    module, x = make("unet")
    shared, mapping = dacnn.anchor(module, example=x, **settings)
    empty, same = dacnn.anchor(copy.deepcopy(module).to("meta"), example=x.to("meta"), **settings)
    assert same == mapping and all(parameter.is_meta for parameter in empty.parameters())
    empty.load_state_dict(shared.state_dict(), assign=True)
    torch.testing.assert_close(empty(x), shared(x), rtol=0, atol=0)


def test_frozen_kernels_stay_frozen_and_their_regulators_learn() -> None:
    module = stirred(chain()).requires_grad_(False)
    shared, _ = dacnn.anchor(module, regulator="pointwise")
    learning = {name for name, parameter in shared.named_parameters() if parameter.requires_grad}
    assert learning == {f"{index}.0.regulator.weight" for index in range(3)}
    shared, _ = dacnn.anchor(module, templates=2)
    assert not any(parameter.requires_grad for parameter in shared.parameters())


# ---------------------------------------------------------------- where the owner stands


class RunsItsChildren(nn.Module):
    """A root that is a container but in name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


class HasAnchors(RunsItsChildren):
    """Detection networks have anchors of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = drawn(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) * self.anchors.sum()


@pytest.mark.parametrize(("name", "place"), [("convmixer", "1.0.0.anchors"), ("unet", "anchors"), ("resnet", "anchors")])
def test_the_owner_stands_at_the_root_but_in_a_container(name: str, place: str) -> None:
    module, x = make(name)
    shared, _ = dacnn.anchor(module)
    assert [name for name, part in shared.named_modules() if isinstance(part, Anchors)] == [place]
    assert tensors_of(shared(x))[0].shape == tensors_of(module(x))[0].shape
    if place != "anchors":
        assert len(shared) == len(module)


def test_the_owner_stands_in_a_reader_where_the_root_runs_all_its_parts_or_has_a_use_for_the_name() -> None:
    for module in (RunsItsChildren(), HasAnchors()):
        shared, _ = dacnn.anchor(module)
        assert isinstance(shared.first.anchors, Anchors)
        with torch.no_grad():
            module.second.weight.copy_(module.first.weight)
        torch.testing.assert_close(shared(drawn(2, WIDTH)), module(drawn(2, WIDTH)))


def test_where_nothing_may_be_called_anchors_the_module_is_refused() -> None:
    module = HasAnchors()
    module.first.anchors, module.second.anchors = 1, 2
    with pytest.raises(PlanError, match="have an attribute 'anchors' already, where the shared kernels would stand: rename it"):
        dacnn.anchor(module)

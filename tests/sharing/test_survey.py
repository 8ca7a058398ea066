"""What of a foreign module can share a kernel, and why the rest cannot."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import dacnn
from dacnn.errors import PlanError
from dacnn.sharing.survey import kernel_kind, survey
from foreign import NETWORKS, WIDTH, chain, make

INPUT = torch.randn(2, WIDTH, 9, 9, generator=torch.Generator().manual_seed(0))


def replaced(change: Callable[[nn.Module], nn.Module | None], module: nn.Module | None = None) -> nn.Sequential:
    """A chain whose second layer was changed."""
    module = module or chain()
    assert isinstance(module, nn.Sequential)
    module[1][0] = change(module[1][0]) or module[1][0]
    return module


@pytest.mark.parametrize("name", NETWORKS)
def test_every_convolution_and_linear_layer_of_a_foreign_network_is_found(name: str) -> None:
    module, _ = make(name)
    found = survey(module)
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
    expected = {name: part for name, part in module.named_modules() if isinstance(part, kinds)}
    assert found.layers == expected and found.refused == {} and found.aliases == {}


def test_layers_share_where_shape_groups_type_device_and_learning_agree() -> None:
    def kind(layer: nn.Module) -> tuple:
        return kernel_kind(layer)

    same = [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, dilation=2, bias=False),
        nn.Conv2d(8, 8, 3, padding="same", padding_mode="circular"),
    ]
    assert len({kind(layer) for layer in same}) == 1
    other = [
        nn.Conv2d(8, 8, 5),
        nn.Conv2d(16, 8, 3, groups=2),
        nn.ConvTranspose2d(8, 8, 3),
        nn.Conv1d(8, 8, 3),
        nn.Conv2d(8, 8, 3, dtype=torch.float64),
        nn.Conv2d(8, 8, 3, device="meta"),
        nn.Conv2d(8, 8, 3).requires_grad_(False),
        nn.Linear(8, 8),
        nn.Conv2d(8, 8, 1),
    ]
    kinds = {kind(layer) for layer in (same[0], *other)}
    assert len(kinds) == len(other) + 1


def test_a_depthwise_kernel_is_not_taken_for_a_dense_one_of_that_shape() -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=8))
    assert dacnn.anchor(module)[1].groups == {"conv8x1x3x3_groups8": ("0", "2")}


# ---------------------------------------------------------------- layers that cannot share


class Computed(nn.Conv2d):
    """Its weight is made of something else."""

    @property
    def weight(self) -> torch.Tensor:
        return self.other * 2


def with_computed_weight(layer: nn.Module) -> None:
    layer.other = layer._parameters.pop("weight")
    layer.__class__ = Computed


class Packed(nn.Parameter):
    """Stands for packed integers, as quantising libraries keep them."""


def with_packed_weight(layer: nn.Module) -> None:
    layer._parameters["weight"] = Packed(layer.weight.detach())


def with_forward_replaced(layer: nn.Module) -> None:
    layer.forward = functools.partial(type(layer).forward, layer)  # type: ignore[method-assign]


REFUSED: dict[str, tuple[Callable[[nn.Module], nn.Module | None], str]] = {
    "weight norm": (parametrizations.weight_norm, "a weight that a parametrization computes: remove it first"),
    "spectral norm": (parametrizations.spectral_norm, "a weight that a parametrization computes"),
    "old spectral norm": (nn.utils.spectral_norm, "no weight of its own: something else computes it"),
    "computed": (with_computed_weight, "no weight of its own"),
    "lazy": (lambda layer: nn.LazyConv2d(WIDTH, 3), "is lazy and has no shape yet: run the module once"),
    "packed": (with_packed_weight, "holds a Packed of torch.float32"),
    "complex": (lambda layer: layer.to(torch.complex64), "holds a Parameter of torch.complex64"),
    "patched": (with_forward_replaced, "has had its forward replaced"),
}


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_a_layer_that_cannot_share_stays_as_it_is_and_the_reason_is_told(case: str) -> None:
    change, reason = REFUSED[case]
    module = replaced(change)
    shared, mapping = dacnn.anchor(module)
    assert mapping.groups == {"conv8x8x3x3": ("0.0", "2.0")}
    assert list(mapping.refused) == ["1.0"] and reason in mapping.refused["1.0"]
    assert type(shared[1][0]) is type(module[1][0])
    # where it was named, that is an error
    with pytest.raises(PlanError, match=f"layer '1.0' cannot share: it .*{reason}"):
        dacnn.anchor(module, [["0.0", "1.0"]])


def test_tied_weights_are_refused_wherever_the_second_holder_is() -> None:
    module = nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    module[3].weight = module[0].weight
    _, mapping = dacnn.anchor(module)
    assert mapping.groups == {"linear8x8": ("1", "2")}
    assert mapping.refused == {"3": "holds a weight that other layers hold too: untie it first"}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning")
def test_quantised_layers_are_refused_by_name() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    quantised = torch.ao.quantization.quantize_dynamic(module, {nn.Linear})
    _, mapping = dacnn.anchor(quantised)
    assert mapping.groups == {"conv8x8x3x3": ("2", "3")}
    assert mapping.refused == dict.fromkeys(("0", "1"), "is quantised: share before quantising")
    with pytest.raises(PlanError, match="layer '0' cannot share: it is quantised"):
        dacnn.anchor(quantised, ["0+1"])


def test_a_layer_at_two_places_is_one_layer() -> None:
    block = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    module = nn.ModuleDict({"a": block, "b": nn.Conv2d(WIDTH, WIDTH, 3, padding=1), "again": block})
    assert survey(module).aliases == {"again": "a"}
    for rule in ("all", ["a+b"], ["again+b"], ["a+again+b"], ["*"]):
        shared, mapping = dacnn.anchor(module, rule)
        assert [set(readers) for readers in mapping.groups.values()] == [{"a", "b"}], rule
        assert shared["a"] is shared["again"] and shared["a"].weight is shared["b"].weight
    with pytest.raises(PlanError, match="group0 has 1 layers, a: expected two or more"):
        dacnn.anchor(module, ["a+again"])
    three = nn.ModuleDict({**module, "c": nn.Conv2d(WIDTH, WIDTH, 3), "d": nn.Conv2d(WIDTH, WIDTH, 3)})
    with pytest.raises(PlanError, match="layer 'a' is in group0 and, by another of its names, in group1"):
        dacnn.anchor(three, ["a+b", "again+c"])


# ---------------------------------------------------------------- modules that cannot be converted


def test_a_wrapped_compiled_or_scripted_module_is_refused_with_what_to_do() -> None:
    module = chain()
    with pytest.raises(PlanError, match="the module is compiled: share the kernels of the module inside"):
        dacnn.anchor(torch.compile(module, backend="eager"))
    with pytest.raises(PlanError, match="module '0' is compiled"):
        dacnn.anchor(nn.Sequential(torch.compile(module, backend="eager")))
    with pytest.raises(PlanError, match="the module is wrapped in DataParallel"):
        dacnn.anchor(nn.DataParallel(module))
    shared, _ = dacnn.anchor(module)
    with pytest.raises(PlanError, match=r"module '0\.0\.anchors' holds anchors already"):
        dacnn.anchor(shared)
    with pytest.raises(PlanError, match="module 'anchors' holds anchors already"):
        dacnn.anchor(dacnn.create("dacnn3", width=8))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_a_script_is_refused() -> None:
    plain = chain(norm=None)
    for script in (torch.jit.script(plain), torch.jit.trace(plain, INPUT)):
        with pytest.raises(PlanError, match="is a script: share the kernels of the Python module"):
            dacnn.anchor(script)


def test_what_is_no_module_is_refused() -> None:
    for thing in (None, "resnet50", nn.Conv2d, [nn.Conv2d(8, 8, 3)]):
        with pytest.raises(PlanError, match="expected an nn.Module"):
            dacnn.anchor(thing)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_module_that_cannot_be_copied_is_refused_with_the_tensor_that_is_to_blame() -> None:
    for change in (nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        module = replaced(change)
        with pytest.raises(RuntimeError):
            copy.deepcopy(module)
        with pytest.raises(PlanError, match=r"cannot be copied, .* itself: 'weight' of '1\.0' is computed from"):
            dacnn.anchor(module)
    module = chain()
    module[2][1] = nn.LazyBatchNorm2d()
    with pytest.raises(PlanError, match=r"not changed itself: '2\.1' is lazy and has no shape yet: run the module once"):
        dacnn.anchor(module)
    module = chain()
    module.stream = (number for number in range(3))
    with pytest.raises(PlanError, match="cannot be copied, and is not changed itself: TypeError: cannot pickle 'generator'"):
        dacnn.anchor(module)


def test_a_module_compiled_in_place_is_converted_and_its_copy_is_not_compiled() -> None:
    module = chain().eval()
    module.compile(backend="eager")
    shared, _ = dacnn.anchor(module)
    with torch.no_grad():
        expected = shared(INPUT)
        shared.get_submodule("0.0").anchors["conv8x8x3x3"].zero_()
        assert not torch.equal(shared(INPUT), expected)


# ---------------------------------------------------------------- layers behind which a regulator cannot stand


def test_layers_that_are_read_without_being_called_get_no_regulator() -> None:
    module, x = make("attention")
    shared, mapping = dacnn.anchor(module, regulator="pointwise")
    assert mapping.groups == {}
    assert len(mapping.refused) == 6 and all("a regulator would be left out" in why for why in mapping.refused.values())
    torch.testing.assert_close(shared(x), module(x))
    with pytest.raises(PlanError, match=r"layer 'encoder.layers.0.linear1' cannot share: it is read without being called"):
        dacnn.anchor(module, ["*.linear1"], regulator="pointwise")
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    assert dacnn.anchor(layer, regulator="pointwise")[1].groups == {}
    assert dacnn.anchor(layer)[1].groups == {"linear8x8": ("self_attn.out_proj", "linear1", "linear2")}


def test_a_depthwise_regulator_stands_behind_convolutions_of_images_alone() -> None:
    module = nn.ModuleList([*(nn.Linear(8, 8) for _ in range(2)), *(nn.Conv2d(8, 8, 3) for _ in range(2))])
    _, mapping = dacnn.anchor(module, regulator="depthwise")
    assert mapping.groups == {"conv8x8x3x3": ("2", "3")}
    assert set(mapping.refused) == {"0", "1"} and "is no 2-d convolution" in mapping.refused["0"]
    with pytest.raises(PlanError, match="layer '0' cannot share: it is no 2-d convolution, .*: use pointwise"):
        dacnn.anchor(module, ["0+1"], regulator="depthwise")

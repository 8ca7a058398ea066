"""A reader does what its class does, with a kernel that is not its own, and a regulator behind it."""

import abc
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import dacnn
from dacnn.sharing.readers import ForeignReader
from foreign import chain, make

RANKS = {"pointwise": None, "depthwise": None, "low-rank": 2, "shift": None}
# float32 sums in another order
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- a reader is a layer of its class


class Standardised(nn.Conv2d):
    """Convolves with its kernel standardised, and counts."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


class Abstract(nn.Linear, abc.ABC):
    """Has a metaclass of its own."""


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "1-d": (lambda: nn.Conv1d(8, 8, 3), drawn(2, 8, 9)),
    "2-d": (lambda: nn.Conv2d(8, 8, 3), drawn(2, 8, 9, 9)),
    "3-d": (lambda: nn.Conv3d(8, 8, 3), drawn(2, 8, 5, 6, 7)),
    "1x1": (lambda: nn.Conv2d(8, 16, 1, bias=False), drawn(2, 8, 9, 9)),
    "strided, dilated": (lambda: nn.Conv2d(8, 8, 3, stride=(1, 2), padding=2, dilation=2), drawn(2, 8, 9, 9)),
    "grouped, circular": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular"), drawn(2, 8, 9, 9)),
    "depthwise, same": (lambda: nn.Conv2d(8, 8, 5, padding="same", groups=8), drawn(2, 8, 9, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 2, stride=2, output_padding=1), drawn(2, 8, 5, 5)),
    "transposed 1-d": (lambda: nn.ConvTranspose1d(8, 8, 2, groups=2), drawn(2, 8, 5)),
    "linear": (lambda: nn.Linear(8, 16), drawn(2, 5, 8)),
    "linear, one vector": (lambda: nn.Linear(8, 16, bias=False), drawn(8)),
    "unbatched 1-d": (lambda: nn.Conv1d(8, 8, 2), drawn(8, 9)),
    "unbatched 2-d": (lambda: nn.Conv2d(8, 8, 2), drawn(8, 9, 9)),
    "unbatched 3-d": (lambda: nn.Conv3d(8, 8, 2), drawn(8, 5, 6, 7)),
    "no images": (lambda: nn.Conv2d(8, 8, 3), drawn(0, 8, 9, 9)),
    "no rows": (lambda: nn.Linear(8, 8), drawn(0, 5, 8)),
    "own class": (lambda: Standardised(8, 8, 3), drawn(2, 8, 9, 9)),
    "own metaclass": (lambda: Abstract(8, 8), drawn(2, 8)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_a_reader_does_with_the_shared_kernel_what_its_class_does_with_its_own(case: str) -> None:
    build, x = LAYERS[case]
    module = nn.ModuleList([build(), build()])
    shared, mapping = dacnn.anchor(module, start="mean")
    assert len(mapping.groups) == 1
    mean = (module[0].weight + module[1].weight) / 2
    for layer, reader in zip(module, shared, strict=True):
        with torch.no_grad():
            layer.weight.copy_(mean)
        torch.testing.assert_close(reader(x), layer(x), rtol=0, atol=0)
        assert isinstance(reader, type(layer)) and isinstance(reader, ForeignReader)
        assert reader.extra_repr() == layer.extra_repr() and repr(reader).startswith(f"Anchored{type(layer).__name__}(")
        assert "weight" not in dict(reader.named_parameters()) and reader.weight is shared[0].weight
        assert reader.bias is None or torch.equal(reader.bias, layer.bias)
        assert getattr(reader, "calls", 1) == 1


def test_a_reader_takes_no_weight_of_its_own() -> None:
    shared, _ = dacnn.anchor(chain())
    with pytest.raises((KeyError, AttributeError)):
        shared[1][0].weight = nn.Parameter(drawn(8, 8, 3, 3))
    # what is written into it, all read
    nn.init.constant_(shared[1][0].weight, 0.5)
    assert all((shared[index][0].weight == 0.5).all() for index in range(3))


# ---------------------------------------------------------------- regulators


@pytest.mark.parametrize("kind", RANKS)
@pytest.mark.parametrize("case", LAYERS)
def test_a_regulator_starts_as_what_it_is_and_regulates_channels(case: str, kind: str) -> None:
    build, x = LAYERS[case]
    module = nn.ModuleList([build(), build()])
    regulated, mapping = dacnn.anchor(module, regulator=kind, regulator_rank=RANKS[kind])
    if not mapping.groups:
        assert kind == "depthwise" and set(mapping.refused) == {"0", "1"}
        return
    plain, _ = dacnn.anchor(module)
    expected = plain[0](x)
    channel = -1 if isinstance(module[0], nn.Linear) else -1 - len(module[0].kernel_size)
    if kind == "shift":
        expected = expected.roll(-1, channel)
    torch.testing.assert_close(regulated[0](x), expected, **CLOSE)
    # away from the start: the same matrix over channels, wherever they stand
    if kind == "pointwise":
        mixed = drawn(expected.shape[channel], expected.shape[channel])
        with torch.no_grad():
            regulated[0].regulator.weight.copy_(mixed[..., None, None])
        expected = torch.tensordot(expected, mixed, dims=([channel], [1])).movedim(-1, channel)
        torch.testing.assert_close(regulated[0](x), expected, **CLOSE)


def test_regulators_have_the_type_the_device_and_the_mode_of_their_layers() -> None:
    module = nn.Sequential(*[nn.Conv2d(8, 8, 3) for _ in range(3)]).to(torch.bfloat16).eval()
    shared, _ = dacnn.anchor(module, regulator="low-rank", regulator_rank=2)
    assert {parameter.dtype for parameter in shared.parameters()} == {torch.bfloat16}
    assert not any(part.training for part in shared.modules())
    assert shared(drawn(1, 8, 9, 9).bfloat16()).dtype == torch.bfloat16
    shared, _ = dacnn.anchor(module.to("meta"), regulator="pointwise")
    assert all(parameter.is_meta for parameter in shared.parameters())
    assert dacnn.anchor(module.train(), regulator="shift")[0][0].regulator.training


def test_low_rank_regulators_are_drawn_from_the_generator_that_is_handed_over() -> None:
    def downs(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shared, _ = dacnn.anchor(chain(), regulator="low-rank", regulator_rank=2, generator=generator)
        return [value for name, value in shared.named_parameters() if name.endswith("down.weight")]

    assert all(torch.equal(one, other) for one, other in zip(downs(0), downs(0), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(downs(0), downs(1), strict=True))


# ---------------------------------------------------------------- PyTorch's own readers of weights


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("templates", [None, 2])
def test_attention_reads_shared_weights_with_and_without_its_fast_path(training: bool, templates: int | None) -> None:
    module, x = make("attention")
    twin = copy.deepcopy(module)
    shared, mapping = dacnn.anchor(module, templates=templates)
    assert set(mapping.groups) == {"linear8x8", "linear16x8", "linear8x16"} and len(mapping.groups["linear8x8"]) == 2
    with torch.no_grad():
        for reader in (reader for readers in mapping.groups.values() for reader in readers):
            twin.get_submodule(reader).weight.copy_(shared.get_submodule(reader).weight)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(shared.train(training)(x), twin.train(training)(x), **CLOSE)
    if training:
        shared(x).sum().backward()
        assert all(parameter.grad is not None for parameter in shared.parameters())

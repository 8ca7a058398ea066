"""A norm takes up gains where it alone sees what a layer gives, channel by channel, and nowhere else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dacnn
from dacnn.sharing.survey import survey
from dacnn.sharing.trace import Trace, trace
from foreign import WIDTH, chain, make, stirred

X = torch.randn(2, WIDTH, 9, 9, generator=torch.Generator().manual_seed(0))


def traced(module: nn.Module, example: Any = X) -> Trace:
    return trace(module, survey(module).layers, example)


class Pair(nn.Module):
    """A convolution and a norm, and something between or beside them."""

    def __init__(self, way: Callable[["Pair", Tensor], Any], norm: nn.Module | None = None, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, **{"padding": 1, **settings})
        self.norm = norm or nn.BatchNorm2d(WIDTH)
        self.way = way
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


class ActivatedNorm(nn.BatchNorm2d):
    """Activates before it norms."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.relu())


class NormAndActivation(nn.BatchNorm2d):
    """Activates behind the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Standardised(nn.Conv2d):
    """Convolves with its kernel standardised: a larger kernel gives the same."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


def straight(pair: Pair, x: Tensor) -> Tensor:
    return pair.norm(pair.conv(x))


def looked_at(pair: Pair, x: Tensor) -> Tensor:
    y = pair.conv(x)
    assert y.shape[1] == WIDTH and y.dtype.is_floating_point and y.device.type == "cpu" and y.ndim == 4 and len(y) == y.size(0)
    return pair.norm(y)


def added(pair: Pair, x: Tensor) -> Tensor:
    y = pair.conv(x)
    return pair.norm(y) + y


def returned(pair: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    y = pair.conv(x)
    return pair.norm(y), y


def kept(pair: Pair, x: Tensor) -> Tensor:
    pair.kept.append(pair.conv(x))
    return pair.norm(pair.kept[-1])


def written_into(pair: Pair, x: Tensor) -> Tensor:
    y = pair.conv(x)
    y[:, 0] = 1
    return pair.norm(y)


def activated_in_place(pair: Pair, x: Tensor) -> Tensor:
    y = pair.conv(x)
    F.relu(y, inplace=True)
    return pair.norm(y)


def measured(pair: Pair, x: Tensor) -> Tensor:
    y = pair.conv(x)
    return pair.norm(y) * float(y.norm())


def read_out(pair: Pair, x: Tensor) -> Tensor:
    y = pair.conv(x)
    return pair.norm(y) * y.tolist()[0][0][0][0]


def normed_twice(pair: Pair, x: Tensor) -> Tensor:
    return pair.norm(pair.norm(pair.conv(x)))


def normed_elsewhere(pair: Pair, x: Tensor) -> Tensor:
    return pair.norm(pair.conv(pair.norm(x)))


def convolved_twice(pair: Pair, x: Tensor) -> Tensor:
    return pair.norm(pair.conv(pair.conv(x)))


def by_name(pair: Pair, x: Tensor) -> Tensor:
    return pair.norm(input=pair.conv(x)) if type(pair.norm).__name__ == "BatchNorm2d" else pair.norm(pair.conv(x))


TAKEN: dict[str, Callable[[], Pair]] = {
    "straight": lambda: Pair(straight),
    "shape looked at": lambda: Pair(looked_at),
    "by keyword": lambda: Pair(by_name),
    "activated behind": lambda: Pair(straight, NormAndActivation(WIDTH)),
    "strided, dilated": lambda: Pair(straight, stride=2, dilation=2, padding_mode="reflect"),
    "without statistics": lambda: Pair(straight, nn.BatchNorm2d(WIDTH, track_running_stats=False)),
}
NOT_TAKEN: dict[str, Callable[[], Pair]] = {
    way.__name__: lambda way=way: Pair(way)
    for way in (
        added,
        returned,
        kept,
        written_into,
        activated_in_place,
        measured,
        read_out,
        normed_twice,
        normed_elsewhere,
        convolved_twice,
    )
}
NOT_TAKEN |= {
    "no scale": lambda: Pair(straight, nn.BatchNorm2d(WIDTH, affine=False)),
    "another norm": lambda: Pair(straight, nn.GroupNorm(2, WIDTH)),
    "instance norm": lambda: Pair(straight, nn.InstanceNorm2d(WIDTH, affine=True)),
    "activated before": lambda: Pair(straight, ActivatedNorm(WIDTH)),
    "scale that is computed": lambda: Pair(straight, nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(WIDTH))),
}


@pytest.mark.parametrize("case", TAKEN)
def test_a_norm_that_alone_sees_a_layer_takes_up_its_gains(case: str) -> None:
    assert traced(TAKEN[case]()).norms == {"conv": "norm"}


@pytest.mark.parametrize("case", NOT_TAKEN)
def test_a_norm_that_does_not_see_the_layer_alone_takes_up_none(case: str) -> None:
    assert traced(NOT_TAKEN[case]()).norms == {}


@pytest.mark.parametrize("case", [case for case in (*TAKEN, *NOT_TAKEN) if "statistics" not in case])
def test_a_fit_keeps_outputs_where_gains_are_taken_up_and_norms_where_not(case: str) -> None:
    make_pair = (TAKEN | NOT_TAKEN)[case]
    module = stirred(nn.Sequential(make_pair(), make_pair())).double().eval()
    with torch.no_grad():
        gains = torch.tensor([2.0, -3, 0.5, 1, -1, 4, -0.2, 1]).view(-1, 1, 1, 1)
        module[1].conv.weight.copy_(module[0].conv.weight * gains)
    module.__class__ = SideBySide
    shared, _ = dacnn.anchor(module, start="fit", example=X.double())
    if case in TAKEN:
        torch.testing.assert_close(shared(X.double()), module(X.double()), rtol=1e-9, atol=1e-9)
    else:
        assert all(torch.equal(value, shared.state_dict()[key]) for key, value in module.norm_state().items())


class SideBySide(nn.Sequential):
    """Gives all parts the same input."""

    def forward(self, x: Tensor) -> Any:
        return [part(x) for part in self]

    def norm_state(self) -> dict[str, Tensor]:
        return {key: value for key, value in self.state_dict().items() if ".norm." in key}


def test_a_tied_scale_takes_up_nothing() -> None:
    module = chain()
    module[2][1].weight = module[1][1].weight
    assert traced(module).norms == {"0.0": "0.1"}


def test_layers_with_a_forward_pass_or_hooks_of_their_own_give_no_gains() -> None:
    module = nn.Sequential(Standardised(WIDTH, WIDTH, 3), nn.BatchNorm2d(WIDTH))
    assert traced(module).norms == {}
    module = chain()
    module[0][0].register_forward_hook(lambda layer, inputs, output: output.relu_())
    assert traced(module).norms == {"1.0": "1.1", "2.0": "2.1"}


def test_a_norm_over_tokens_is_not_taken_for_one_over_channels() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))
    assert traced(module, torch.randn(4, WIDTH)).norms == {"0": "1"}
    assert traced(module, torch.randn(4, WIDTH, WIDTH)).norms == {}
    # unbatched, a convolution's channels stand where the norm looks for images
    module = nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm1d(WIDTH))
    assert traced(module, torch.randn(WIDTH, WIDTH)).norms == {}


def test_every_convolution_of_a_residual_network_has_its_norm() -> None:
    module, x = make("resnet")
    norms = traced(module, x).norms
    assert len(norms) == len(survey(module).layers)
    assert all(norm == layer.replace("convolution", "normalization") for layer, norm in norms.items())
    # here an activation stands between
    assert traced(*make("convmixer")).norms == {}

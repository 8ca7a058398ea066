"""One forward pass tells where resolutions change, and leaves no trace of itself."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dacnn
from dacnn.errors import ConfigError, PlanError
from dacnn.sharing.survey import survey
from dacnn.sharing.trace import Trace, trace
from foreign import NETWORKS, WIDTH, UNet, chain, make

X = torch.randn(2, WIDTH, 9, 9, generator=torch.Generator().manual_seed(0))


def traced(module: nn.Module, example: Any = X) -> Trace:
    return trace(module, survey(module).layers, example)


# ---------------------------------------------------------------- stages


def test_a_stage_is_a_run_between_changes_of_resolution() -> None:
    stages = traced(UNet(), torch.randn(1, 3, 16, 16)).stages
    numbers = {name: stage for name, (stage, _) in stages.items()}
    assert [numbers[f"down.{index}.{layer}"] for index in (0, 1) for layer in (0, 3)] == [0, 0, 1, 1]
    assert [numbers[name] for name in ("middle.0", "middle.3", "up.0", "join.0.0", "join.0.3")] == [2, 2, 3, 3, 3]
    assert [numbers[name] for name in ("up.1", "join.1.0", "join.1.3", "head")] == [4, 4, 4, 4]
    # as large as the first of the way down, and yet another stage
    assert stages["down.0.3"][1] == stages["join.1.3"][1] == (16, 16)


def test_squeeze_and_excitation_or_token_mixing_begin_no_stage() -> None:
    for name in ("regnet", "mlp-mixer", "convnext", "vit"):
        module, x = make(name)
        groups = dacnn.anchor(module, "stage", example=x)[1].groups
        assert not any("_at" in kernel for kernel in groups), name


def test_layers_of_one_image_without_a_batch_have_the_resolution_of_a_batch() -> None:
    module = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, stride=2))
    assert traced(module, X).stages == traced(module, X[0]).stages == {"0": (0, (9, 9)), "1": (1, (4, 4))}


def test_a_layer_that_does_not_run_has_no_stage_and_the_mapping_says_so() -> None:
    module = nn.Sequential(chain(depth=2), nn.ModuleDict({"idle": nn.Conv2d(WIDTH, WIDTH, 3)}))
    module.__class__ = FirstAlone
    _, mapping = dacnn.anchor(module, "stage", example=X)
    assert mapping.groups == {"conv8x8x3x3": ("0.0.0", "0.1.0")}
    assert mapping.refused == {"1.idle": "was not called in the traced forward pass, so that its stage is unknown"}
    assert dacnn.anchor(module)[1].groups == {"conv8x8x3x3": ("0.0.0", "0.1.0", "1.idle")}


class FirstAlone(nn.Sequential):
    """Runs its first part."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


def test_a_layer_that_is_called_again_later_is_of_the_stage_of_its_first_call() -> None:
    layer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    module = nn.Sequential(layer, nn.MaxPool2d(2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1), layer)
    assert traced(module, X).stages == {"0": (0, (9, 9)), "2": (1, (4, 4))}


# ---------------------------------------------------------------- the example


@pytest.mark.parametrize("name", NETWORKS)
def test_tracing_leaves_the_module_the_example_and_the_random_numbers_as_they_were(name: str) -> None:
    module, x = make(name)
    module.train()
    before, example = copy.deepcopy(module.state_dict()), x.clone()
    torch.manual_seed(5)
    traced(module, x)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(x, example)
    assert all(part.training and not part._forward_hooks and not part._forward_pre_hooks for part in module.modules())
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_a_lazy_part_stays_lazy_and_random_draws_are_not_missed() -> None:
    module = nn.Sequential(*chain(), nn.LazyConv2d(3, 1), nn.Dropout())
    module[4].forward = lambda x: F.dropout(x, training=True)  # type: ignore[method-assign]
    torch.manual_seed(5)
    shared, mapping = dacnn.anchor(module, start="fit", example=X)
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert isinstance(module[3], nn.LazyConv2d) and isinstance(shared[3], nn.LazyConv2d)
    assert list(mapping.refused) == ["3"]
    assert shared(X).shape == (2, 3, 9, 9)


@pytest.mark.parametrize("example", [X, (X,), {"input": X}])
def test_an_example_is_a_tensor_or_arguments(example: Any) -> None:
    assert len(traced(chain(), example).stages) == 3


def test_what_does_not_run_is_refused_with_the_reason() -> None:
    for example in (X[:, :3], "an image", {"image": X}, (X, X)):
        with pytest.raises(PlanError, match="the module does not run on the example: (RuntimeError|TypeError): "):
            dacnn.anchor(chain(), "stage", example=example)
    for rule in ("stage", "isomorphic"):
        with pytest.raises(ConfigError, match=f"rule '{rule}' needs to see where the resolution changes: give an example"):
            dacnn.anchor(chain(), rule)
    with pytest.raises(ConfigError, match="start 'fit' needs to see which norm follows which layer: give an example"):
        dacnn.anchor(chain(), start="fit")

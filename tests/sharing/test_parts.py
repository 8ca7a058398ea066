"""A shared module as people use it: as a part of another, averaged, pruned, parametrized, with kinds of their own."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel

import dacnn
from dacnn.errors import CheckpointError, PlanError
from dacnn.networks.network import Network, create
from dacnn.sharing.regulators import REGULATORS
from reference import one_thread  # noqa: F401  (a fixture)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Headed(nn.Module):
    """A converted module as the trunk of a larger one."""

    def __init__(self, trunk: nn.Module, features: int = 5) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(features, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(x))
        return logits


class Plain(nn.Module):
    """A stem, a body that can share, a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            *[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3)]
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return logits


def shared() -> nn.Module:
    return dacnn.anchor(Plain(), "all")[0]


def zoo(seed: int = 0) -> Network:
    return create("dacnn14", width=8, seed=seed)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: Headed(shared()), "'trunk'"),
        (lambda: AveragedModel(shared()), "'module'"),
        (lambda: AveragedModel(zoo()), "'module'"),
        (lambda: nn.ModuleDict({"a": shared(), "b": shared()}), "'a' and 'b'"),
    ],
    ids=["in a larger module", "average of a converted one", "average of a network", "two of them"],
)
def test_what_only_holds_something_shared_is_refused_with_the_name_of_the_part(make: Any, part: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"but {part} in it"):
        dacnn.save(make(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_it_is_refused_before_an_epoch_is_spent_on_it(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="but 'trunk' in it"):
        dacnn.train(Headed(shared()), data="digits", channels=3, epochs=1, out=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_an_average_of_weights_is_saved_by_its_module(tmp_path: Path) -> None:
    average = AveragedModel(zoo())
    average.update_parameters(zoo(seed=1))
    dacnn.save(average.module, tmp_path / "a.safetensors")
    assert torch.equal(dacnn.load(tmp_path / "a.safetensors").anchors["width8"], average.module.anchors["width8"])


@pytest.mark.parametrize("make", [zoo, shared])
def test_a_pruned_kernel_is_pruned_for_all_its_readers_and_learns_under_the_mask(make: Any) -> None:
    """Against the same mask multiplied into the kernel by hand, step for step."""
    pruned, by_hand = make(), make()
    owners = [next(part for part in module.modules() if type(part).__name__ == "Anchors") for module in (pruned, by_hand)]
    name = max(owners[0].readers(), key=lambda kernel: len(owners[0].readers()[kernel]))
    prune.l1_unstructured(owners[0], name, amount=0.5)
    mask = owners[0].get_buffer(f"{name}_mask")
    stored = owners[1].get_parameter(name)
    assert mask.mean() == 0.5
    optimizers = [torch.optim.SGD(module.parameters(), 0.1) for module in (pruned, by_hand)]
    for _ in range(3):
        with torch.no_grad():
            stored *= mask
        outputs = []
        for module, optimizer in zip((pruned, by_hand), optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(module(IMAGES))
            outputs[-1].square().sum().backward()
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
        stored.grad *= mask
        for optimizer in optimizers:
            optimizer.step()
    # weights that are loaded take effect
    fresh = make()
    fresh_owner = next(part for part in fresh.modules() if type(part).__name__ == "Anchors")
    prune.identity(fresh_owner, name)
    fresh.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(fresh.eval()(IMAGES), pruned.eval()(IMAGES))


def test_kernels_that_are_made_of_others_are_saved_once_they_are_themselves(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, kernel: Tensor) -> Tensor:
            return kernel / 2

    pruned, halved = zoo(), zoo()
    prune.l1_unstructured(pruned.anchors, "width8", amount=0.5)
    parametrize.register_parametrization(halved.anchors, "width8", Half())
    for network in (pruned, halved):
        with pytest.raises(CheckpointError, match="'anchors.width8' is made of other tensors"):
            dacnn.save(network, tmp_path / "a.safetensors")
    prune.remove(pruned.anchors, "width8")
    parametrize.remove_parametrizations(halved.anchors, "width8")
    for network in (pruned, halved):
        dacnn.save(network, tmp_path / "a.safetensors")
        torch.testing.assert_close(dacnn.load(tmp_path / "a.safetensors")(IMAGES), network.eval()(IMAGES))


def test_a_regulator_of_ones_own_is_saved_and_loaded_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Gate(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.rand(channels, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gate

    monkeypatch.setitem(REGULATORS, "gate", Gate)
    module = dacnn.anchor(Plain(), "all", regulator="gate")[0].eval()
    dacnn.save(module, tmp_path / "a.safetensors")
    loaded = dacnn.load(tmp_path / "a.safetensors", into=Plain())
    assert torch.equal(loaded(IMAGES), module(IMAGES))
    assert torch.equal(copy.deepcopy(module)(IMAGES), module(IMAGES))


def test_a_layer_resets_the_kernel_that_it_reads_but_no_bank() -> None:
    one, bank = shared(), dacnn.anchor(Plain(), "all", templates=2)[0]
    before = one.body[2][0].weight.clone()
    one.body[0][0].reset_parameters()
    assert not torch.equal(one.body[2][0].weight, before)
    with pytest.raises(PlanError, match=r"layer 'body\.0\.0' reads a kernel that is made of others"):
        bank.body[0][0].reset_parameters()


def test_an_expression_that_no_file_can_hold_is_refused() -> None:
    @dataclasses.dataclass(frozen=True)
    class Scaled:
        anchor: str

    plan = zoo().plan
    name = next(iter(plan.layers())).name
    with pytest.raises(PlanError, match=f"layer '{name}' reads a Scaled"):
        plan.with_kernels({name: Scaled("stem")})  # type: ignore[dict-item]


def test_a_seed_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    create("dacnn14-reg", width=8, regulator="low-rank", regulator_rank=2, seed=0)
    assert torch.equal(torch.get_rng_state(), before)

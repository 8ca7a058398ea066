"""A soft-shared network is folded into a hard-shared one, exactly where its layers are multiples of each other."""

from typing import Any

import numpy as np
import pytest
import torch

import dacnn
from dacnn.errors import ConfigError, PlanError
from dacnn.networks.network import Network

# float32 sums of 12 layers in another order
TOLERANCE = 1e-4


def images(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def soft(name: str = "dacnn14", **changes: Any) -> Network:
    """A template network whose norms have seen images, so that their statistics are nothing special."""
    network = dacnn.create(name, width=8, share="template", templates=4, seed=0, **changes)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        for _ in range(20):
            network.train()(images(16))
    return network.eval()


def align(network: Network, groups: list[list[str]]) -> None:
    """Make the layers of every group multiples of the first, some of them negative."""
    factors = [1.0, -0.7, 2.5, 1.3, -1.9, 0.4]
    with torch.no_grad():
        for group in groups:
            first = network.anchors.own_tensors(group[0])["coefficients"]
            for name, factor in zip(group, factors * 3, strict=False):
                network.anchors.own_tensors(name)["coefficients"].copy_(factor * first.clone())


@pytest.mark.parametrize("regulator", ["none", "pointwise", "depthwise", "shift", "low-rank"])
@pytest.mark.parametrize("name", ["dacnn14", "dacnn18"])
def test_multiples_fold_without_a_change_of_the_logits(name: str, regulator: str) -> None:
    rank = {"regulator_rank": 2} if regulator == "low-rank" else {}
    network = soft(name, regulator=regulator, **rank)
    layers = [layer.name for layer in network.plan.readers()["width8"]]
    groups = [layers[:3] + layers[6:], layers[3:6]]
    align(network, groups)
    expected = network(images())
    folded, done = dacnn.fold(network, similarity=0.999)
    assert sorted(map(sorted, done.groups.values())) == sorted(map(sorted, groups))
    assert max(done.errors.values()) < 1e-5
    torch.testing.assert_close(folded(images()), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert not any(key.startswith("anchors.own.") for key in folded.state_dict())
    saved = 2 * 8 * 8 * 9 + 4 * len(layers)
    assert dacnn.count(folded).stored_parameters == dacnn.count(network).stored_parameters - saved


def test_the_original_is_left_as_it_was_and_the_folded_one_is_saved_like_any_other(tmp_path: Any) -> None:
    network = soft()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded, _ = dacnn.fold(network, kernels=2)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    dacnn.save(folded, tmp_path / "folded.safetensors")
    assert torch.equal(dacnn.load(tmp_path / "folded.safetensors")(images()), folded(images()))


@pytest.mark.parametrize("kernels", [1, 2, 5, 12, 99])
def test_as_many_kernels_come_out_as_were_asked_for_if_there_are_so_many_layers(kernels: int) -> None:
    folded, done = dacnn.fold(soft(), kernels=kernels)
    # no two layers of this network are equally alike, so every number of groups can be had
    assert len(done.groups) == min(kernels, 12)
    assert sum(map(len, done.groups.values())) == 12
    assert len([name for name in folded.anchors if name.startswith("width8_")]) == len(done.groups)


def test_as_many_kernels_as_layers_change_nothing() -> None:
    network = soft()
    folded, done = dacnn.fold(network, kernels=12)
    assert max(done.errors.values()) < 1e-5
    torch.testing.assert_close(folded(images()), network(images()), rtol=TOLERANCE, atol=TOLERANCE)


def test_the_report_is_the_cosine_between_evaluated_kernels() -> None:
    network = soft()
    (bank,) = dacnn.alike(network)
    kernels = np.stack([network.anchors.read(name).detach().double().numpy().ravel() for name in bank.layers])
    norms = np.linalg.norm(kernels, axis=1)
    np.testing.assert_allclose(bank.similarity.numpy(), np.abs(kernels @ kernels.T) / np.outer(norms, norms), rtol=1e-9)


def test_every_bank_of_a_network_of_several_widths_is_folded() -> None:
    network = soft("dacnn18-mix")
    folded, done = dacnn.fold(network, kernels=1)
    assert sorted(done.groups) == ["width16_0", "width32_0", "width64_0", "width8_0"]
    assert torch.isfinite(folded(images())).all()


def test_what_cannot_be_folded_is_refused() -> None:
    with pytest.raises(PlanError, match="'dacnn14' has no template bank to fold"):
        dacnn.fold(dacnn.create("dacnn14", width=8))
    with pytest.raises(PlanError, match="no template bank"):
        dacnn.alike(dacnn.create("dacnn14", width=8))
    with pytest.raises(ConfigError, match="kernels = 0: expected 1 or more"):
        dacnn.fold(soft(), kernels=0)
    with pytest.raises(ConfigError, match=r"similarity = 1\.5: expected 0 to 1"):
        dacnn.fold(soft(), similarity=1.5)
    with pytest.raises(ConfigError, match="give one of them"):
        dacnn.fold(soft(), kernels=2, similarity=0.5)

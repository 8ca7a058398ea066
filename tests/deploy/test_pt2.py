"""Networks of every kind go through `torch.export`, exact, with each kernel once and for any batch size."""

import io
import zipfile
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import foreign
from dacnn.config import NetworkConfig
from dacnn.deploy.parity import measure, noise_images, reference_logits
from dacnn.deploy.pt2 import to_pt2
from dacnn.errors import DeployError
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapted_as
from dacnn.networks.network import Network, create
from dacnn.networks.plan import Input, Plan
from dacnn.networks.zoo import DESIGNS
from reference import PLACES, REGULATORS, one_thread, plans, randomise, rank_of  # noqa: F401  (a fixture)


def check(network: Classifier, relative: float = 1e-4) -> bytes:
    """What was exported, in batches of one, two and three images, against the network in float64."""
    content = to_pt2(network)
    module = torch.export.load(io.BytesIO(content)).module()
    images = noise_images(network.input, 3)
    reference = reference_logits(network, images)
    for batch_size in (1, 2, 3):
        parity = measure(lambda part: module(part).detach().numpy(), images, reference, batch_size)
        assert parity.max_error <= relative and parity.unexplained == 0
    return content


@pytest.mark.parametrize("name", DESIGNS)
def test_every_network_of_the_zoo_is_exported_with_each_kernel_once(name: str) -> None:
    network = randomise(create(name, width=4, num_classes=3, seed=0))
    with zipfile.ZipFile(io.BytesIO(check(network))) as archive:
        sizes = [info.file_size for info in archive.infolist() if "/weights/" in info.filename]
    kernels = [4 * parameter.numel() for parameter in network.anchors.parameters()]
    assert all(sizes.count(size) >= kernels.count(size) for size in kernels)
    assert sum(sizes) < sum(tensor.nbytes for tensor in network.state_dict().values()) + 500 * len(network.state_dict())


@pytest.mark.parametrize("share", ["stage", "template", "repeat", "none"])
def test_every_scheme_is_exported(share: str) -> None:
    check(randomise(create("dacnn18-mix", width=4, num_classes=3, seed=0, share=share)))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", REGULATORS)
def test_every_regulator_is_exported(kind: str, place: str) -> None:
    changes: dict[str, Any] = {"regulator": kind, "regulator_place": place, "regulator_rank": rank_of(kind)}
    check(randomise(create("dacnn18", depths=(1, 1), width=4, num_classes=3, seed=0, **changes)))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(plan=plans(), seed=st.integers(0, 99))
def test_any_plan_is_exported(plan: Plan, seed: int) -> None:
    # of deep networks of wild statistics, float32 itself is no better
    check(randomise(Network(plan, torch.Generator().manual_seed(seed)), seed), relative=1e-3)


def test_a_converted_network_of_transformers_is_exported() -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=5)
    module = foreign.stirred(transformers.ResNetForImageClassification(config))
    check(adapted_as(NetworkConfig(name="foreign.py:make", share="all"), Input(32, 32), tuple("abcde"), module))


def test_what_pytorch_cannot_export_is_refused_in_one_line() -> None:
    class Decides(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3 * 4 * 4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x.flatten(1))
            return -y if bool(y.sum() > 0) else y

    with pytest.raises(DeployError, match=r"torch\.export cannot export the network") as refusal:
        to_pt2(Adapted(Decides(), Input(4, 4), ("a", "b")))
    assert "\n" not in str(refusal.value)

"""The unshared twin computes what the shared network does, with a kernel of its own for every layer."""

import pytest
import torch

import dacnn
import factories
from dacnn.bench.twin import classifier_only, twin_of
from dacnn.config import NetworkConfig
from dacnn.errors import PlanError
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import adapted_as
from dacnn.networks.plan import Input

GREY = Input(32, 32, 1, (0.3,), (0.7,))
TEN = tuple("0123456789")


def trained(network: Classifier) -> Classifier:
    """A network whose norms and regulators are not at their start any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator)).add_(0.01 * ("running_var" not in name))
    return network.eval()


def images(network: Classifier) -> torch.Tensor:
    of = network.input
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, of.height, of.width, of.channels), dtype=torch.uint8, generator=generator)


def check(network: Classifier, twin: Classifier) -> None:
    with torch.no_grad():
        x = images(network)
        assert torch.equal(twin(x), network(x))
        assert torch.equal(classifier_only(twin)(twin.normalize(x)), twin(x))
    assert dacnn.count(twin).stored_parameters > dacnn.count(network).stored_parameters
    assert dacnn.count(twin).macs == dacnn.count(network).macs
    assert not any(module.training for module in twin.modules())


@pytest.mark.parametrize(
    "settings",
    [
        {"share": "all"},
        {"share": "stage", "regulator": "low-rank", "regulator_rank": 2},
        {"share": "stage", "regulator": "depthwise", "regulator_place": "after-norm"},
        {"share": "template", "templates": 2},
        {"share": "repeat", "base_width": 4},
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_twin_of_a_network_of_ours_computes_the_same(settings: dict[str, object]) -> None:
    network = trained(dacnn.create("dacnn18", width=8, depths=(2, 2, 2, 2), seed=0, **settings))
    twin = twin_of(network)
    check(network, twin)
    assert twin.owner is not None and max(map(len, twin.owner.readers().values())) == 1


@pytest.mark.parametrize("config", [{"share": "all"}, {"share": "template", "templates": 2}], ids=["all", "template"])
def test_the_twin_of_a_converted_network_computes_the_same(config: dict[str, object]) -> None:
    into = f"{factories.FILE}:chain"
    network = trained(adapted_as(NetworkConfig(into, **config), GREY, TEN))  # type: ignore[arg-type]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    twin = twin_of(network, into)
    check(network, twin)
    assert twin.owner is None
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_a_network_that_has_no_twin_says_why() -> None:
    into = f"{factories.FILE}:chain"
    converted = adapted_as(NetworkConfig(into, share="all", regulator="depthwise"), GREY, TEN)
    plain = adapted_as(NetworkConfig(into, share="all"), GREY, TEN)
    unshared = dacnn.create("dacnn14", width=8, share="none")
    for network, factory, reason in (
        (converted, into, "regulators (depthwise) stand behind its layers"),
        (plain, None, "its unshared layers are not known: give the FILE.py:factory"),
        (plain, f"{factories.FILE}:anchored", "its layers share kernels by themselves"),
        (unshared, None, "it shares no kernel: it is its own twin"),
    ):
        with pytest.raises(PlanError) as refusal:
            twin_of(network, factory)
        assert reason in str(refusal.value)

"""The unshared twin of a trained network: every layer reads a copy of the kernel of its own, so that both give the same."""

import copy
import dataclasses

import torch
from torch import nn

from dacnn.errors import PlanError
from dacnn.networks.adapted import Adapted
from dacnn.networks.classifier import Classifier
from dacnn.networks.factory import make_module
from dacnn.networks.network import Network
from dacnn.sharing.anchors import parameter_name
from dacnn.sharing.readers import owner_of


def twin_of(network: Classifier, into: str | None = None) -> Classifier:
    """Make the twin.

    Args:
        network: The network, left as it is.
        into: FILE.py:factory that makes the layers of a network of somebody else's.

    Returns:
        The twin, in evaluation mode; regulators stay where they are.

    Raises:
        PlanError: The network shares nothing, or its layers cannot be had without sharing.
        ConfigError: The factory cannot be called.
    """
    if network.owner is None or max(map(len, network.owner.readers().values())) == 1:
        raise PlanError("it shares no kernel: it is its own twin")
    if isinstance(network, Network):
        return _planned(network)
    assert isinstance(network, Adapted)
    return _adapted(network, into)


@torch.no_grad()
def _planned(network: Network) -> Network:
    plan = network.plan.mapped(lambda layer: dataclasses.replace(layer, kernel=parameter_name(layer.name)))
    twin = Network(dataclasses.replace(plan, name=f"{plan.name} unshared"))
    rest = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("anchors.")}
    kernels = {f"anchors.{layer.anchor}": network.anchors.read(layer.name) for layer in twin.plan.layers()}
    twin.load_state_dict(rest | kernels)
    return twin.eval()


@torch.no_grad()
def _adapted(network: Adapted, into: str | None) -> Adapted:
    conversion, owner = network.conversion, network.owner
    assert owner is not None
    if conversion.regulator is not None:
        raise PlanError(f"regulators ({conversion.regulator}) stand behind its layers, for which unshared ones have no place")
    if into is None:
        raise PlanError("its unshared layers are not known: give the FILE.py:factory that makes them")
    module = make_module(into, num_classes=len(network.classes), in_channels=network.input.channels)
    if owner_of(module) is not None:
        raise PlanError("its layers share kernels by themselves")
    twin = Adapted(module, network.input, network.classes).try_out()
    ours = {name: tensor for name, tensor in network.module.state_dict().items() if name in module.state_dict()}
    kernels = {f"{reader}.weight": owner.read(reader) for reader in owner.expressions}
    module.load_state_dict(copy.deepcopy(ours) | kernels)
    return twin.eval()


def classifier_only(network: Classifier) -> nn.Module:
    """The layers alone: from normalised floats, N x C x H x W, to logits.

    Args:
        network: The network, which the module holds.

    Returns:
        The module, in evaluation mode, without gradients.
    """
    return _Logits(network).eval().requires_grad_(False)


class _Logits(nn.Module):
    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.logits(x)

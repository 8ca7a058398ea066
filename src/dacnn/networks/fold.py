"""From soft sharing to hard sharing: layers whose combinations have become alike read one kernel.

A combination may be another's multiple: the factor goes into the norm behind it, never into the kernel.

Source: Savarese & Maire, ICLR 2019, arXiv:1902.09701, section 3.2. Deviations: kernels are compared, not their
coefficients, whose angles depend on how the templates lie; the accuracy of the folded network is left to measure.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dacnn.errors import ConfigError, PlanError
from dacnn.networks.network import Network, as_planned
from dacnn.networks.plan import Layer
from dacnn.sharing.anchors import Combine
from dacnn.sharing.start import take_up

# L layers, O output channels

# how alike, 0 to 1, layers must be to read one kernel, where no number of kernels is given
_ALIKE = 0.9


@dataclass(frozen=True)
class Bank:
    """How alike the readers of a bank have become.

    Attributes:
        name: The bank's name.
        layers: Its readers.
        similarity: Cosine between the kernels of two readers, without its sign; shape (L, L).
    """

    name: str
    layers: tuple[str, ...]
    similarity: Tensor


@dataclass(frozen=True)
class Fold:
    """What folding did.

    Attributes:
        groups: For every kernel that came out of a bank, the layers that read it.
        errors: For every such layer, the share of its kernel's size that the folded one lacks.
    """

    groups: dict[str, tuple[str, ...]]
    errors: dict[str, float]


def alike(network: Network) -> list[Bank]:
    """Compare the readers of every bank.

    Args:
        network: A network with template banks.

    Returns:
        A report for each bank.

    Raises:
        PlanError: The network has no bank.
        ConfigError: This is no network of a plan.
    """
    banks = _banks(as_planned(network))
    return [Bank(name, tuple(layer.name for layer in layers), _cosines(kernels)) for name, layers, kernels in banks]


def fold(network: Network, *, kernels: int | None = None, similarity: float | None = None) -> tuple[Network, Fold]:
    """Let layers that have become alike read one stored kernel instead of combining templates.

    Args:
        network: A network with template banks; left as it is.
        kernels: How many kernels shall come out of each bank.
        similarity: Or how alike layers must be to read one, 0 to 1; None: 0.9.

    Returns:
        The folded network, and who reads what. A network whose layers are exact multiples gives the same logits.

    Raises:
        PlanError: The network has no bank.
        ConfigError: A number is out of range, or both are given, or this is no network of a plan.
    """
    network = as_planned(network)
    if kernels is not None and similarity is not None:
        raise ConfigError(f"fold got kernels = {kernels} and similarity = {similarity}: give one of them")
    if kernels is not None and kernels < 1:
        raise ConfigError(f"fold got kernels = {kernels}: expected 1 or more")
    threshold = _ALIKE if similarity is None else similarity
    if not 0 <= threshold <= 1:
        raise ConfigError(f"fold got similarity = {similarity}: expected 0 to 1")
    groups: dict[str, tuple[str, ...]] = {}
    scales: dict[str, float] = {}
    errors: dict[str, float] = {}
    stored: dict[str, Tensor] = {}
    for bank, layers, evaluated in _banks(network):
        for index, members in enumerate(_clusters(_cosines(evaluated), kernels, threshold)):
            name = f"{bank}_{index}"
            rows = evaluated[members]
            kernel, factors = _common(rows)
            stored[name] = kernel.view(layers[0].kernel_shape)
            groups[name] = tuple(layers[member].name for member in members)
            for layer, row, factor in zip(groups[name], rows, factors, strict=True):
                scales[layer] = float(factor)
                errors[layer] = float((row - factor * kernel).norm() / row.norm().clamp_min(1e-30))
    folded = _refit(network, groups, stored)
    readers = dict(folded.named_readers())
    for name, scale in scales.items():
        norm = readers[name].norm
        take_up(norm, torch.full_like(norm.weight, scale), None)
    return folded, Fold(groups, errors)


def _banks(network: Network) -> Iterator[tuple[str, list[Layer], Tensor]]:
    """Every bank, its readers, and their kernels as rows."""
    found = False
    for name, layers in network.plan.readers().items():
        if isinstance(layers[0].kernel, Combine):
            found = True
            with torch.no_grad():
                yield name, layers, torch.stack([network.anchors.read(layer.name).flatten().double() for layer in layers])
    if not found:
        raise PlanError(f"'{network.plan.name}' has no template bank to fold: expected a network of --share template")


def _cosines(kernels: Tensor) -> Tensor:
    rows = kernels / kernels.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return torch.clamp((rows @ rows.T).abs(), max=1)


def _clusters(similarity: Tensor, count: int | None, threshold: float) -> list[list[int]]:
    """Groups of rows that are alike on average, in the order of their first rows."""
    layers = len(similarity)
    if layers == 1:
        return [[0]]
    distance = 1 - similarity
    distance.fill_diagonal_(0)
    # half a second, which every command would take that draws a table
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    tree = linkage(squareform(((distance + distance.T) / 2).cpu().numpy(), checks=False), "average")
    labels = fcluster(tree, count, "maxclust") if count is not None else fcluster(tree, 1 - threshold, "distance")
    groups: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(index)
    return list(groups.values())


def _common(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The row and the factors of least squared error; the row is as large as the others on average."""
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    factors, size = u[:, 0] * s[0], s[0] / len(rows) ** 0.5
    sign = -1.0 if float(factors.sum()) < 0 else 1.0
    # a factor of 0 would leave the norm behind it nothing to measure
    factors = sign * factors / size
    return v[0] * size * sign, torch.where(factors < 0, -1.0, 1.0) * factors.abs().clamp_min(1e-3)


def _refit(network: Network, groups: dict[str, tuple[str, ...]], stored: dict[str, Tensor]) -> Network:
    """The network with other kernels and everything else as it was."""
    reads = {layer: name for name, layers in groups.items() for layer in layers}
    plan = network.plan.with_kernels(reads)
    parameter = next(network.parameters())
    folded = Network(plan).to(device=parameter.device, dtype=parameter.dtype)
    state = folded.state_dict()
    before = copy.deepcopy(network.state_dict())
    kept = {name: before[name] for name in state if name in before}
    folded.load_state_dict(state | kept | {f"anchors.{name}": kernel.to(parameter) for name, kernel in stored.items()})
    return folded.train(network.training)

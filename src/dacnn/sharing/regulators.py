"""Regulators: small modules behind a shared convolution that let one place deviate from it.

Each takes and gives N x C x H x W. All but the channel shift start as the identity, so that a network begins as its
plain form.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dacnn.errors import PlanError, UnknownNameError


class Pointwise(nn.Conv2d):
    """A 1x1 convolution without bias that starts as the identity: the paper's regulator, C * C parameters.

    Source:
        Huang et al., CVPR 2019 workshops, arXiv:1904.09764. Deviations: the start is not given there.
    """

    def __init__(self, channels: int) -> None:
        """Make a regulator of C channels."""
        super().__init__(channels, channels, kernel_size=1, bias=False)

    def reset_parameters(self) -> None:
        """Become the identity."""
        nn.init.dirac_(self.weight)


class Depthwise(nn.Conv2d):
    """A 3x3 convolution of each channel by itself, without bias, that starts as the identity: 9 * C parameters."""

    def __init__(self, channels: int) -> None:
        """Make a regulator of C channels."""
        super().__init__(channels, channels, kernel_size=3, padding=1, groups=channels, bias=False)

    def reset_parameters(self) -> None:
        """Become the identity."""
        nn.init.dirac_(self.weight, groups=self.groups)


class LowRank(nn.Module):
    """Adds U(Vx) to x, with V: C -> R and U: R -> C pointwise; U starts at 0: 2 * C * R parameters.

    Source:
        Bae et al., Relaxed Recursive Transformers, arXiv:2410.20672. Deviations: pointwise convolutions for matrices.
    """

    def __init__(self, channels: int, rank: int) -> None:
        """Make a regulator of C channels and rank R."""
        super().__init__()
        self.down = nn.Conv2d(channels, rank, kernel_size=1, bias=False)
        self.up = nn.Conv2d(rank, channels, kernel_size=1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Deviate by a matrix of rank R.

        Args:
            x: Shape (N, C, H, W).

        Returns:
            The same shape.
        """
        y: Tensor = self.up(self.down(x))
        return x + y


class ChannelShift(nn.Module):
    """Rotates the channels by one: channel 0 moves to the end. No parameters.

    Source:
        The model file released with arXiv:1904.09764, where it is called "swap". Deviations: none.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the channels.

        Args:
            x: Shape (N, C, H, W).

        Returns:
            The same shape.
        """
        return torch.roll(x, -1, dims=1)


# what makes each kind from its number of channels; low-rank takes its rank as well
REGULATORS: dict[str, Callable[[int], nn.Module]] = {
    "pointwise": Pointwise,
    "depthwise": Depthwise,
    "shift": lambda channels: ChannelShift(),
}
RANKED_REGULATORS: dict[str, Callable[[int, int], nn.Module]] = {"low-rank": LowRank}


_MADE_FROM = "_dacnn_made_from"


def check_regulator(kind: str, rank: int | None) -> None:
    """Refuse what `make_regulator` cannot make.

    Args:
        kind: One of `REGULATORS` or `RANKED_REGULATORS`.
        rank: Rank, for the kinds that have one.

    Raises:
        UnknownNameError: The kind is not in the registry.
        PlanError: A rank is missing, or given to a kind that has none.
    """
    if kind not in REGULATORS and kind not in RANKED_REGULATORS:
        raise UnknownNameError("regulator", kind, [*REGULATORS, *RANKED_REGULATORS])
    if kind in RANKED_REGULATORS and rank is None:
        raise PlanError(f"regulator '{kind}' has no rank: give one, such as 8")
    if kind in REGULATORS and rank is not None:
        raise PlanError(f"regulator '{kind}' takes no rank, got {rank}: leave it out, or use {', '.join(RANKED_REGULATORS)}")


def make_regulator(kind: str, channels: int, rank: int | None = None) -> nn.Module:
    """Make a regulator by name.

    Args:
        kind: One of `REGULATORS` or `RANKED_REGULATORS`.
        channels: Channels of the place where it stands.
        rank: Rank, for the kinds that have one.

    Returns:
        The regulator.

    Raises:
        UnknownNameError: The kind is not in the registry.
        PlanError: A rank is missing, or given to a kind that has none.
    """
    check_regulator(kind, rank)
    regulator = REGULATORS[kind](channels) if rank is None else RANKED_REGULATORS[kind](channels, rank)
    # files name it by what it was made from, also where the kind is somebody else's
    regulator.__dict__[_MADE_FROM] = (kind, rank)
    return regulator


def regulator_kind(regulator: nn.Module) -> tuple[str, int | None]:
    """Name and rank of a regulator.

    Args:
        regulator: What `make_regulator` made.

    Returns:
        What it was made from.

    Raises:
        PlanError: It was made by something else, and is of no kind of this library.
    """
    made_from: tuple[str, int | None] | None = regulator.__dict__.get(_MADE_FROM)
    if made_from is not None:
        return made_from
    # one that was put in by hand, or pickled by an earlier version
    if isinstance(regulator, LowRank):
        return "low-rank", regulator.down.out_channels
    kinds = {Pointwise: "pointwise", Depthwise: "depthwise", ChannelShift: "shift"}
    if type(regulator) not in kinds:
        raise PlanError(
            f"regulator {type(regulator).__name__} has no name that a file could tell it by: enter its class in "
            "dacnn.sharing.regulators.REGULATORS, and make it by that name"
        )
    return kinds[type(regulator)], None

"""Who owns the kernels.

A network holds all its kernels in one `Anchors` module, each under one name, and hands them to the layers that read
them. So a state dict names each kernel once, and serialisers, optimisers, counters and `torch.export` are right
without special cases.
"""

import math
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from dacnn.errors import PlanError


class Anchors(nn.Module):
    """The kernels of a network, each stored once."""

    def __init__(self, shapes: Mapping[str, tuple[int, int, int, int]]) -> None:
        """Make room for the kernels; `reset_parameters` fills them.

        Args:
            shapes: Name to shape: output channels, input channels, rows, columns.
        """
        super().__init__()
        for name, shape in shapes.items():
            if hasattr(self, name):
                raise PlanError(f"kernel '{name}' has the name of something that every module has: choose another")
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def __getitem__(self, name: str) -> Tensor:
        """The kernel that a reader reads, shape (O, I, H, W)."""
        return self.get_parameter(name)

    def __iter__(self) -> Iterator[str]:
        """Names of the kernels."""
        return iter(self._parameters)

    def __len__(self) -> int:
        """How many kernels are stored."""
        return len(self._parameters)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None, near_identity: Collection[str] = ()) -> None:
        """Draw all kernels anew, normal with variance 2 / (inputs of an output).

        Args:
            generator: Source of the random numbers; None is PyTorch's global one.
            near_identity: Names of square kernels, O = I, that begin as half such a draw plus the identity. Where many
                layers in a row read one kernel and no shortcut leads around them, the image would otherwise be mixed
                beyond recognition before the kernel has learnt anything.

        Source:
            He et al., ICCV 2015, arXiv:1502.01852; the identity as in Zagoruyko & Komodakis, arXiv:1706.00388.
            Deviations: one half instead of a learned balance of draw and identity.
        """
        for name, kernel in self.named_parameters():
            inputs = math.prod(kernel.shape[1:])
            nn.init.normal_(kernel, std=math.sqrt(2 / inputs), generator=generator)
            if name in near_identity:
                kernel.mul_(0.5).add_(nn.init.dirac_(torch.empty_like(kernel)))

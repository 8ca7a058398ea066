"""Running statistics of batch norms when several forward passes make one step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """Lets running statistics advance once a step, by the mean over all its forward passes, wherever they ran.

    A forward pass moves them by a share of its own statistics. Left alone, W processes would end with W different
    networks, and W passes in one process would move them W times.
    """

    def __init__(self, network: nn.Module) -> None:
        """Find the statistics of `network`."""
        self._norms = [
            module for module in network.modules() if isinstance(module, _BatchNorm) and module.running_mean is not None
        ]
        self._before: list[Tensor] = []
        self._sums: list[Tensor] = []

    # looked up anew each time: a wrapper for several processes may put other tensors in the places of the buffers
    @property
    def moments(self) -> list[Tensor]:
        """Running mean and running variance of every norm."""
        return [moment for norm in self._norms for moment in (norm.running_mean, norm.running_var) if moment is not None]

    @property
    def counters(self) -> list[Tensor]:
        """How many passes every norm has seen."""
        return [norm.num_batches_tracked for norm in self._norms if norm.num_batches_tracked is not None]

    @torch.no_grad()
    def begin_step(self) -> None:
        """Remember where the statistics stand."""
        self._before = [moment.clone() for moment in self.moments]
        self._sums = [torch.zeros_like(moment) for moment in self.moments]

    @torch.no_grad()
    def end_pass(self) -> None:
        """Take in what a forward pass made of them, and go back to where they stood."""
        for moment, before, total in zip(self.moments, self._before, self._sums, strict=True):
            total += moment
            moment.copy_(before)
        for counter in self.counters:
            counter -= 1

    @torch.no_grad()
    def end_step(self, passes: int, reduce: Callable[[Tensor], Tensor]) -> None:
        """Set them to the mean over all passes.

        Args:
            passes: Forward passes of this step, over all processes.
            reduce: Adds a tensor up over the processes.
        """
        if not self.moments:
            return
        # one message for all of them
        sums = reduce(torch.cat([total.flatten() for total in self._sums])) / passes
        for moment, mean in zip(self.moments, torch.split(sums, [moment.numel() for moment in self.moments]), strict=True):
            moment.copy_(mean.view_as(moment))
        for counter in self.counters:
            counter += 1

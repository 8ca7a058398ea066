"""Running statistics advance once a step, by the mean over its forward passes."""

import torch
from torch import nn

from dacnn.training.statistics import RunningStatistics


def test_two_passes_move_the_statistics_by_the_mean_of_both() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.1)
    generator = torch.Generator().manual_seed(0)
    passes = [torch.randn(4, 3, 5, 5, generator=generator) for _ in range(2)]
    # by the definition: each pass alone from the same start, then the mean
    expected = 0.9 * norm.running_mean + 0.1 * torch.stack([x.mean((0, 2, 3)) for x in passes]).mean(0)
    statistics = RunningStatistics(norm)
    statistics.begin_step()
    for x in passes:
        norm(x)
        statistics.end_pass()
    statistics.end_step(2, lambda sums: sums)
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.num_batches_tracked == 1


def test_a_network_without_norms_is_left_alone() -> None:
    statistics = RunningStatistics(nn.Conv2d(3, 3, 1))
    statistics.begin_step()
    statistics.end_pass()
    statistics.end_step(1, lambda sums: sums)
    assert statistics.moments == []

"""Numbers in eight bits: what rounding costs, what it keeps, and what learns through it."""

import pytest
import torch

from dacnn.quantization import (
    Quantity,
    best_range,
    has_own,
    kernel_scales,
    own_weights,
    quantity,
    rounded,
    rounded_kernel,
    to_integers,
    without_own,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0), (-1e-40, 1e-40)])
def test_zero_is_always_one_of_the_numbers(low: float, high: float) -> None:
    of = quantity(low, high)
    assert 0 <= of.zero <= 255 and of.scale > 0
    assert rounded(torch.zeros(1), of).item() == 0


def test_a_value_within_the_range_moves_by_half_a_step_at_most() -> None:
    of = quantity(-1.0, 2.0)
    x = torch.linspace(-1, 2, 1001)
    assert float((rounded(x, of) - x).abs().max()) <= 0.5001 * of.scale


def test_the_best_range_clips_long_tails() -> None:
    samples = -torch.rand(200_000, generator=torch.Generator().manual_seed(0)).log()
    low, high = best_range(samples)
    assert low == 0 and 8 < high < 0.95 * float(samples.max())


@pytest.mark.parametrize("samples", [torch.zeros(10), torch.full((10,), 2.0), torch.full((10,), -2.0), drawn(1000)])
def test_the_best_range_is_no_worse_than_the_whole_one(samples: torch.Tensor) -> None:
    whole = quantity(float(samples.min()), float(samples.max()))
    errors = [float((rounded(samples, of) - samples).square().sum()) for of in (quantity(*best_range(samples)), whole)]
    assert errors[0] <= errors[1] + 1e-9


def test_the_gradient_passes_within_the_range_alone() -> None:
    x = torch.tensor([-2.0, -0.5, 0.4, 5.0], requires_grad=True)
    rounded(x, Quantity(1 / 128, 128)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 0]


def test_each_channel_of_a_kernel_has_a_scale_of_its_own() -> None:
    kernel = drawn(4, 3, 3, 3) * torch.tensor([1.0, 10.0, 0.0, 1e-3]).view(-1, 1, 1, 1)
    scales = kernel_scales(kernel)
    integers = to_integers(kernel, scales)
    assert integers.abs().amax((1, 2, 3)).tolist() == [127, 127, 0, 127]
    assert torch.equal(rounded_kernel(kernel), integers * scales.view(-1, 1, 1, 1))
    assert kernel_scales(kernel, per_channel=False).unique().numel() == 1


def test_the_gradient_of_a_kernel_is_that_of_the_rounded_one() -> None:
    kernel, weights = drawn(4, 4, 3, 3).requires_grad_(), drawn(4, 4, 3, 3, seed=1)
    (rounded_kernel(kernel, own=True) * weights).sum().backward()
    assert kernel.grad is not None and torch.equal(kernel.grad, weights)


def test_a_kernel_near_the_identity_is_rounded_as_finely_as_without_it() -> None:
    rest = without_own(0.05 * drawn(8, 8, 3, 3))
    kernel = rest.clone()
    own_weights(kernel).fill_(1.0)
    error = (rounded_kernel(kernel, own=True) - kernel).abs().max()
    assert float(error) <= 0.5001 * float(kernel_scales(rest).max()) < 0.3 * float(kernel_scales(kernel).max())


@pytest.mark.parametrize(
    ("shape", "groups", "expected"),
    [
        ((8, 8, 3, 3), 1, True),
        ((8, 8, 1, 1), 1, True),
        ((8, 4, 3, 3), 1, False),
        ((8, 8, 2, 2), 1, False),
        ((8, 1, 3, 3), 8, False),
        ((8, 8), 1, False),
        ((1, 1, 3, 3), 1, False),
        ((8, 8, 3, 3), 2, False),
    ],
)
def test_weights_stand_apart_where_a_channel_has_one_for_itself(shape: tuple[int, ...], groups: int, expected: bool) -> None:
    assert has_own(shape, groups) is expected

"""Where shared kernels begin: against the singular value decomposition, and against the outputs of what was replaced."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dacnn
from dacnn.errors import PlanError
from dacnn.sharing.start import start_bank, start_value, take_up
from foreign import WIDTH, chain, stirred

# float32 rounds by 6e-8, and a few layers of norms multiply that
FLOAT32 = {"rtol": 1e-4, "atol": 1e-5}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scaled_copies(module: nn.Module, kind: type[nn.Module] = nn.Conv2d, seed: int = 3) -> list[Tensor]:
    """Make every layer's kernel gains times the first one's: of random size and sign, per output channel."""
    generator = torch.Generator().manual_seed(seed)
    layers = [part for part in module.modules() if isinstance(part, kind)]
    gains = []
    for layer in layers:
        size = torch.rand(layer.weight.shape[0], generator=generator) * 3 + 0.2
        gains.append(size * torch.where(torch.rand(size.shape, generator=generator) < 0.5, -1.0, 1.0))
        with torch.no_grad():
            layer.weight.copy_(layers[0].weight * gains[-1].view(-1, *[1] * (layer.weight.ndim - 1)))
    return gains


# ---------------------------------------------------------------- the least-squares fit


@pytest.mark.parametrize("layers", [2, 3, 7, 20])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (6, 1, 3, 3), (4, 9), (3, 2, 1, 1)])
def test_the_fit_is_the_best_approximation_of_rank_one_of_every_channel(layers: int, shape: tuple[int, ...]) -> None:
    kernels = drawn(layers, *shape)
    value = start_value(list(kernels), "fit", [True] * layers)
    gains = value.gains
    assert gains.abs().min() >= 0.01
    for channel in range(shape[0]):
        rows = kernels[:, channel].flatten(1).numpy()
        u, s, vt = np.linalg.svd(rows, full_matrices=False)
        best = s[0] * np.outer(u[:, 0], vt[0])
        fitted = np.outer(gains[:, channel], value.kernel[channel].flatten())
        # gains below a hundredth are raised to it, so that no layer's channel ends
        kept = np.abs(best).max(1) > 0.02 * np.abs(value.kernel[channel].numpy()).max()
        np.testing.assert_allclose(fitted[kept], best[kept], atol=1e-9)
        assert kept.mean() > 0.5


def test_the_fitted_kernel_is_as_large_as_the_layers_are_on_average_and_points_their_way() -> None:
    kernels = drawn(4, 6, 5, 3, 3)
    value = start_value(list(kernels), "fit", [True] * 4)
    torch.testing.assert_close(value.gains.square().mean(0), torch.ones(6, dtype=torch.float64), rtol=1e-3, atol=0)
    assert (value.gains.sum(0) > 0).all()


@pytest.mark.parametrize("rescaled", [[True, False, True, True], [False, False, True, False], [True, True, True, False]])
def test_where_some_layers_may_have_no_gain_the_fit_cannot_be_bettered(rescaled: list[bool]) -> None:
    kernels = drawn(1, 6, 5, 3, 3) * drawn(4, 6, 1, 1, 1, seed=1) + 0.3 * drawn(4, 6, 5, 3, 3, seed=2)
    kernels[[not free for free in rescaled]] = drawn(1, 6, 5, 3, 3) + 0.3 * drawn(rescaled.count(False), 6, 5, 3, 3, seed=4)
    value = start_value(list(kernels), "fit", rescaled)
    fixed = torch.tensor([not free for free in rescaled])
    assert (value.gains[fixed] == 1).all()

    def error(kernel: Tensor, gains: Tensor) -> Tensor:
        return (kernels - gains[..., None, None, None] * kernel).square().sum()

    kernel, gains = value.kernel.requires_grad_(), value.gains.requires_grad_()
    mean = start_value(list(kernels), "mean", rescaled)
    assert error(kernel, gains) < error(mean.kernel, mean.gains)
    by_kernel, by_gains = torch.autograd.grad(error(kernel, gains), (kernel, gains))
    kernel, gains = kernel.detach(), gains.detach()
    # the slope is zero there, and wherever else one begins to descend, the error ends no lower
    assert float(by_kernel.abs().max()) < 1e-9 and float(by_gains[~fixed].abs().max()) < 1e-9
    for seed in range(5):
        other, other_gains = drawn(6, 5, 3, 3, seed=seed + 10), torch.ones(4, 6, dtype=torch.float64)
        for _ in range(300):
            fitted = (kernels * other).flatten(2).sum(2) / other.flatten(1).square().sum(1)
            other_gains[~fixed] = fitted[~fixed]
            other = (other_gains[..., None, None, None] * kernels).sum(0) / other_gains.square().sum(0)[:, None, None, None]
        assert error(kernel, gains) <= error(other, other_gains) * (1 + 1e-9)


def test_channels_without_weights_stay_finite() -> None:
    kernels = drawn(3, 4, 2, 3, 3)
    kernels[:, 0] = 0
    kernels[1, 1] = 0
    kernels[0, 2] = 0
    kernels[0, 3] = -kernels[1:, 3].mean(0)
    for rescaled in ([True] * 3, [False, True, True], [False] * 3):
        value = start_value(list(kernels), "fit", rescaled)
        assert value.kernel.isfinite().all() and value.gains.isfinite().all() and (value.gains != 0).all()
        assert (value.kernel[0] == 0).all() and (value.kernel[1:].flatten(1).abs().sum(1) > 0).all()


def test_first_and_mean_are_what_they_say() -> None:
    kernels = list(drawn(3, 4, 2, 3, 3).to(memory_format=torch.contiguous_format))
    assert torch.equal(start_value(kernels, "first", [True] * 3).kernel, kernels[0])
    torch.testing.assert_close(start_value(kernels, "mean", [True] * 3).kernel, sum(kernels) / 3)
    # without any norm there is nothing that could take up a gain
    torch.testing.assert_close(start_value(kernels, "fit", [False] * 3).kernel, sum(kernels) / 3)


@pytest.mark.parametrize("start", ["first", "mean", "fit"])
def test_a_start_value_is_contiguous_whatever_the_layers_were_and_nobody_elses(start: Any) -> None:
    kernels = [kernel.to(memory_format=torch.channels_last) for kernel in drawn(3, 4, 2, 3, 3)]
    kernel = start_value(kernels, start, [True] * 3).kernel
    assert kernel.is_contiguous() and kernel.untyped_storage().nbytes() == kernel.numel() * 8
    assert all(kernel.data_ptr() != other.data_ptr() for other in kernels)


# ---------------------------------------------------------------- a bank


@pytest.mark.parametrize("templates", [1, 2, 3])
def test_a_bank_is_the_best_approximation_of_its_rank(templates: int) -> None:
    kernels = drawn(5, 4, 2, 3, 3)
    value = start_bank(list(kernels), templates)
    assert value.kernel.shape == (templates, 4, 2, 3, 3) and value.coefficients is not None
    u, s, vt = np.linalg.svd(kernels.flatten(1).numpy(), full_matrices=False)
    best = (u[:, :templates] * s[:templates]) @ vt[:templates]
    np.testing.assert_allclose(value.coefficients @ value.kernel.flatten(1), best, atol=1e-9)
    assert float(value.coefficients.square().mean()) == pytest.approx(1)


def test_as_many_templates_as_layers_give_the_original_outputs() -> None:
    module, x = stirred(chain(depth=4)).eval(), drawn(2, WIDTH, 9, 9).float()
    shared, _ = dacnn.anchor(module, templates=4)
    torch.testing.assert_close(shared(x), module(x), **FLOAT32)
    with pytest.raises(PlanError, match="conv8x8x3x3 has 4 layers for 5 templates: expected at most as many"):
        dacnn.anchor(module, templates=5)


# ---------------------------------------------------------------- gains in the norms behind


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variance", [1.0, 1e-7])
def test_layers_that_are_gains_times_one_kernel_give_the_same_outputs(bias: bool, variance: float) -> None:
    module = stirred(chain(bias=bias)).double().eval()
    scaled_copies(module)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        # far below eps: a gain above 1 asks for a variance below 0
        norm.running_var.mul_(variance)
        norm.running_mean.mul_(variance**0.5)
    x = drawn(2, WIDTH, 9, 9) * variance**0.5
    shared, _ = dacnn.anchor(module, start="fit", example=x)
    torch.testing.assert_close(shared(x), module(x), rtol=1e-9, atol=1e-9)
    # which the norms did: with the mean of the kernels the outputs are others
    mean, _ = dacnn.anchor(module, start="mean")
    assert not torch.allclose(mean(x), module(x), rtol=0.1)


@pytest.mark.parametrize(
    ("convolution", "norm", "x"),
    [
        (nn.Conv1d, nn.BatchNorm1d, drawn(2, WIDTH, 9)),
        (nn.Conv3d, nn.BatchNorm3d, drawn(2, WIDTH, 5, 5, 5)),
        (nn.Conv2d, nn.SyncBatchNorm, drawn(2, WIDTH, 9, 9)),
    ],
)
def test_so_do_layers_of_other_dimensions(convolution: type[nn.Module], norm: type[nn.Module], x: Tensor) -> None:
    module = stirred(chain(convolution, norm)).eval()
    scaled_copies(module, convolution)
    shared, _ = dacnn.anchor(module, start="fit", example=x.float())
    torch.testing.assert_close(shared(x.float()), module(x.float()), **FLOAT32)


def test_so_do_linear_layers_and_depthwise_convolutions() -> None:
    linear = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.GELU()) for _ in range(3)])
    depthwise = chain(groups=WIDTH, dilation=2, padding=2, padding_mode="circular")
    for module, kind, x in (
        (linear, nn.Linear, drawn(4, WIDTH).float()),
        (depthwise, nn.Conv2d, drawn(2, WIDTH, 9, 9).float()),
    ):
        scaled_copies(stirred(module).eval(), kind)
        shared, _ = dacnn.anchor(module, start="fit", example=x)
        torch.testing.assert_close(shared(x), module(x), **FLOAT32)


def test_a_layer_without_a_norm_keeps_gain_one_and_the_others_meet_it() -> None:
    module = stirred(chain(depth=4)).eval()
    scaled_copies(module)
    module[0][1] = nn.Identity()
    x = drawn(2, WIDTH, 9, 9).float()
    shared, _ = dacnn.anchor(module, start="fit", example=x)
    torch.testing.assert_close(shared(x), module(x), **FLOAT32)


def test_training_goes_on_from_the_same_outputs_but_for_eps() -> None:
    module = stirred(chain())
    scaled_copies(module)
    x = drawn(4, WIDTH, 9, 9).float()
    shared, _ = dacnn.anchor(module, start="fit", example=x)
    # statistics of the batch: a norm divides by sqrt(variance + eps), and the variance is another
    torch.testing.assert_close(copy.deepcopy(shared).train()(x), copy.deepcopy(module).train()(x), rtol=1e-2, atol=1e-3)
    for norm in (part for part in module.modules() if isinstance(part, nn.BatchNorm2d)):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    shared, _ = dacnn.anchor(module.eval(), start="fit", example=x)
    torch.testing.assert_close(shared(x), module(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("regulator", [None, "pointwise", "low-rank"])
def test_fit_and_regulators_go_together(regulator: str | None) -> None:
    module = stirred(chain()).eval()
    scaled_copies(module)
    x = drawn(2, WIDTH, 9, 9).float()
    rank = 2 if regulator == "low-rank" else None
    shared, _ = dacnn.anchor(module, regulator=regulator, regulator_rank=rank, start="fit", example=x)
    torch.testing.assert_close(shared(x), module(x), **FLOAT32)


def test_a_shift_moves_channels_away_from_their_norms_which_then_take_up_nothing() -> None:
    module, x = stirred(chain()).eval(), drawn(2, WIDTH, 9, 9).float()
    shared, _ = dacnn.anchor(module, regulator="shift", start="fit", example=x)
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, shared.get_buffer(name)), name


def test_taking_up_the_gain_of_a_half_precision_norm_rounds_once() -> None:
    norm = stirred(nn.BatchNorm2d(WIDTH)).to(torch.bfloat16).eval()
    gain, x = torch.full((WIDTH,), -3.0, dtype=torch.float64), drawn(2, WIDTH, 5, 5).to(torch.bfloat16)
    expected = norm(x)
    take_up(norm, gain, None)
    # bfloat16 has 8 bits: 0.4 % a rounding
    torch.testing.assert_close(norm(x / -3), expected, rtol=0.03, atol=0.03)


def test_weights_that_are_no_numbers_are_refused_by_their_layer() -> None:
    module, x = chain(), drawn(2, WIDTH, 9, 9).float()
    with torch.no_grad():
        module[1][0].weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(PlanError, match=r"layer '1\.0' has weights that are infinite or no numbers: start with 'first'"):
        dacnn.anchor(module, start="fit", example=x)
    with pytest.raises(PlanError, match=r"layer '1\.0' has weights"):
        dacnn.anchor(module, templates=2)
    dacnn.anchor(module, start="first")

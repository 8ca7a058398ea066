"""Winograd's convolution is the convolution, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dacnn
from dacnn.sharing import winograd
from dacnn.sharing.remake import remaking
from dacnn.sharing.winograd import by_winograd, convolve, convolve_by_winograd, pays


def with_gradients(x: Tensor, kernel: Tensor, of_y: Tensor, *, plain: bool) -> list[Tensor]:
    """Output, gradient of the images, gradient of the kernel."""
    x, kernel = x.clone().requires_grad_(), kernel.clone().requires_grad_()
    y = F.conv2d(x, kernel, padding=1) if plain else convolve_by_winograd(x, kernel)
    return [y.detach(), *torch.autograd.grad(y, (x, kernel), of_y)]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("images", "channels", "outputs", "height", "width"),
    [(3, 5, 7, 8, 8), (2, 3, 4, 1, 1), (1, 2, 3, 4, 6), (2, 4, 4, 7, 13), (5, 64, 32, 6, 4)],
)
def test_values_and_gradients_are_those_of_the_plain_convolution(
    images: int,
    channels: int,
    outputs: int,
    height: int,
    width: int,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # some parts, the last of them smaller
    monkeypatch.setattr(winograd, "_AT_ONCE", 2 * 2 * 64)
    x = torch.randn(images, channels, height, width, dtype=torch.float64).to(memory_format=layout)
    kernel = torch.randn(outputs, channels, 3, 3, dtype=torch.float64)
    of_y = torch.randn(images, outputs, height, width, dtype=torch.float64)
    for ours, expected in zip(*(with_gradients(x, kernel, of_y, plain=plain) for plain in (False, True)), strict=True):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_float32_errs_by_a_hundred_thousandth_of_the_largest() -> None:
    x, kernel, of_y = torch.randn(4, 128, 16, 16), torch.randn(128, 128, 3, 3), torch.randn(4, 128, 16, 16)
    doubled = with_gradients(x.double(), kernel.double(), of_y.double(), plain=True)
    for ours, expected in zip(with_gradients(x, kernel, of_y, plain=False), doubled, strict=True):
        assert (ours - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("wanted", ["x", "kernel"])
def test_only_the_gradients_that_are_asked_for(wanted: str) -> None:
    given = {"x": torch.randn(1, 2, 4, 4), "kernel": torch.randn(3, 2, 3, 3)}
    given[wanted].requires_grad_()
    convolve_by_winograd(**given).sum().backward()
    (expected,) = torch.autograd.grad(F.conv2d(given["x"], given["kernel"], padding=1).sum(), given[wanted])
    torch.testing.assert_close(given[wanted].grad, expected, rtol=1e-4, atol=1e-5)
    assert sum(tensor.grad is not None for tensor in given.values()) == 1


@pytest.mark.parametrize(
    ("channels", "outputs", "pixels", "kernel", "expected"),
    [
        (128, 128, 32, 3, True),
        (128, 128, 4, 3, True),
        (64, 128, 16, 3, True),
        (128, 128, 2, 3, False),
        (256, 256, 5, 3, False),
        (32, 32, 32, 3, False),
        (3, 128, 32, 3, False),
        (128, 128, 32, 1, False),
    ],
)
def test_it_pays_with_many_channels_on_many_pixels(
    channels: int, outputs: int, pixels: int, kernel: int, expected: bool
) -> None:
    shapes = torch.empty(1, channels, pixels, pixels), torch.empty(outputs, channels, kernel, kernel)
    assert pays(*shapes) is expected


def test_it_is_plain_unless_it_is_wanted() -> None:
    x, kernel = torch.randn(1, 128, 16, 16, requires_grad=True), torch.randn(128, 128, 3, 3)
    name = "_WinogradBackward"
    assert convolve(x, kernel).grad_fn.name() != name
    with by_winograd():
        assert convolve(x, kernel).grad_fn.name() == name
        assert convolve(x[:, :, :2, :2], kernel).grad_fn.name() != name
        with torch.autocast("cpu", torch.bfloat16):
            assert convolve(x, kernel).dtype == torch.bfloat16
        with by_winograd(False):
            assert convolve(x, kernel).grad_fn.name() != name
    assert convolve(x, kernel).grad_fn.name() != name


@pytest.mark.parametrize("segments", [(), (2, 2)])
def test_what_is_made_again_changes_no_bit(segments: tuple[int, ...]) -> None:
    """Norms and segments run again for the gradient go the way of the first run, outside of its contexts."""
    x = torch.randn(4, 3, 32, 32)
    gradients = []
    for wanted in (False, True):
        network = dacnn.create("dacnn18", width=64, depths=(2, 2), num_classes=3, seed=0)
        network.segments = segments if wanted else ()
        with remaking(wanted), by_winograd():
            logits = network(x)
        logits.square().sum().backward()
        gradients.append([logits, *(parameter.grad for parameter in network.parameters())])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    with by_winograd(False):
        plain = network.eval()(x)
    with by_winograd():
        assert not torch.equal(network(x), plain)
        torch.testing.assert_close(network(x), plain, rtol=1e-4, atol=1e-4)

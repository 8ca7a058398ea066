"""Outputs that are made again give the bits that kept ones give, in less memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dacnn
from dacnn.sharing.remake import halve_by_max, norm_relu, remaking
from live_bytes import LiveBytes


def gradients_of(network: nn.Module, images: torch.Tensor, *, remade: bool, dtype: torch.dtype) -> tuple[dict, dict, float]:
    """Gradients, buffers and loss of one step, and what the graph keeps."""
    network = copy.deepcopy(network).train()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16), remaking(remade):
        logits = network(images)
    loss = F.cross_entropy(logits.float(), torch.arange(len(images)) % logits.shape[1])
    loss.backward()
    return (
        {name: parameter.grad for name, parameter in network.named_parameters()},
        dict(network.named_buffers()),
        float(loss.detach()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dacnn14", "dacnn14-reg", "dacnn18", "dacnn18-mix-reg"])
def test_a_step_has_the_same_bits_with_outputs_made_again(name: str, dtype: torch.dtype) -> None:
    network = dacnn.create(name, width=8, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            # residual blocks start as the identity, which would hide everything in them
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    images = torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    kept = gradients_of(network, images, remade=False, dtype=dtype)
    remade = gradients_of(network, images, remade=True, dtype=dtype)
    assert kept[2] == remade[2]
    for expected, found in zip(kept[:2], remade[:2], strict=True):
        assert expected.keys() == found.keys()
        for key in expected:
            assert torch.equal(expected[key], found[key]), key


def test_without_gradients_or_in_evaluation_it_is_norm_and_relu() -> None:
    norm = nn.BatchNorm2d(3)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    reference = F.relu(copy.deepcopy(norm)(x))
    with remaking(), torch.no_grad():
        assert torch.equal(norm_relu(norm, x), reference)
    norm.eval()
    with remaking():
        assert torch.equal(norm_relu(norm, x), F.relu(norm(x)))


def test_the_next_layer_keeps_the_recipe_and_not_the_output() -> None:
    norm, convolution = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with LiveBytes(x, *norm.parameters(), *convolution.parameters()) as live:
        with remaking():
            y = convolution(norm_relu(norm, x))
        statistics = 2 * 3 * 4
        # the batch's counter and running statistics were there before
        assert live.now <= y.nbytes + statistics + sum(buffer.nbytes for buffer in norm.buffers())
        y.sum().backward()
    assert norm.num_batches_tracked == 1


def test_an_output_that_is_changed_in_place_is_kept_as_it_then_is() -> None:
    norm, convolution = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    gradients = []
    for remade in (False, True):
        with remaking(remade):
            y = norm_relu(norm, x)
            z = convolution(y.mul_(2) if remade else y * 2)
        convolution.zero_grad()
        z.square().sum().backward()
        gradients.append(convolution.weight.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (7, 5, 8, 6), (17, 4, 9, 7)])
def test_output_and_gradient_are_those_of_max_pooling(dtype: torch.dtype, layout: torch.memory_format, shape: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    # few values, half of them 0 as behind a ReLU: ties everywhere
    x = torch.randint(-2, 3, shape, generator=generator).clamp(min=0).to(dtype).contiguous(memory_format=layout)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with remaking():
        y = halve_by_max(ours)
    expected = F.max_pool2d(theirs, 2)
    assert torch.equal(y, expected)
    gradient = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)

"""Pooling without kept indices gives the bits of PyTorch's, forwards and backwards."""

import pytest
import torch
import torch.nn.functional as F

from dacnn.networks.pool import halve_by_max


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(1, 3, 2, 2), (7, 5, 8, 6), (17, 4, 9, 7)])
def test_output_and_gradient_are_those_of_max_pooling(dtype: torch.dtype, layout: torch.memory_format, shape: tuple) -> None:
    generator = torch.Generator().manual_seed(0)
    # few values, half of them 0 as behind a ReLU: ties everywhere
    x = torch.randint(-2, 3, shape, generator=generator).clamp(min=0).to(dtype).contiguous(memory_format=layout)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = halve_by_max(ours), F.max_pool2d(theirs, 2)
    assert torch.equal(y, expected)
    gradient = torch.randn(y.shape, generator=generator).to(dtype)
    y.backward(gradient)
    expected.backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def test_nothing_but_the_input_is_kept() -> None:
    kept = []
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        halve_by_max(x)
    assert [tensor.data_ptr() for tensor in kept] == [x.data_ptr()]

"""Live tensors, against sums written out by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dacnn.measure.live import LiveTensors


@pytest.mark.parametrize("fake", [False, True])
def test_a_storage_counts_from_its_first_tensor_to_its_last(fake: bool) -> None:
    mode = FakeTensorMode() if fake else torch.no_grad()
    with mode, LiveTensors() as live:
        a = torch.zeros(100)  # 400
        b = a + 1  # 800
        view = b[::2]
        b.mul_(2)
        del b
        c = view * 2  # 1,000: the view keeps its storage alive
        assert live.peak() == {"activations": 1000}
        del view
        d = torch.cat([c, c])  # 400 + 200 + 400
        assert live.peak() == {"activations": 1000}
        e = d.to(torch.float64)  # 1,800
        assert live.peak() == {"activations": 1800}
        del a, c, d, e
        torch.zeros(400)
    assert live.peak() == {"activations": 1800}


def test_an_operator_within_another_is_no_moment_of_its_own() -> None:
    x = torch.zeros(1, 2, 8, 8)
    with torch.no_grad(), LiveTensors() as live:
        live.label("images", [x])
        pooled = torch.nn.functional.max_pool2d(x, 2)
    assert pooled.nbytes == 2 * 16 * 4
    assert live.peak() == {"images": 2 * 64 * 4, "activations": 2 * 16 * (4 + 8)}


def test_a_label_holds_for_the_whole_life_of_a_tensor() -> None:
    with LiveTensors() as live:
        x = torch.zeros(10)
        y = x + 1
        del x
        # after the peak
        live.label("kept", [y])
    assert live.peak() == {"activations": 40, "kept": 40}


def test_the_allocator_rounds_up() -> None:
    with LiveTensors(granule_bytes=512) as live:
        x = torch.zeros(1)
        y = torch.zeros(129)
    assert live.peak() == {"activations": 512 + 1024}
    del x, y


def test_what_an_operator_takes_for_itself_is_gone_when_it_returns() -> None:
    def workspace(operator: object, arguments: tuple[object, ...], result: torch.Tensor) -> int:
        return 1000 if operator is torch.ops.aten.mul.Tensor else 0

    with LiveTensors(workspace) as live:
        x = torch.zeros(10)
        y = x * 2
        z = y + 1
    assert live.peak() == {"activations": 80, "workspace": 1000}
    del z

"""What is stored, used, computed and held, against formulas written out by hand."""

import pytest
import torch
from torch import Tensor, nn

import dacnn
from dacnn.config import NetworkConfig
from dacnn.networks.network import Network
from dacnn.networks.plan import Block, Input, Layer, Plan, Stage
from dacnn.networks.zoo import DESIGNS, plan_of

CLASSES = tuple("abc")


def macs_by_hand(plan: Plan) -> int:
    """Every kernel meets every pixel once, every regulator of C channels is a C x C or C x 9 matrix at each."""

    def layer(layer: Layer, pixels: int) -> int:
        macs = layer.out_channels * layer.in_channels * layer.kernel_size**2 * pixels
        if layer.regulator:
            macs += {"pointwise": layer.out_channels**2, "depthwise": 9 * layer.out_channels}[layer.regulator.kind] * pixels
        return macs

    rows, columns = plan.input.height, plan.input.width
    total = layer(plan.stem, rows * columns)
    for stage in plan.stages:
        for block in stage.blocks:
            total += sum(layer(each, rows * columns) for each in block.layers)
            total += layer(block.shortcut, rows * columns) if block.shortcut else 0
        if stage.pool:
            rows, columns = rows // 2, columns // 2
    return total + plan.features * len(plan.classes)


@pytest.mark.parametrize("name", sorted(DESIGNS))
def test_multiply_adds_are_those_of_the_formula(name: str) -> None:
    plan = plan_of(NetworkConfig(name, width=8), Input(48, 32), CLASSES)
    assert dacnn.count(plan).macs == macs_by_hand(plan)


def test_depthwise_regulators_and_one_channel_are_counted() -> None:
    plan = plan_of(NetworkConfig("dacnn18", width=8, regulator="depthwise"), Input(32, 32, 1, (0.5,), (0.25,)), CLASSES)
    assert dacnn.count(plan).macs == macs_by_hand(plan)


@pytest.mark.parametrize("name", ["dacnn14", "dacnn18-mix-reg"])
def test_bytes_are_those_of_a_stored_network(name: str) -> None:
    network = dacnn.create(name, width=8)
    counts = dacnn.count(network)
    halved = dacnn.create(name, width=8).bfloat16()
    sizes = [tensor.nbytes for tensor in network.state_dict().values()]
    assert counts.stored_bytes == sum(sizes)
    assert counts.bfloat16_bytes == sum(tensor.nbytes for tensor in halved.state_dict().values())
    # a counter of each norm stays an eight-byte integer
    counters = 8 * sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert counts.int8_bytes - counters == (counts.stored_bytes - counters) / 4


def tiny() -> Plan:
    """Two convolutions of two channels on grey images of 4 x 4, one kernel for both but the stem's."""
    layer = Layer("conv", "anchor", 2, 2)
    return Plan("tiny", Input(4, 4, 1, (0.5,), (0.25,)), CLASSES, Layer("stem", "stem", 1, 2), (Stage((Block((layer,)),)),))


def test_the_activation_peak_is_the_largest_of_the_live_sets_written_out() -> None:
    image, wide, pooled, indices, features, logits = 16 * 4, 2 * 16 * 4, 2 * 4 * 4, 2 * 4 * 8, 2 * 4, 3 * 4
    moments = [
        image + wide,  # the stem's convolution
        image + wide + wide,  # its norm, beside what it reads; the ReLU writes in place
        image + wide + wide,  # the convolution, beside what the ReLU gave
        image + wide + wide + wide,  # its norm: the block still holds its input
        image + wide + wide + wide + pooled + indices,  # the pooling
        image + pooled + features,
        image + features + logits,
    ]
    assert dacnn.count(tiny()).activation_peak_bytes == max(moments)


def test_sharing_saves_no_activations() -> None:
    plan = plan_of(NetworkConfig("dacnn14", width=8), Input(), CLASSES)
    assert dacnn.count(plan).activation_peak_bytes == dacnn.count(plan.unshared()).activation_peak_bytes


def test_counting_leaves_the_network_as_it_is() -> None:
    network = Network(tiny(), torch.Generator().manual_seed(0)).eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    dacnn.count(network)
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


class Attending(nn.Module):
    """Attention of pixels to pixels, each of four channels."""

    def forward(self, x: Tensor) -> Tensor:
        pixels = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).flatten(2).transpose(1, 2)[:, None]
        return nn.functional.scaled_dot_product_attention(pixels, pixels, pixels).mean((1, 2))


def test_the_products_of_attention_are_counted() -> None:
    network = dacnn.adapt(nn.Sequential(Attending(), nn.Linear(4, 5)), dacnn.Input(6, 6), list("abcde"))
    # 36 pixels meet 36, and the weights what they weigh, in four channels
    assert dacnn.count(network).macs == 2 * 36 * 36 * 4 + 4 * 5


@pytest.mark.parametrize("kind", ["attention", "encoder"])
def test_attention_of_pytorchs_own_modules_is_counted(kind: str) -> None:
    class Encoded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = (
                nn.MultiheadAttention(4, 2, batch_first=True)
                if kind == "attention"
                else nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            )

        def forward(self, x: Tensor) -> Tensor:
            pixels = nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).flatten(2).transpose(1, 2)
            y = self.inner(pixels, pixels, pixels)[0] if kind == "attention" else self.inner(pixels)
            return y.mean(1)

    network = dacnn.adapt(nn.Sequential(Encoded(), nn.Linear(4, 5)), dacnn.Input(6, 6), list("abcde"))
    # query, key, value and what comes out; pixels that meet pixels, and weights what they weigh; two layers behind them
    macs = 4 * 36 * 4 * 4 + 2 * 36 * 36 * 4 + (kind == "encoder") * 2 * 36 * 4 * 8 + 4 * 5
    assert dacnn.count(network).macs == macs


def test_counting_in_inference_mode_counts_the_same() -> None:
    network = dacnn.create("dacnn3", width=8)
    with torch.inference_mode():
        assert dacnn.count(network) == dacnn.count(network.plan)
    assert dacnn.count(network).macs > 0

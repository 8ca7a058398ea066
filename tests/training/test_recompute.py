"""The planner finds the smallest peak, its bytes are those of tensors that live, and a training takes what it chose."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given
from safetensors.torch import load_file
from torch import nn

import dacnn
from dacnn.config import TrainingConfig
from dacnn.data.imageset import MemoryImages
from dacnn.data.sources import Splits
from dacnn.errors import ConfigError
from dacnn.networks.network import Network
from dacnn.networks.plan import Input
from dacnn.sharing.remake import remaking
from dacnn.training.listener import Listener
from dacnn.training.loop import Loop
from dacnn.training.precision import choose
from dacnn.training.recompute import BlockBytes, block_bytes, choose_segments, partition
from live_bytes import LiveBytes
from reference import one_thread  # noqa: F401  (a fixture)


def compositions(count: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut so many blocks into segments."""
    if count == 0:
        yield ()
    for first in range(1, count + 1):
        for rest in compositions(count - first):
            yield (first, *rest)


def replayed_peak(blocks: list[BlockBytes], lengths: tuple[int, ...]) -> int:
    """Walk through the backward pass of a step, adding up what is there."""
    begins = [sum(lengths[:index]) for index in range(len(lengths))]
    behind = blocks[sum(lengths) :]
    segments = [blocks[begin : begin + length] for begin, length in zip(begins, lengths, strict=True)]
    there = sum(segment[0].input for segment in segments) + sum(block.kept for block in behind)
    # the blocks behind the last segment keep what goes into them as well
    there += behind[0].input if behind else 0
    peak = 0
    for block in reversed(behind):
        peak = max(peak, there + block.work)
        there -= block.kept
    there -= behind[0].input if behind else 0
    for segment in reversed(segments):
        there += sum(block.kept for block in segment)
        for block in reversed(segment):
            peak = max(peak, there + block.work)
            there -= block.kept
        there -= segment[0].input
    assert there == 0
    return peak


BYTES = st.integers(0, 20)


@given(st.lists(st.builds(BlockBytes, input=BYTES, kept=BYTES, work=BYTES), max_size=7))
def test_no_partition_has_a_smaller_peak_and_none_of_that_peak_runs_less_again(blocks: list[BlockBytes]) -> None:
    lengths, peak = partition(blocks)
    ways = [way for again in range(len(blocks) + 1) for way in compositions(again)]
    peaks = {way: replayed_peak(blocks, way) for way in ways}
    assert peaks[lengths] == peak == min(peaks.values())
    assert sum(lengths) == min(sum(way) for way in ways if peaks[way] == peak)


def peak_of_a_step(
    network: Network, lengths: tuple[int, ...], batch_size: int, dtype: torch.dtype = torch.float32, *, remade: bool = True
) -> int:
    x = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    network.zero_grad(set_to_none=True)
    network.segments = lengths
    with LiveBytes(*network.state_dict().values()) as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), remaking(remade):
            logits = network(x)
        F.cross_entropy(logits.float(), torch.zeros(batch_size, dtype=torch.long)).backward()
    return live.peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("dacnn14", {}),
        ("dacnn14-reg", {}),
        ("dacnn14", {"regulator": "depthwise", "regulator_place": "after-norm"}),
        ("dacnn18", {"regulator": "low-rank", "regulator_rank": 2}),
        ("dacnn18", {"depths": (5, 5)}),
        ("dacnn34-mix-reg", {}),
    ],
)
def test_the_estimate_is_the_peak_of_what_lives_to_a_quarter_and_the_choice_is_a_good_one(
    name: str, changes: dict, dtype: torch.dtype
) -> None:
    network = dacnn.create(name, width=8, seed=0, **changes)
    batch_size = 24
    chosen = choose_segments(network.plan, batch_size, dtype.itemsize)
    measured = peak_of_a_step(network, chosen.lengths, batch_size, dtype)
    assert chosen.peak_bytes == pytest.approx(measured, rel=0.25)
    count = len(block_bytes(network.plan, batch_size, dtype.itemsize))
    others = [(), (1,) * count, (2,) * (count // 2), (3,) * (count // 3), (count,)]
    peaks = [peak_of_a_step(network, lengths, batch_size, dtype) for lengths in others]
    assert chosen.peak_bytes_kept == pytest.approx(peaks[0], rel=0.25)
    assert measured <= 1.1 * min(peaks)


@pytest.mark.parametrize(("name", "depths", "bar"), [("dacnn34", None, 0.5), ("dacnn18", (25,) * 4, 0.2)])
def test_deep_networks_take_less_than_their_bars_of_what_the_plain_loop_takes(name: str, depths: tuple, bar: float) -> None:
    network = dacnn.create(name, depths=depths, width=16, seed=0)
    chosen = choose_segments(network.plan, 4)
    assert peak_of_a_step(network, chosen.lengths, 4) <= bar * peak_of_a_step(network, (), 4, remade=False)
    assert f"{sum(chosen.lengths)} of {chosen.blocks} blocks run again" in chosen.describe()


def test_a_network_without_blocks_has_no_segments() -> None:
    plan = dacnn.create("dacnn3", width=8, depths=(1,)).plan
    chosen = choose_segments(plan, 4)
    assert chosen.lengths == () and "no block runs again" in chosen.describe()


# ---------------------------------------------------------------- trainings


@pytest.fixture
def a_gpu_of_some_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


@pytest.mark.usefixtures("a_gpu_of_some_kind")
@pytest.mark.parametrize("recompute", ["activations", "segments"])
def test_what_is_made_again_is_not_left_to_a_compiler(recompute: str) -> None:
    with pytest.raises(ConfigError, match=f"training.recompute is '{recompute}' and training.compile 'yes'.*leave one of them"):
        TrainingConfig(recompute=recompute, compile="yes")
    for device in ("cpu", "cuda"):
        execution = choose(TrainingConfig(recompute=recompute, precision="float32"), device)
        assert execution.recompute == recompute and not execution.compiled


@pytest.mark.usefixtures("a_gpu_of_some_kind")
def test_by_itself_a_cpu_makes_activations_again_and_a_compiler_nothing() -> None:
    assert choose(TrainingConfig(), "cpu").recompute == "activations"
    assert "activations made again" in choose(TrainingConfig(), "cpu").describe()
    assert choose(TrainingConfig(compile="yes"), "cpu").recompute == "no"
    on_gpu = choose(TrainingConfig(precision="float32"), "cuda")
    assert on_gpu.recompute == "no" and on_gpu.compiled


@pytest.mark.usefixtures("a_gpu_of_some_kind")
def test_what_is_rounded_is_not_compiled_by_itself() -> None:
    assert not choose(TrainingConfig(quantize="int8", weights="runs/a"), "cuda").compiled


@pytest.mark.parametrize(
    ("foreign", "accumulate", "mode"), [(False, 1, "reduce-overhead"), (False, 2, "default"), (True, 1, "default")]
)
def test_passes_are_recorded_where_nothing_outlives_them(
    foreign: bool, accumulate: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: nn.Module = dacnn.create("dacnn3", width=8)
    loop = loop_on(nn.Sequential(network) if foreign else network, "no")
    loop.device, loop.config = torch.device("cuda"), TrainingConfig(accumulate=accumulate)
    monkeypatch.setattr(torch, "compile", lambda model, mode: (model, mode))
    assert loop._compile(loop.network) == (loop.network, mode)


def loop_on(network: nn.Module, recompute: str) -> Loop:
    images, labels = torch.zeros(16, 32, 32, 3, dtype=torch.uint8), torch.zeros(16, dtype=torch.long)
    train, empty = MemoryImages(images, labels, ("0", "1")), MemoryImages(images[:0], labels[:0], ("0", "1"))
    splits = Splits(train, empty, empty, Input(), ("0", "1"), "nothing")
    config = TrainingConfig(batch_size=8, recompute=recompute)
    return Loop(network, splits, config, Accelerator(cpu=True), choose(config, "cpu"))


def test_segments_need_a_plan() -> None:
    with pytest.raises(ConfigError, match="training.recompute is 'segments': .* and Sequential has none: use 'activations'"):
        loop_on(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), "segments")


def test_the_loop_tells_the_network_only_when_it_is_asked_to() -> None:
    network = dacnn.create("dacnn18", width=8, num_classes=2)
    assert loop_on(network, "activations").segments is None and network.segments == ()
    loop = loop_on(network, "segments")
    assert loop.segments and network.segments == loop.segments.lengths != ()


class Lines(Listener):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


def test_a_training_ends_with_the_same_bits_whatever_is_made_again(tmp_path: Path) -> None:
    small = {"width": 8, "depths": (3, 2), "epochs": 1, "batch_size": 64, "accumulate": 2, "threads": 1}
    said = {}
    for recompute in ("no", "activations", "segments"):
        listener = Lines()
        dacnn.train("dacnn18", data="digits", out=tmp_path / recompute, listener=listener, recompute=recompute, **small)
        said[recompute] = "\n".join(listener.lines)
    weights = [load_file(tmp_path / recompute / "last.safetensors") for recompute in said]
    for one, other in itertools.pairwise(weights):
        assert all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()
    assert "blocks run again for the gradient, in segments of" in said["segments"]
    assert "segments made again" in said["segments"] and "made again" not in said["no"]
    # a resumed run does as it did
    listener = Lines()
    dacnn.train(out=tmp_path / "segments", resume=True, listener=listener)
    assert "\n".join(listener.lines) == said["segments"]

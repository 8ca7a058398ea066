"""Which blocks of a network run again for the gradient: the partition with the smallest peak of activation memory.

A segment keeps its input alone until its gradient is taken; then it runs again, and for that while everything in it is kept,
with outputs of norms and ReLUs as recipes. Small segments keep many inputs, large ones much at a time. Everything is counted
from the plan, in bytes; what does not grow with the batch is left out.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dacnn.networks.plan import Block, Layer, Plan

# N images, C channels, H rows, W columns

# gradients and remade outputs that are there at a time in the backward pass of a block, in activations of its largest size
_AT_WORK = {"chain": 3, "residual": 2}
# regulators that keep what goes into them; the channel shift keeps nothing
_KEEP_INPUT = ("pointwise", "depthwise", "low-rank")


@dataclass(frozen=True)
class BlockBytes:
    """What a block takes, in bytes of a whole batch.

    Attributes:
        input: What goes into it, where that is kept whole.
        kept: What it keeps for its gradient, beside its input.
        work: What its backward pass takes on top of that.
    """

    input: int
    kept: int
    work: int


@dataclass(frozen=True)
class Segments:
    """A choice of segments.

    Attributes:
        lengths: Blocks of each segment, from the first block on; blocks behind the last segment are kept.
        blocks: Blocks of the network.
        peak_bytes: Estimated peak of the activations of a step.
        peak_bytes_kept: The same, were no block to run again.
    """

    lengths: tuple[int, ...]
    blocks: int
    peak_bytes: int
    peak_bytes_kept: int

    def describe(self) -> str:
        """One line for the log."""
        if not self.lengths:
            return f"no block runs again for the gradient: about {self.peak_bytes / 1e6:,.0f} MB of activations either way"
        runs = (f"{len(list(run))} x {length}" for length, run in itertools.groupby(self.lengths))
        return (
            f"{sum(self.lengths)} of {self.blocks} blocks run again for the gradient, in segments of {', '.join(runs)}: "
            f"about {self.peak_bytes / 1e6:,.0f} MB of activations instead of {self.peak_bytes_kept / 1e6:,.0f} MB"
        )


def _layer_values(layer: Layer, relu: bool) -> int:
    """Values a pixel that a layer keeps, its output being a recipe where a ReLU follows."""
    values, regulator = layer.out_channels, layer.regulator
    if regulator is None:
        return values
    if regulator.kind in _KEEP_INPUT:
        values += layer.out_channels + (regulator.rank or 0)
    # behind the norm the ReLU is the regulator's, which no recipe covers
    return values + (layer.out_channels if relu and regulator.place == "after-norm" else 0)


def _block_values(block: Block) -> int:
    """Values a pixel that a block keeps, without what a pooling behind it gives."""
    last = len(block.layers) - 1
    values = sum(_layer_values(layer, relu=index < last or not block.residual) for index, layer in enumerate(block.layers))
    if block.shortcut:
        values += _layer_values(block.shortcut, relu=False)
    # the sum
    return values + (block.layers[-1].out_channels if block.residual else 0)


def block_bytes(plan: Plan, batch_size: int, bytes_per_value: int) -> list[BlockBytes]:
    """Count what every block of a plan takes; the stem is counted with the first.

    Args:
        plan: The plan.
        batch_size: Images of one forward pass.
        bytes_per_value: Of an activation: 4 in float32, 2 in bfloat16.

    Returns:
        One entry a block.
    """
    halved = 0
    stem, result = plan.stem, []

    def unit() -> int:
        """Bytes of one channel of a batch."""
        return batch_size * (plan.input.height >> halved) * (plan.input.width >> halved) * bytes_per_value

    # the images are float32 whatever the activations are
    before = batch_size * plan.input.height * plan.input.width * plan.input.channels * 4
    first, channels = _layer_values(stem, relu=True) * unit(), stem.out_channels
    for stage in plan.stages:
        for number, block in enumerate(stage.blocks, start=1):
            pooled = stage.pool and number == len(stage.blocks)
            kept = first + _block_values(block) * unit()
            widest = max(channels, *(layer.out_channels for layer in block.layers))
            work = _AT_WORK["residual" if block.residual else "chain"] * widest * unit()
            if first and block.residual:
                # the stem's output waits for the sum, and is no segment's input
                work += stem.out_channels * unit()
            channels, first = block.layers[-1].out_channels, 0
            output = channels * unit() // (4 if pooled else 1)
            result.append(BlockBytes(before, kept + (output if pooled else 0), work))
            before = output
        halved += stage.pool
    return result


def peaks_bytes(blocks: Sequence[BlockBytes]) -> list[int]:
    """The peak while the first block, the first two, ... are kept, or run again as one segment."""
    kept = itertools.accumulate(block.kept for block in blocks)
    at_work = (blocks[0].input + total + block.work for total, block in zip(kept, blocks, strict=True))
    # the gradient goes from the last to the first: it meets each block with those before it still there
    return list(itertools.accumulate(at_work, max))


def partition(blocks: Sequence[BlockBytes]) -> tuple[tuple[int, ...], int]:
    """Cut the blocks into segments such that the peak is the smallest, and the fewest blocks run again.

    Args:
        blocks: What every block takes.

    Returns:
        The lengths of the segments that run again, from the first block on, and the peak in bytes.
    """
    count = len(blocks)
    again = [peaks_bytes(blocks[begin:]) for begin in range(count)]
    kept = [peaks[-1] for peaks in again] + [0]
    # the smallest peak of what begins at a block, not counting what is kept before it
    best = [0] * (count + 1)
    for begin in reversed(range(count)):
        cut = (max(peak, blocks[begin].input + best[begin + size]) for size, peak in enumerate(again[begin], start=1))
        best[begin] = min(kept[begin], *cut)
    # the smallest sum of the inputs of the segments before a block under which that peak holds
    base: list[float] = [0.0] + [math.inf] * count
    lengths: list[tuple[int, ...]] = [()] * (count + 1)
    for end in range(count + 1):
        for begin in range(end):
            inputs = base[begin] + blocks[begin].input
            if base[begin] + again[begin][end - begin - 1] <= best[0] and inputs < base[end]:
                base[end], lengths[end] = inputs, (*lengths[begin], end - begin)
        if base[end] + kept[end] <= best[0]:
            return lengths[end], best[0]
    raise AssertionError("the smallest peak belongs to a partition")


def choose_segments(plan: Plan, batch_size: int, bytes_per_value: int = 4) -> Segments:
    """Choose the segments of a network: the smallest peak; of several equal choices the one that runs the least again.

    Args:
        plan: The network's plan.
        batch_size: Images of one forward pass.
        bytes_per_value: Of an activation: 4 in float32, 2 in bfloat16.

    Returns:
        The choice.
    """
    blocks = block_bytes(plan, batch_size, bytes_per_value)
    lengths, peak = partition(blocks)
    return Segments(lengths, len(blocks), peak, peaks_bytes(blocks)[-1] if blocks else 0)

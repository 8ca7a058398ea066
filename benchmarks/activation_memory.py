"""Activation memory and time of a step: the loop people write first against this library's with segments that run again.

The plain side: float32, NCHW, everything kept. This side: `dacnn.training.loop.Loop` in float32 with `recompute="segments"`.
Both have their random images at hand. They run in turn, each in a process of its own; medians of the runs are compared.

Activation memory is the peak of the resident memory during the steps minus the resident memory before them, behind a step of
two images: PyTorch's allocator for CPUs counts no peak, and reordered copies within oneDNN and freed memory that the C library
does not give back are memory that a machine must have, too. Weights, moments and code are there before and are not counted.
On a GPU it is the allocator's peak minus what was allocated before.

    python benchmarks/activation_memory.py --network dacnn34 --width 64
    python benchmarks/activation_memory.py --network dacnn18 --depths 25 25 25 25 --width 64 --steps 1 --rounds 1
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import dacnn
from dacnn.config import TrainingConfig
from dacnn.data.imageset import MemoryImages
from dacnn.data.sources import Splits
from dacnn.networks.network import Network
from dacnn.networks.plan import Input
from dacnn.training.loop import Loop
from dacnn.training.precision import best_device, choose, cpu_name

# N images, H rows, W columns

CLASSES = tuple(map(str, range(10)))
INPUT = Input(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))
SIDES = ("plain", "dacnn")


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """Images, uint8, N x H x W x 3, and labels; what they show changes neither memory nor time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, INPUT.height, INPUT.width, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


def plain_steps(network: Network, batch_size: int, steps: int, device: str) -> Iterator[None]:
    """The loop people write first, one batch at hand."""
    model = network.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss_of = nn.CrossEntropyLoss()
    images, labels = random_images(batch_size)
    inputs, targets = ((images.permute(0, 3, 1, 2) / 255 - 0.5).contiguous() * 4).to(device), labels.to(device)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()
        yield


def our_loop(network: Network, batch_size: int, steps: int, device: str) -> Loop:
    """This library's loop, an epoch of so many steps."""
    images, labels = random_images(steps * batch_size)
    config = TrainingConfig(epochs=1, batch_size=batch_size, lr=0.01, precision="float32", recompute="segments")
    train, empty = MemoryImages(images, labels, CLASSES), MemoryImages(images[:0], labels[:0], CLASSES)
    splits = Splits(train, empty, empty, INPUT, CLASSES, "random")
    return Loop(network, splits, config, Accelerator(cpu=device == "cpu"), choose(config, device))


def begin_measuring(device: str) -> int:
    """Forget earlier peaks; the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # the kernel's word for it: the peak of the resident memory begins anew
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def peak_bytes(device: str) -> int:
    """The most bytes in use since `begin_measuring`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def run_side(side: str, network: Network, batch_size: int, steps: int) -> dict[str, Any]:
    """Measure one side in this process."""
    device = best_device()
    result: dict[str, Any] = {}
    # what is made once, such as moments of the optimiser, threads and code, shall be there already
    warm: Iterator[Any]
    stepper: Iterator[Any]
    if side == "plain":
        warm, stepper = plain_steps(network, 2, 1, device), plain_steps(network, batch_size, steps + 1, device)
    else:
        warm = our_loop(network, 2, 1, device).train_epoch()
        loop = our_loop(network, batch_size, steps + 1, device)
        assert loop.segments
        result = {"execution": loop.execution.describe(), "segments": loop.segments.describe()}
        stepper = loop.train_epoch()
    list(warm)
    before = begin_measuring(device)
    times = []
    for _ in stepper:
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    # the first step is not timed: it is slower on both sides
    seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
    return result | {"seconds_per_step": seconds, "activation_bytes": peak_bytes(device) - before}


def in_turn(words: list[str], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run both sides one after the other, each in a process of its own."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number, side in itertools.product(range(rounds), SIDES):
        print(f"round {number + 1} of {rounds}: {side}", file=sys.stderr)
        command = [sys.executable, __file__, *words, "--side", side]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    return runs


def report(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of both sides and their ratios."""
    names = ("activation_bytes", "seconds_per_step")
    medians = {
        side: {name: statistics.median(run[name] for run in results) for name in names} for side, results in runs.items()
    }
    ratios = {name: medians["dacnn"][name] / medians["plain"][name] for name in names}
    return {
        "runs": runs,
        "medians": medians,
        "memory_ratio": ratios["activation_bytes"],
        "time_ratio": ratios["seconds_per_step"],
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn34")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depths", type=int, nargs="+")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3, help="steps measured in each run, behind one that is not timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print everything that was measured")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        network = dacnn.create(options.network, width=options.width, depths=options.depths, seed=0)
        print(json.dumps(run_side(options.side, network, options.batch_size, options.steps)))
        return
    table = report(in_turn([word for word in sys.argv[1:] if word != "--json"], options.rounds))
    if options.json:
        print(json.dumps(vars(options) | table, indent=2))
        return
    shape = f"width {options.width}" + f", depths {' '.join(map(str, options.depths or ()))}" * bool(options.depths)
    print(f"{options.network}, {shape}, batch {options.batch_size}, PyTorch {table['torch']}, {table['cpu']}")
    for name in ("execution", "segments"):
        print(table["runs"]["dacnn"][0][name])
    for side, results in table["runs"].items():
        medians = table["medians"][side]
        seconds = [result["seconds_per_step"] for result in results]
        print(
            f"{side:>6}: {medians['activation_bytes'] / 1e6:8,.0f} MB of activations, "
            f"{medians['seconds_per_step']:.2f} s a step ({min(seconds):.2f} to {max(seconds):.2f})"
        )
    print(f" ratio: {table['memory_ratio']:.2f}x the activation memory at {table['time_ratio']:.2f}x the time")


if __name__ == "__main__":
    main()

"""Training speed and memory: the loop people write first against this library's, the same network, side by side.

The plain side: float32, NCHW, a `DataLoader` that transforms image by image (pad, crop, flip, normalise). This side:
`dacnn.training.loop.Loop` with everything on `auto`. The two run in turn, each in a process of its own, so that the
peak of its memory is its own; medians of the runs are compared. On a CPU every step is timed, and the median counts; a GPU is
not waited for between the steps, as it is not in a training, and the mean counts.

    python benchmarks/training.py --width 128 --batch-size 256
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import dacnn
from dacnn.config import Precision, TrainingConfig
from dacnn.data.imageset import MemoryImages
from dacnn.data.sources import Splits
from dacnn.networks.network import Network
from dacnn.networks.plan import Input
from dacnn.training.loop import Loop
from dacnn.training.precision import choose, cpu_name

CLASSES = tuple(map(str, range(10)))
INPUT = Input(mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


def random_images(count: int) -> tuple[Tensor, Tensor]:
    """Images and labels; what they show does not change the speed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (count,), generator=generator)


class TransformedImages(Dataset[tuple[Tensor, int]]):
    """Image by image: to float, pad, crop, flip, normalise."""

    def __init__(self, images_nhwc: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images_nhwc, labels
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (INPUT.mean, INPUT.std))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = F.pad(self.images[index].permute(2, 0, 1).float() / 255, (4, 4, 4, 4))
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = image[:, top : top + 32, left : left + 32]
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        return (image - self.mean) / self.std, int(self.labels[index])


def plain_steps(network: Network, images: Tensor, labels: Tensor, batch_size: int, device: str) -> Iterator[None]:
    """The loop people write first."""
    model = network.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss_of = nn.CrossEntropyLoss()
    for inputs, targets in DataLoader(
        TransformedImages(images, labels), batch_size=batch_size, shuffle=True, drop_last=True, num_workers=2
    ):
        optimizer.zero_grad()
        loss = loss_of(model(inputs.to(device)), targets.to(device))
        loss.backward()
        optimizer.step()
        loss.item()
        yield


def run_side(side: str, width: int, batch_size: int, steps: int, precision: Precision) -> dict[str, Any]:
    """Measure one side in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # a GPU's passes are compiled, then recorded
    warm_up = 5 if device == "cuda" else 2
    images, labels = random_images((steps + warm_up) * batch_size)
    network = dacnn.create("dacnn14", width=width, seed=0)
    result: dict[str, Any] = {}
    if side == "plain":
        stepper: Iterator[Any] = plain_steps(network, images, labels, batch_size, device)
    else:
        config = TrainingConfig(epochs=1, batch_size=batch_size, lr=0.01, precision=precision)
        train = MemoryImages(images, labels, CLASSES)
        empty = MemoryImages(images[:0], labels[:0], CLASSES)
        execution = choose(config, device)
        loop = Loop(network, Splits(train, empty, empty, INPUT, CLASSES, "random"), config, Accelerator(), execution)
        stepper = loop.train_epoch()
        result["execution"] = execution.describe()
    times = []
    for index, _ in enumerate(stepper, 1 - warm_up):
        if device == "cuda" and index in (0, steps):
            torch.cuda.synchronize()
        if index >= 0:
            times.append(time.perf_counter())
    if device == "cuda":
        seconds_per_step = (times[-1] - times[0]) / steps
    else:
        seconds_per_step = statistics.median(after - before for before, after in itertools.pairwise(times))
    if side == "dacnn":
        result["input_share"] = input_seconds(loop) / seconds_per_step
    # workers of a DataLoader are processes of their own and are not counted
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident
    return result | {"images_per_second": batch_size / seconds_per_step, "peak_memory_bytes": peak}


def input_seconds(loop: Loop) -> float:
    """Median seconds that gathering, augmenting and normalising a batch take, without the network."""
    times = []
    loop.epoch, loop.step = 0, 0
    begun = time.perf_counter()
    for step, (images, _labels) in enumerate(loop.batches()):
        loop.prepare(loop.augment(images, step))
        if loop.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        begun = time.perf_counter()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200 if torch.cuda.is_available() else 8, help="timed steps of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--precision", choices=typing.get_args(Precision), default="auto", help="of this library's side")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--side", choices=("plain", "dacnn"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(options.side, options.width, options.batch_size, options.steps, options.precision)))
        return
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "dacnn": []}
    for number in range(options.rounds):
        for side, results in runs.items():
            print(f"round {number + 1} of {options.rounds}: {side}", file=sys.stderr)
            command = [
                sys.executable,
                __file__,
                "--side",
                side,
                "--width",
                str(options.width),
                "--batch-size",
                str(options.batch_size),
                "--precision",
                options.precision,
            ]
            output = subprocess.run(
                [*command, "--steps", str(options.steps)], check=True, capture_output=True, text=True
            ).stdout
            results.append(json.loads(output.splitlines()[-1]))
    names = ("images_per_second", "peak_memory_bytes")
    medians = {
        side: {name: statistics.median(result[name] for result in results) for name in names} for side, results in runs.items()
    }
    input_share = statistics.median(result["input_share"] for result in runs["dacnn"])
    speed = medians["dacnn"]["images_per_second"] / medians["plain"]["images_per_second"]
    memory = medians["dacnn"]["peak_memory_bytes"] / medians["plain"]["peak_memory_bytes"]
    if options.json:
        ratios = {
            "speed_ratio": speed,
            "memory_ratio": memory,
            "input_share": input_share,
            "cpu": cpu_name(),
            "torch": torch.__version__,
        }
        print(
            json.dumps(
                {"width": options.width, "batch_size": options.batch_size, "runs": runs, "medians": medians} | ratios, indent=2
            )
        )
        return
    print(f"dacnn14, width {options.width}, batch {options.batch_size}, PyTorch {torch.__version__}, {cpu_name()}")
    print(f"dacnn: {runs['dacnn'][0]['execution']}")
    for side, results in runs.items():
        speeds = [result["images_per_second"] for result in results]
        peak = medians[side]["peak_memory_bytes"] / 1e6
        images_per_second = medians[side]["images_per_second"]
        print(f"{side:>6}: {images_per_second:8.1f} images/s ({min(speeds):.1f} to {max(speeds):.1f}), peak {peak:,.0f} MB")
    print(f" ratio: {speed:.2f}x the images/s at {memory:.2f}x the peak memory; input pipeline {input_share:.1%} of a step")


if __name__ == "__main__":
    main()

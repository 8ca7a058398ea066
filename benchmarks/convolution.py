"""Winograd's convolution beside PyTorch's own, layer by layer: forward pass and both gradients, float32, channels-last.

Runs alternate, and ratios are of medians. Beside them stands the rule by which a training chooses.

    python benchmarks/convolution.py --channels 64 128 256 --sides 32 16 8 7 4
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dacnn.sharing.winograd import convolve_by_winograd, pays
from dacnn.training.precision import cpu_name

# values of a batch: as many at every size, the batch of the smallest images cut to what a training has
_VALUES = 2**21
_LARGEST_BATCH = 128


def step(convolution: Callable[[Tensor, Tensor], Tensor], x: Tensor, kernel: Tensor, of_y: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    begin = time.perf_counter()
    torch.autograd.grad(convolution(x, kernel), (x, kernel), of_y)
    return time.perf_counter() - begin


def plain(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, padding=1)


def measure(channels: int, side: int, rounds: int) -> dict[str, Any]:
    """Both sides on one layer of as many inputs as outputs."""
    batch = max(1, min(_LARGEST_BATCH, _VALUES // (channels * side**2)))
    x, of_y = (torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()
    kernel = torch.randn(channels, channels, 3, 3, requires_grad=True)
    seconds: dict[str, list[float]] = {"plain": [], "winograd": []}
    for number in range(rounds + 1):
        for name, convolution in (("plain", plain), ("winograd", convolve_by_winograd)):
            taken = step(convolution, x, kernel, of_y)
            # the first round warms up
            seconds[name] += [taken] * (number > 0)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "channels": channels,
        "side": side,
        "batch": batch,
        "ratio": medians["plain"] / medians["winograd"],
        "chosen": pays(x, kernel),
        # three convolutions of nine multiply-adds each
        "gflops": {name: 54 * batch * side**2 * channels**2 / median / 1e9 for name, median in medians.items()},
        "milliseconds": {name: [1000 * value for value in values] for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 16, 8, 7, 4], help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side, in turn")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    if not options.json:
        print(f"PyTorch {torch.__version__}, {cpu_name()}, {threads} threads")
    results = []
    for channels in options.channels:
        for side in options.sides:
            result = measure(channels, side, options.rounds)
            results.append(result)
            if not options.json:
                chosen = "winograd" if result["chosen"] else "plain"
                rates = " -> ".join(f"{rate:5.0f}" for rate in result["gflops"].values())
                print(f"{channels:4} channels, {side:2}x{side:<2}: {result['ratio']:.2f}x, {rates} GFLOP/s, chosen: {chosen}")
    if options.json:
        print(json.dumps({"cpu": cpu_name(), "torch": torch.__version__, "threads": threads, "layers": results}, indent=2))


if __name__ == "__main__":
    main()

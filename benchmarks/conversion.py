"""How long `dacnn.anchor` takes: ResNet-50 of `transformers`, each rule with each start, beside building the network.

Medians of the rounds; a round builds the network anew and converts it once a row, in turn. The traced forward pass, where
there is one, sees one image.

    python benchmarks/conversion.py --rounds 5
"""

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

import dacnn
from dacnn.training.precision import cpu_name

DEPTHS = (3, 4, 6, 3)
RULES = ("all", "stage", "isomorphic")
STARTS = ("first", "mean", "fit")


def resnet50(width: int) -> nn.Module:
    """ResNet-50 with random weights; 64 is its usual width."""
    sizes = [width * 4 * 2**stage for stage in range(len(DEPTHS))]
    return ResNetModel(ResNetConfig(embedding_size=width, hidden_sizes=sizes, depths=list(DEPTHS)))


def seconds_of(call: Callable[[], object]) -> tuple[float, Any]:
    """How long a call took, and what it gave."""
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


def rows(width: int, image: Tensor, rounds: int) -> list[dict[str, Any]]:
    """Seconds of building and of every conversion."""
    seconds: dict[tuple[str, str], list[float]] = {}
    stored: dict[tuple[str, str], int] = {}
    for _ in range(rounds):
        built, module = seconds_of(lambda: resnet50(width))
        seconds.setdefault(("-", "-"), []).append(built)
        stored["-", "-"] = parameters_of(module)
        for rule, start in (*itertools.product(RULES, STARTS), ("all", "bank of 2")):
            settings: dict[str, Any] = {"templates": 2} if start == "bank of 2" else {"start": start}
            taken, (shared, _) = seconds_of(functools.partial(dacnn.anchor, module, rule, example=image, **settings))
            seconds.setdefault((rule, start), []).append(taken)
            stored[rule, start] = parameters_of(shared)
    return [
        {"rule": rule, "start": start, "seconds": statistics.median(values), "stored_parameters": stored[rule, start]}
        for (rule, start), values in seconds.items()
    ]


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--side", type=int, default=224, help="pixels of the image that is traced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    image = torch.randn(1, 3, options.side, options.side, generator=torch.Generator().manual_seed(0))
    table = rows(options.width, image, options.rounds)
    if options.json:
        print(json.dumps({"rows": table, "cpu": cpu_name(), "torch": torch.__version__}, indent=2))
        return
    print(f"ResNet-50, width {options.width}, PyTorch {torch.__version__}, {torch.get_num_threads()} threads, {cpu_name()}")
    for row in table:
        what = "building" if row["rule"] == "-" else f"{row['rule']}, {row['start']}"
        print(f"{what:>22}: {row['seconds']:6.3f} s, {row['stored_parameters']:>12,} parameters stored")


if __name__ == "__main__":
    main()

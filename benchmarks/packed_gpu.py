"""`dacnn.pack` on a GPU beside PyTorch's own ways to run the same network: step by step, and `torch.compile` with CUDA graphs.

Every way has uint8 images of the device and gives float32 logits there. Runs alternate; each is waited for. Errors are
shares of the largest logit, against float64 on the CPU: by its own default PyTorch's float32 is TF32 in convolutions, that of
`pack` is not.

    python benchmarks/packed_gpu.py --rounds 100
"""

import argparse
import copy
import functools
import json
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dacnn
from dacnn.deploy.lower import lower
from dacnn.training.precision import best_device, cpu_name

Run = Callable[[Tensor], Tensor]
WAYS = ("pack", "eager", "compiled")
FORMATS: dict[Literal["float32", "bfloat16"], torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def trained_like(network: dacnn.Network) -> dacnn.Network:
    """Norms whose statistics and terms all differ, as behind a training."""
    generator = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean is not None and norm.running_var is not None
            with torch.no_grad():
                norm.running_mean.normal_(0, 0.1, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
                norm.weight.uniform_(0.5, 1.5, generator=generator)
                norm.bias.normal_(0, 0.1, generator=generator)
    return network.eval()


def runs_of(network: dacnn.Network, device: str, ways: Collection[str]) -> dict[str, tuple[Run, int]]:
    """Ways to run it in both number formats, and the bytes that each holds on the device."""
    program = lower(network)
    found: dict[str, tuple[Run, int]] = {}
    for name, dtype in FORMATS.items():
        packed = dacnn.pack(program, device=device, dtype=name)
        found[f"pack, {name}"] = packed, packed.nbytes
        there = copy.deepcopy(network).to(device=device, dtype=dtype)
        held = sum(tensor.nbytes for tensor in there.state_dict().values())
        # images are normalised in float32
        there.normalize.float().reset_statistics()
        step_by_step = functools.partial(_classified, there, dtype)
        found[f"eager, {name}"] = step_by_step, held
        found[f"compiled, {name}"] = torch.compile(step_by_step, mode="reduce-overhead", dynamic=False), held
    return {name: run for name, run in found.items() if name.partition(",")[0] in ways}


@torch.no_grad()
def _classified(network: dacnn.Network, dtype: torch.dtype, images: Tensor) -> Tensor:
    x = network.normalize(images).to(dtype).contiguous(memory_format=torch.channels_last)
    logits: Tensor = network(x)
    return logits.float()


def milliseconds(runs: dict[str, Run], images: Tensor, rounds: int) -> dict[str, list[float]]:
    """Of every run, in turn."""

    def wait() -> None:
        if images.is_cuda:
            torch.cuda.synchronize()

    taken: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(-3, rounds):
        for name, run in runs.items():
            wait()
            begin = time.perf_counter()
            run(images)
            wait()
            if round_ >= 0:
                taken[name].append((time.perf_counter() - begin) * 1e3)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn14")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 1024])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default=best_device())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # `torch.compile` compiles each number format and batch by itself
    torch._dynamo.config.recompile_limit = 64
    network = trained_like(dacnn.create(options.network, width=options.width, seed=0))
    found = runs_of(network, options.device, options.ways)
    of = network.input
    size = max(options.batches), of.height, of.width, of.channels
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    some = images[:32]
    normalised = (some.double() / 255 - torch.tensor(of.mean).double()) / torch.tensor(of.std).double()
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(normalised.permute(0, 3, 1, 2))
    rows: dict[str, dict[str, Any]] = {}
    for name, (run, held) in found.items():
        error = (run(some.to(options.device)).double().cpu() - expected).abs().max() / expected.abs().max()
        rows[name] = {"held_bytes": held, "error": float(error), "milliseconds": {}, "quartiles": {}}
    for batch in options.batches:
        taken = milliseconds({name: run for name, (run, _) in found.items()}, images[:batch].to(options.device), options.rounds)
        for name, values in taken.items():
            rows[name]["milliseconds"][str(batch)] = statistics.median(values)
            rows[name]["quartiles"][str(batch)] = statistics.quantiles(values, n=4)[::2]
    hardware = torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else cpu_name()
    if options.json:
        print(json.dumps({"hardware": hardware, "torch": torch.__version__, "ways": rows}, indent=2))
        return
    print(f"{options.network}, width {options.width}, PyTorch {torch.__version__}, {hardware}")
    for name, row in rows.items():
        times = ", ".join(f"{row['milliseconds'][str(batch)]:.3f} ms at batch {batch}" for batch in options.batches)
        print(f"{name:>20}: {times}; {row['held_bytes']:,} bytes held, error {row['error']:.1e}")
    for name in FORMATS if {"pack", "compiled"} <= set(options.ways) else ():
        ratios = [
            f"{rows[f'compiled, {name}']['milliseconds'][str(batch)] / rows[f'pack, {name}']['milliseconds'][str(batch)]:.2f}x"
            for batch in options.batches
        ]
        print(f"pack, {name}, against compiled: {', '.join(ratios)} as fast")


if __name__ == "__main__":
    main()

"""Thousands of networks, each with its own anchors, in one process: seconds to pack each, and memory for each.

The networks are of one architecture with random weights. It is lowered once; the programs of the others have the same steps and
tensors of their own. Layouts are chosen with the first network that is packed, for all.

    python benchmarks/many_networks.py --count 2000 --width 64
"""

import argparse
import dataclasses
import gc
import json
import statistics
import time
from typing import Any

import numpy as np
import torch

import dacnn
from dacnn.deploy.lower import lower
from dacnn.deploy.program import Program
from dacnn.measure.memory_added import read_memory_bytes
from dacnn.training.precision import cpu_name


def another(program: Program, generator: np.random.Generator) -> Program:
    """The same steps with tensors of their own."""
    tensors = {
        name: tensor * generator.uniform(0.9, 1.1, tensor.shape).astype(np.float32) for name, tensor in program.tensors.items()
    }
    return dataclasses.replace(program, tensors=tensors)


def measured(program: Program, count: int, dtype: str) -> dict[str, Any]:
    """Pack many, and let each serve an image."""
    generator = np.random.default_rng(0)
    of = program.input
    image = torch.zeros(1, of.height, of.width, of.channels, dtype=torch.uint8)
    first = time.perf_counter()
    networks = [dacnn.pack(program, dtype=dtype, device="cpu")]  # type: ignore[arg-type]
    first = time.perf_counter() - first
    networks[0](image)
    gc.collect()
    before, seconds = read_memory_bytes(), []
    for _ in range(count):
        made = another(program, generator)
        begin = time.perf_counter()
        networks.append(dacnn.pack(made, dtype=dtype, device="cpu"))  # type: ignore[arg-type]
        seconds.append(time.perf_counter() - begin)
        # before the next one is made, which can then take its place
        del made
    gc.collect()
    after = read_memory_bytes()
    answers = []
    for network in networks:
        begin = time.perf_counter()
        network(image)
        answers.append(time.perf_counter() - begin)
    return {
        "dtype": dtype,
        "count": count,
        "stored_bytes": program.stored_bytes,
        "held_bytes": networks[0].nbytes,
        "resident_bytes_each": (after["Rss"] - before["Rss"]) / count,
        "anonymous_bytes_each": (after["Anonymous"] - before["Anonymous"]) / count,
        "first_pack_seconds": first,
        "pack_seconds": statistics.median(seconds),
        "answer_seconds": statistics.median(answers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn14")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    program = lower(dacnn.create(options.network, width=options.width, seed=0).eval())
    lowering = time.perf_counter() - begin
    rows = [measured(program, options.count, dtype) for dtype in options.dtypes]
    if options.json:
        print(json.dumps({"rows": rows, "lowering_seconds": lowering, "cpu": cpu_name(), "torch": torch.__version__}, indent=2))
        return
    print(f"{options.network}, width {options.width}, one thread, PyTorch {torch.__version__}, {cpu_name()}")
    print(f"lowering the first: {lowering:.2f} s")
    for row in rows:
        print(
            f"{row['count']:,} networks in {row['dtype']}: {row['stored_bytes']:,} bytes stored, {row['held_bytes']:,} held, "
            f"{row['resident_bytes_each']:,.0f} resident each; packing {row['first_pack_seconds'] * 1e3:.0f} ms the first, "
            f"{row['pack_seconds'] * 1e3:.1f} ms each; an answer at batch 1 {row['answer_seconds'] * 1e3:.2f} ms"
        )


if __name__ == "__main__":
    main()

"""`dacnn.pack`, by PyTorch and as compiled C, beside ONNX Runtime's default session on the plain export: time and memory.

Runs alternate, and ratios are of medians; everything has one thread. Memory is what packing, or opening a session, and three
runs at batch 1 add to a fresh process that has run something tiny before: private anonymous bytes, and those of files that are
mapped and read, such as a library of compiled C. C takes uint8 images, the others the same ones normalised.

    python benchmarks/packed.py --rounds 60
"""

import argparse
import functools
import gc
import json
import multiprocessing
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

import dacnn
from dacnn.deploy.lower import lower
from dacnn.deploy.packed import Packed
from dacnn.deploy.program import Program
from dacnn.deploy.shapes import live_bytes, macs
from dacnn.measure.memory_added import memory_added, read_memory_bytes
from dacnn.training.precision import cpu_name

# arguments of `pack`
WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "c": {"engine": "c"},
    "c, bfloat16": {"engine": "c", "dtype": "bfloat16"},
    "c, plain": {"engine": "c", "winograd": "off"},
    "c, plain, bfloat16": {"engine": "c", "winograd": "off", "dtype": "bfloat16"},
}
Run = Callable[[], object]


def export(network: dacnn.Network, images: Tensor, path: Path) -> None:
    """The plain export, whose shapes are fixed."""
    with warnings.catch_warnings():
        # the exporter's own, about packages that are not installed
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(network, (images,), dynamo=True, verbose=False)
    assert exported is not None
    exported.save(path)


def session_of(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def milliseconds(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Of every run, in turn: the second of two, since the first one finds another's data in the caches."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            begin = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return taken


def latencies(
    network: dacnn.Network, program: Program, packed: dict[str, Packed], batch: int, rounds: int, folder: Path
) -> dict[str, Any]:
    """Medians and quartiles at one batch size, and how far apart logits are."""
    of = program.input
    size = batch, of.height, of.width, of.channels
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ((pixels / 255 - torch.tensor(of.mean)) / torch.tensor(of.std)).permute(0, 3, 1, 2).contiguous()
    file = folder / f"batch{batch}.onnx"
    export(network, images, file)
    session = session_of(file)
    given = {session.get_inputs()[0].name: images.numpy()}
    runs: dict[str, Run] = {"onnxruntime": functools.partial(session.run, None, given)}
    runs |= {way: functools.partial(one, pixels if "engine" in WAYS[way] else images) for way, one in packed.items()}
    expected = torch.from_numpy(session.run(None, given)[0])
    taken = milliseconds(runs, rounds)
    return {
        name: {
            "median_ms": statistics.median(values),
            "quartiles_ms": statistics.quantiles(values, n=4)[::2],
            "least_ms": min(values),
            "times_as_fast": statistics.median(taken["onnxruntime"]) / statistics.median(values),
            "gmacs_per_second": macs(program) * batch / statistics.median(values) / 1e6,
            "largest_difference": float((runs[name]() - expected).abs().max() / expected.abs().max())  # type: ignore[operator]
            if name in packed
            else 0.0,
        }
        for name, values in taken.items()
    }


def _memory_of_packing(tiny: Program, program: Program, way: str) -> tuple[int, int, int, int, str]:
    """In a fresh process: bytes added when packed, and after three runs; of files by then; what the network says it holds."""
    torch.set_num_threads(1)
    of = program.input
    images = torch.zeros(1, of.height, of.width, of.channels, dtype=torch.uint8)
    dacnn.pack(tiny, device="cpu", **WAYS[way])(images[:, : tiny.input.height, : tiny.input.width])
    gc.collect()
    before = read_memory_bytes()
    packed = dacnn.pack(program, device="cpu", **WAYS[way])
    ready = read_memory_bytes()
    for _ in range(3):
        packed(images)
    served = read_memory_bytes()
    added = [now["Anonymous"] - before["Anonymous"] for now in (ready, served)]
    mapped = served["Rss"] - before["Rss"] - added[1]
    return added[0], added[1], mapped, packed.nbytes, packed.describe()


def memory(network: dacnn.Network, program: Program, ways: Iterable[str], repeats: int, folder: Path) -> dict[str, Any]:
    """Bytes that each side adds to a fresh process, medians."""
    tiny = lower(dacnn.create("dacnn5", width=8, seed=0).eval())
    rows: dict[str, Any] = {}
    for way in ways:
        found = []
        for _ in range(repeats):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(_memory_of_packing, tiny, program, way).result())
        rows[way] = {
            "packed_bytes": statistics.median(one[0] for one in found),
            "served_bytes": statistics.median(one[1] for one in found),
            "mapped_bytes": statistics.median(one[2] for one in found),
            "held_bytes": found[0][3],
            "words": found[0][4],
        }
    file = folder / "memory.onnx"
    export(network, torch.zeros(1, program.input.channels, program.input.height, program.input.width), file)
    added = [memory_added("dacnn.measure.runtimes:onnx_runtime", file).anonymous_bytes for _ in range(repeats)]
    rows["onnxruntime"] = {"served_bytes": statistics.median(added)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn14")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per reading of memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    network = dacnn.create(options.network, width=options.width, seed=0).eval()
    program = lower(network)
    packed = {way: dacnn.pack(program, device="cpu", **WAYS[way]) for way in options.ways}
    with tempfile.TemporaryDirectory() as folder:
        table = {
            "cpu": cpu_name(),
            "torch": torch.__version__,
            "onnxruntime": onnxruntime.__version__,
            "stored_bytes": program.stored_bytes,
            "live_bytes": live_bytes(program),
            "memory": memory(network, program, options.ways, options.repeats, Path(folder)),
            "latency": {
                str(batch): latencies(network, program, packed, batch, max(3, options.rounds // batch), Path(folder))
                for batch in options.batches
            },
        }
    print(json.dumps(table, indent=2) if options.json else _in_words(options.network, options.width, table))


def _in_words(name: str, width: int, table: dict[str, Any]) -> str:
    limit = 3 * table["stored_bytes"] + table["live_bytes"]
    lines = [
        f"{name}, width {width}, one thread, PyTorch {table['torch']}, ONNX Runtime {table['onnxruntime']}, {table['cpu']}"
    ]
    for batch, rows in table["latency"].items():
        for side, row in rows.items():
            low, high = row["quartiles_ms"]
            times = row["times_as_fast"]
            lines.append(
                f"batch {batch:>3} {side:>18}: {row['median_ms']:8.2f} ms ({low:.2f}-{high:.2f}), {times:.2f}x as fast as "
                f"ONNX Runtime, {row['gmacs_per_second']:.0f} GMAC/s, at most {row['largest_difference']:.1e} apart"
            )
    for side, row in table["memory"].items():
        packed = f"{row['packed_bytes'] / 1e6:.2f} MB packed, " if "packed_bytes" in row else ""
        mapped = f", and {row['mapped_bytes'] / 1e6:.2f} MB of files" if "mapped_bytes" in row else ""
        lines.append(f"memory {side:>18}: {packed}{row['served_bytes'] / 1e6:.2f} MB after three runs at batch 1{mapped}")
    lines.append(f"3x stored bytes + live activations: {limit / 1e6:.2f} MB")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

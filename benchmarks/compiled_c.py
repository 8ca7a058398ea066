"""The compiled C beside ONNX Runtime's default session: batch 1, batches, threads, memory, the rate of each size of layer.

Runs alternate and figures are medians. Layers are timed as the difference between a program of few and one of many of them.
`effective` counts the multiply-adds of the plain convolution; where Winograd's does with fewer, it may be more than the core's
peak.

    python benchmarks/compiled_c.py --rounds 40
"""

import argparse
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

import dacnn
from dacnn import runtime
from dacnn.bench import peak
from dacnn.bench.contenders import Artefact
from dacnn.deploy.c.build import build
from dacnn.deploy.c.source import to_c
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.model import to_onnx
from dacnn.deploy.program import (
    IMAGES,
    Activate,
    Convolve,
    Flatten,
    GlobalAverage,
    Normalize,
    Operation,
    Program,
    ScaleShift,
    StoredKernel,
)
from dacnn.deploy.shapes import live_bytes
from dacnn.errors import ArtefactError
from dacnn.measure.memory_added import read_memory_bytes
from dacnn.networks.plan import Input
from dacnn.training.precision import cpu_name

PATHS = ("avx512", "avx2", "vector", "portable")
# layers of the programs whose difference is timed
FEW, MANY = 1, 5
Run = Callable[[], object]


def seconds(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in every round, all of them in turn."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            # the first behind another side's finds the caches full of that one's
            run()
            begin = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - begin)
    return taken


def compile_to(program: Program, file: Path) -> Path:
    build(to_c(program, name="network"), file)
    return file


def paths_of(file: Path) -> dict[str, runtime.Compiled]:
    """The library by every path that this processor has."""
    found = {}
    for path in PATHS:
        try:
            found[path] = runtime.load(file, path)
        except ArtefactError:
            continue
    return found


def session_of(program: Program, file: Path, threads: int) -> onnxruntime.InferenceSession:
    file.write_bytes(to_onnx(program).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def images_of(program: Program, count: int) -> NDArray[np.uint8]:
    of = program.input
    return np.random.default_rng(0).integers(0, 256, (count, of.height, of.width, of.channels), dtype=np.uint8)


def whole(program: Program, rounds: int, batch: int, folder: Path) -> list[dict[str, Any]]:
    """The network on one image, on a batch, and on a batch with two threads."""
    libraries = paths_of(compile_to(program, folder / "net.so"))
    rows = []
    for count, threads in ((1, 1), (batch, 1), (batch, 2)):
        images = images_of(program, count)
        session = session_of(program, folder / "net.onnx", threads)
        runs: dict[str, Run] = {"onnxruntime": functools.partial(session.run, None, {"images": images})}
        fast = {name: one for name, one in libraries.items() if name != "portable" or count == 1}
        runs |= {name: functools.partial(one, images, threads) for name, one in fast.items()}
        taken = seconds(runs, rounds if count == 1 else max(rounds // 8, 3))
        reference = statistics.median(taken["onnxruntime"])
        for name, values in taken.items():
            median = statistics.median(values)
            rows.append(
                {
                    "path": name,
                    "batch": count,
                    "threads": threads,
                    "image_ms": median / count * 1e3,
                    "least_ms": min(values) / count * 1e3,
                    "times_as_fast": reference / median,
                }
            )
    return rows


def scaling(program: Program, rounds: int, batch: int, folder: Path) -> dict[str, float]:
    """A batch by the fastest path, in turn: image by image, by one thread, by two; medians in ms an image."""
    fastest = next(iter(paths_of(compile_to(program, folder / "batch.so")).values()))
    images = images_of(program, batch)

    def one_by_one() -> None:
        for image in images:
            fastest(image)

    runs: dict[str, Run] = {"one_by_one": one_by_one}
    runs |= {f"{threads}_threads": functools.partial(fastest, images, threads) for threads in (1, 2)}
    return {name: statistics.median(values) / batch * 1e3 for name, values in seconds(runs, max(rounds // 4, 3)).items()}


def layers(channels: int, side: int, count: int) -> Program:
    """So many layers of one kernel over images of one size."""
    random = np.random.default_rng(0)
    tensors = {
        "kernel": random.normal(0, (2 / 9 / channels) ** 0.5, (channels, channels, 3, 3)).astype(np.float32),
        "scale": np.ones(channels, np.float32),
        "shift": np.zeros(channels, np.float32),
    }
    steps: list[Operation] = [Normalize("x0", IMAGES)]
    for index in range(count):
        steps.append(Convolve(f"c{index}", f"x{index}", StoredKernel("kernel"), padding=(1, 1, 1, 1)))
        steps.append(ScaleShift(f"s{index}", f"c{index}", "scale", "shift"))
        steps.append(Activate(f"x{index + 1}", f"s{index}"))
    steps += [GlobalAverage("average", f"x{count}"), Flatten("logits", "average")]
    input = Input(side, side, channels, (0.5,) * channels, (0.25,) * channels)
    return Program("layers", input, tuple(map(str, range(channels))), tuple(steps), "logits", tensors)


def sizes(channels: int, sides: list[int], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Rates of layers of one width, by size of the image and path, beside the peak of a core."""
    torch.set_num_threads(1)
    loaded = peak.load(Artefact(folder, 1))
    prepared = loaded.prepare(np.zeros((peak.IMAGES_PER_THREAD, 1)))
    best = min(seconds({"peak": functools.partial(loaded.run, prepared)}, 200)["peak"])
    peak_gflops = 2e-9 * peak.MACS_PER_IMAGE * peak.IMAGES_PER_THREAD / best
    rows: list[dict[str, Any]] = []
    for side in sides:
        programs = {count: layers(channels, side, count) for count in (FEW, MANY)}
        built = {count: paths_of(compile_to(program, folder / f"{side}-{count}.so")) for count, program in programs.items()}
        image = images_of(programs[FEW], 1)
        for path in (name for name in built[FEW] if name != "portable"):
            runs = {str(count): functools.partial(libraries[path], image) for count, libraries in built.items()}
            taken = seconds(runs, rounds)
            layer = (statistics.median(taken[str(MANY)]) - statistics.median(taken[str(FEW)])) / (MANY - FEW)
            gflops = 2e-9 * channels * channels * 9 * side * side / layer
            rows.append({"side": side, "path": path, "layer_us": layer * 1e6, "effective_gflops": gflops})
    return [row | {"of_peak": row["effective_gflops"] / peak_gflops, "peak_gflops": peak_gflops} for row in rows]


def _memory_of(tiny: Path, file: Path) -> int:
    """In a fresh process: private bytes added by a library that is loaded and has run once."""
    for one in (tiny, file):
        before = read_memory_bytes()["Anonymous"]
        network = runtime.load(one)
        network(np.zeros(network.input_shape, np.uint8))
    return read_memory_bytes()["Anonymous"] - before


def memory(program: Program, repeats: int, folder: Path) -> dict[str, float]:
    """Bytes that loading and one run add to a fresh process, and what they are for."""
    tiny, file = compile_to(layers(8, 8, 2), folder / "tiny.so"), compile_to(program, folder / "memory.so")
    found = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found.append(pool.submit(_memory_of, tiny, file).result())
    network = runtime.load(file)
    return {
        "anonymous_bytes": statistics.median(found),
        "context_bytes": network.context_bytes,
        "workspace_bytes": network.workspace_bytes,
        "stored_bytes": program.stored_bytes,
        "live_bytes": live_bytes(program),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn14")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 16, 8, 4, 2], help="pixels of the layers that are timed")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes per reading of memory")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    program = lower(dacnn.create(options.network, width=options.width, num_classes=10, seed=0).eval())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table: dict[str, Any] = {
            "whole": whole(program, options.rounds, options.batch, folder),
            "scaling": scaling(program, options.rounds, options.batch, folder),
            "layers": sizes(options.width, options.sides, options.rounds, folder),
            "memory": memory(program, options.repeats, folder),
        }
    if options.json:
        print(json.dumps({**table, "cpu": cpu_name(), "onnxruntime": onnxruntime.__version__}, indent=2))
        return
    print(f"{options.network}, width {options.width}, ONNX Runtime {onnxruntime.__version__}, {cpu_name()}")
    for row in table["whole"]:
        print(
            f"batch {row['batch']:>3}, {row['threads']} thread(s) {row['path']:>12}: {row['image_ms']:7.3f} ms an image "
            f"(least {row['least_ms']:.3f}), {row['times_as_fast']:.2f}x as fast as ONNX Runtime"
        )
    single, one, two = (table["scaling"][name] for name in ("one_by_one", "1_threads", "2_threads"))
    print(
        f"batch {options.batch:>3} in turn: image by image {single:.3f}, one thread {one:.3f}, two threads {two:.3f} ms "
        f"an image: a batch takes {one / single:.2f}x the time of its images, two threads are {one / two:.2f}x as fast as one"
    )
    for row in table["layers"]:
        print(
            f"{options.width} channels at {row['side']:>2}x{row['side']:<2} {row['path']:>8}: {row['layer_us']:8.1f} us, "
            f"{row['effective_gflops']:6.1f} effective GFLOP/s, {row['of_peak']:.0%} of {row['peak_gflops']:.0f}"
        )
    print(", ".join(f"{name} {int(value):,}" for name, value in table["memory"].items()))


if __name__ == "__main__":
    main()

"""The loop form of an ONNX export against its plain one in ONNX Runtime: memory added and time.

A network with one kernel, and the same with a bank of templates. Each file is loaded in a default session with one thread.
Memory: private anonymous memory that loading and one run of one image add to a fresh process; beside it the bytes that the
network stores. Time: all sessions in turn within one process, with the same images; the ratio is the median, over the rounds,
of the ratio within a round.

    python benchmarks/onnx_loop.py --network dacnn14 --width 128
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

import dacnn
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.program import Program
from dacnn.deploy.roll import roll
from dacnn.measure.runtimes import artefact_memory
from dacnn.training.precision import cpu_name

FORMS = ("plain", "small", "fast")
SCHEMES: dict[str, dict[str, Any]] = {"one kernel": {"share": "all"}, "bank of 4": {"share": "template", "templates": 4}}


def write_forms(program: Program, folder: Path) -> dict[str, Path]:
    """The plain file and both loop forms."""
    rolled = roll(program)
    models = {
        "plain": to_onnx(program),
        "small": to_onnx_loop(rolled, form="small"),
        "fast": to_onnx_loop(rolled, form="fast"),
    }
    paths = {form: folder / f"{form}.onnx" for form in FORMS}
    for form, path in paths.items():
        onnx.save(models[form], path)
    return paths


def session(path: Path) -> onnxruntime.InferenceSession:
    """A default session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds_in_turn(paths: dict[str, Path], batch: int, side: int, rounds: int, runs: int) -> dict[str, list[float]]:
    """Seconds of a run in every round, the sessions one after the other."""
    sessions = {form: session(path) for form, path in paths.items()}
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    seconds: dict[str, list[float]] = {form: [] for form in paths}
    for _ in range(rounds):
        for form, runner in sessions.items():
            # once untimed: the caches hold what another session left there
            runner.run(None, {"images": images})
            begin = time.perf_counter()
            for _ in range(runs):
                runner.run(None, {"images": images})
            seconds[form].append((time.perf_counter() - begin) / runs)
    return seconds


def compare(program: Program, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for every form."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_forms(program, Path(folder))
        seconds = seconds_in_turn(paths, options.batch, program.input.height, options.rounds, options.runs)
        # in turn as well
        added = [{form: artefact_memory(path).anonymous_bytes for form, path in paths.items()} for _ in range(options.fresh)]
        file_bytes = {form: path.stat().st_size for form, path in paths.items()}
    return [
        {
            "form": form,
            "stored_bytes": program.stored_bytes,
            "file_bytes": file_bytes[form],
            "added_bytes": statistics.median(one[form] for one in added),
            "seconds": statistics.median(seconds[form]),
            "time_ratio": statistics.median(own / plain for own, plain in zip(seconds[form], seconds["plain"], strict=True)),
        }
        for form in FORMS
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn14")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="images of a timed run")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--runs", type=int, default=4, help="timed runs of a session in a round")
    parser.add_argument("--fresh", type=int, default=3, help="fresh processes in which the memory of a file is read")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for scheme, changes in SCHEMES.items():
        network = dacnn.create(options.network, width=options.width, seed=0, **changes).eval()
        rows += [{"scheme": scheme, **row} for row in compare(lower(network), options)]
    if options.json:
        print(json.dumps({"rows": rows, "cpu": cpu_name(), "onnxruntime": onnxruntime.__version__}, indent=2))
        return
    print(
        f"{options.network}, width {options.width}, batch {options.batch}, ONNX Runtime {onnxruntime.__version__}, {cpu_name()}"
    )
    for row in rows:
        added, stored, file = (row[name] / 1e6 for name in ("added_bytes", "stored_bytes", "file_bytes"))
        sizes = f"{added:6.2f} MB added ({stored:.2f} stored, file of {file:.2f})"
        print(f"{row['scheme']:>10}, {row['form']}: {sizes}, {1e3 * row['seconds']:6.2f} ms, {row['time_ratio']:.2f}x the time")


if __name__ == "__main__":
    main()

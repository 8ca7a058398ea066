"""How far every back end is from a trained network: largest error against float64, first guesses, top-1.

int8 is calibrated on train images, unless the network learnt its ranges.

python benchmarks/exactness.py runs/cifar128 --data cifar10 --images 10000
"""

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import dacnn
from dacnn.data.sources import load_test
from dacnn.deploy.c.build import build
from dacnn.deploy.c.integer_source import to_c_int8
from dacnn.deploy.c.source import CSource, to_c
from dacnn.deploy.export import integers_of
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.parity import compare, reference_logits
from dacnn.deploy.roll import roll
from dacnn.training.precision import cpu_name
from dacnn.training.run import calibration_images, data_of

BATCH = 100
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
Logits = NDArray[Any]


def back_ends(network: dacnn.Network, calibration: Tensor | None) -> Iterator[tuple[str, Callable[[Tensor], Logits]]]:
    """Every way to run the network, by name, on uint8 images."""
    import onnxruntime

    program = lower(network)
    models = {"onnx": to_onnx(program)}
    models |= {f"onnx-loop, {form}": to_onnx_loop(roll(program), form=form) for form in ("small", "fast")}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path = Path(folder) / "net.onnx"
            path.write_bytes(model.SerializeToString())
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            yield name, functools.partial(run_session, session)
        sources: dict[str, CSource] = {dtype: to_c(program, name="net", dtype=dtype) for dtype in DTYPES}
        sources["int8"] = to_c_int8(integers_of(network, calibration), name="net")
        for dtype, source in sources.items():
            path = Path(folder) / f"{dtype}.so"
            build(source, path)
            yield f"C, {dtype}", functools.partial(run_compiled, dacnn.runtime.load(path))
    for dtype in DTYPES:
        yield f"pack, {dtype}", functools.partial(run_packed, dacnn.pack(program, dtype=dtype, device="cpu"))


def run_session(session: Any, images: Tensor) -> Logits:
    logits: Logits = session.run(None, {"images": images.numpy()})[0]
    return logits


def run_compiled(compiled: Callable[[Logits], Logits], images: Tensor) -> Logits:
    return compiled(images.numpy())


def run_packed(packed: Callable[[Tensor], Tensor], images: Tensor) -> Logits:
    return packed(images).numpy()


def rows(network: dacnn.Network, images: Tensor, labels: Logits, calibration: Tensor | None) -> Iterator[dict[str, Any]]:
    """The reference, and a row for every back end."""
    reference = reference_logits(network, images)
    yield {"back_end": "float64", "top1": float((reference.argmax(1) == labels).mean())}
    for name, run in back_ends(network, calibration):
        logits = np.concatenate([run(part) for part in torch.split(images, BATCH)]).astype(np.float64)
        changed = int((logits.argmax(1) != reference.argmax(1)).sum())
        top1 = float((logits.argmax(1) == labels).mean())
        yield {"back_end": name, "top1": top1, "changed_guesses": changed, **compare(logits, reference).to_table()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", help="another data set than that of the run")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    network = dacnn.load(options.run)
    calibration, _ = calibration_images(options.run, network, options.data)
    found = load_test(data_of(options.run, options.data), network.input, network.classes)
    chosen = torch.arange(min(options.images, len(found)))
    table = list(rows(network, found.gather(chosen), found.labels[chosen].numpy(), calibration))
    if options.json:
        print(json.dumps({"rows": table, "cpu": cpu_name()}, indent=2))
        return
    print(f"{options.run}: {len(chosen)} test images, {cpu_name()}")
    print(f"{'':>17} {'top-1':>8} {'guesses changed':>16} {'largest error':>14} {'unexplained':>12}")
    for row in table:
        columns = ("changed_guesses", ">16"), ("max_error", ">14.1e"), ("unexplained", ">12")
        compared = " ".join(format(row[name], spec) for name, spec in columns if name in row)
        print(f"{row['back_end']:>17} {row['top1']:8.2%} {compared}".rstrip())


if __name__ == "__main__":
    main()

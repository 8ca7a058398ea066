"""A network as a WebAssembly module beside ONNX Runtime for the web, both in Node: what a browser downloads, and time.

They take turns, one thread, batch 1; times are medians. ONNX Runtime gets PyTorch's plain export, and its own WebAssembly file
counts as well; without --web, a folder where `npm install onnxruntime-web` was run, there are the modules alone.

    python benchmarks/browser.py --width 64 --web FOLDER
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path
from typing import Any, get_args

import torch

import dacnn
from dacnn.deploy.c.files import Dtype
from dacnn.training.precision import cpu_name

_TIMED = """
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
const { modules, web, onnx, rounds, pixels, size } = JSON.parse(readFileSync(process.argv[2]));
const image = Uint8Array.from(pixels), runs = {}, logits = {};
for (const [name, file] of Object.entries(modules)) {
  const network = await (await import(pathToFileURL(file))).load();
  runs[name] = async () => network.logits(image);
}
if (web) {
  const ort = await import(pathToFileURL(web));
  ort.env.wasm.numThreads = 1;
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(onnx)));
  const [given, result] = [session.inputNames[0], session.outputNames[0]];
  const tensor = new ort.Tensor("uint8", image, [1, ...size]);
  runs["onnxruntime-web"] = async () => (await session.run({ [given]: tensor }))[result].data;
}
const taken = Object.fromEntries(Object.keys(runs).map((name) => [name, []]));
for (let round = 0; round < rounds; round++)
  for (const [name, run] of Object.entries(runs)) {
    logits[name] = [...(await run())];
    const begin = performance.now();
    await run();
    taken[name].push(performance.now() - begin);
  }
console.log(JSON.stringify({ taken, logits, node: process.version }));
"""


class _Pixels(torch.nn.Module):
    """The network as ONNX Runtime gets it: from the same uint8 images."""

    def __init__(self, network: dacnn.Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network.logits(self.network.normalize(images))


def compare(name: str, width: int, rounds: int, web: Path | None, folder: Path) -> dict[str, Any]:
    network = dacnn.create(name, width=width, seed=0).eval()
    of = network.input
    size = (of.height, of.width, of.channels)
    images = torch.randint(0, 256, (64, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, Any]] = {}
    for dtype in get_args(Dtype):
        calibration = images if dtype == "int8" else None
        done = dacnn.export(network, "wasm", folder / f"{dtype}.wasm", dtype=dtype, calibration=calibration)
        loader = done.others[0].stat().st_size
        rows[dtype] = {"download_bytes": done.file_bytes + loader, "stored_bytes": done.stored_bytes}
    files: dict[str, str | None] = {"web": None, "onnx": None}
    if web:
        library = web / "node_modules" / "onnxruntime-web" / "dist"
        files = {"web": str(library / "ort.wasm.min.mjs"), "onnx": str(folder / "plain.onnx")}
        with warnings.catch_warnings():
            # the exporter's own, about packages that are not installed
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(_Pixels(network), (images[:1],), dynamo=True, verbose=False)
        assert exported is not None
        exported.save(folder / "plain.onnx")
        runtime = sum((library / part).stat().st_size for part in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"))
        rows["onnxruntime-web"] = {"download_bytes": runtime + (folder / "plain.onnx").stat().st_size}
    given = {
        "modules": {dtype: str(folder / f"{dtype}.mjs") for dtype in get_args(Dtype)},
        **files,
        "rounds": rounds,
        "pixels": images[0].flatten().tolist(),
        "size": size,
    }
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "timed.mjs").write_text(_TIMED)
    words = [shutil.which("node") or "node", "timed.mjs", "given.json"]
    told = json.loads(subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True).stdout)
    with torch.no_grad():
        expected = network(images[:1])[0]
    for row, found in rows.items():
        times = torch.tensor(told["taken"][row], dtype=torch.float64)
        found["median_ms"], found["least_ms"] = float(times.median()), float(times.min())
        found["error"] = float((torch.tensor(told["logits"][row]) - expected).abs().max() / expected.abs().max())
    return {"network": name, "width": width, "cpu": cpu_name(), "node": told["node"], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="dacnn14")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--web", type=Path, help="folder in which onnxruntime-web is installed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = compare(options.network, options.width, options.rounds, options.web, Path(folder).resolve())
    if options.json:
        print(json.dumps(table, indent=2))
        return
    print(f"{table['network']}, width {table['width']}, Node {table['node']}, {table['cpu']}")
    for name, row in table["rows"].items():
        print(
            f"{name:>16}: {row['download_bytes']:>12,} bytes to download, {row['median_ms']:7.2f} ms an image "
            f"(least {row['least_ms']:.2f}), at most {row['error']:.1e} of the largest logit apart"
        )
    if "onnxruntime-web" in table["rows"]:
        ours, theirs = table["rows"]["float32"], table["rows"]["onnxruntime-web"]
        print(
            f"float32 in {theirs['median_ms'] / ours['median_ms']:.2f}x less time, "
            f"{theirs['download_bytes'] / ours['download_bytes']:.0f}x fewer bytes"
        )


if __name__ == "__main__":
    main()

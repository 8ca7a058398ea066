"""A table of trainings, run one after another, resumably: what the README's results come from.

Call it again with the same `--out` and it goes on where it stopped: a run that is done is not repeated, one that was cut
off is resumed. With `--minutes` it stops by itself, with everything saved, so that a table fits a machine that is lent for a
while.

    python benchmarks/table.py cifar10-fast --data cifar10 --out runs/cifar10-fast
    python benchmarks/table.py cifar100-paper --data cifar100 --out runs/cifar100-paper --minutes 9
    python benchmarks/table.py schemes --data digits --out runs/schemes --png schemes.png
"""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dacnn
from dacnn.data.sources import load_test
from dacnn.draw import Point, draw_tradeoff
from dacnn.errors import Interrupted
from dacnn.progress import TrainingProgress
from dacnn.training.precision import best_device, cpu_name


@dataclass(frozen=True)
class Row:
    """One network of a table, trained under one recipe with several seeds."""

    label: str
    network: str
    seeds: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Rows under one recipe."""

    recipe: str
    rows: tuple[Row, ...]


_SCHEMES: dict[str, dict[str, Any]] = {
    "one kernel": {},
    "one a stage": {"share": "stage"},
    "2 templates": {"share": "template", "templates": 2},
    "4 templates": {"share": "template", "templates": 4},
    "repetition": {"share": "repeat"},
    "repetition of half the width": {"share": "repeat", "base_width": 32},
}


def _schemes(seeds: int, rival_width: int) -> tuple[Row, ...]:
    """Every scheme with and without pointwise regulators, which stand behind shared kernels only; and the unshared rivals."""
    rows = [Row("unshared", "dacnn14", seeds, settings={"share": "none"})]
    rows.append(Row("unshared, as few bytes", "dacnn14", seeds, settings={"share": "none", "width": rival_width}))
    for label, settings in _SCHEMES.items():
        rows.append(Row(label, "dacnn14", seeds, settings=settings))
        rows.append(Row(f"{label} + regulators", "dacnn14", seeds, settings=settings | {"regulator": "pointwise"}))
    return tuple(rows)


def _on_a_gpu(*networks: str) -> Table:
    """Networks as they are, in batches that fill a GPU."""
    return Table("paper", tuple(Row(name, name, seeds=1, settings={"batch_size": 512, "lr": 0.4}) for name in networks))


TABLES = {
    # the rivals' widths are the largest with which an unshared network stores no more than one kernel of width 64 does
    "schemes": Table("digits", _schemes(5, rival_width=18)),
    "cifar10-schemes": Table("fast", _schemes(2, rival_width=19)),
    "cifar10-fast": Table(
        "fast",
        (
            Row("shared", "dacnn14", seeds=2),
            Row("shared + pointwise regulators", "dacnn14-reg", seeds=2),
            Row("unshared twin", "dacnn14", seeds=2, settings={"share": "none"}),
        ),
    ),
    "digits": Table("digits", (Row("shared", "dacnn14", seeds=5),)),
    "cifar100-paper": _on_a_gpu("dacnn18", "dacnn18-mix-reg", "dacnn14", "dacnn18-reg", "dacnn14-mix", "dacnn34-mix-reg"),
    "cifar10-paper": _on_a_gpu("dacnn14", "dacnn14-reg", "dacnn18", "dacnn18-mix-reg"),
}


class Deadline(TrainingProgress):
    """Shows a training, and asks it to stop when the time is over."""

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until = until

    def stepped(self, epoch: int, step: int, steps: int, loss: float, top1: float) -> None:
        super().stepped(epoch, step, steps, loss, top1)
        if time.monotonic() > self.until:
            # as Ctrl-C would, so that the state is saved
            os.kill(os.getpid(), signal.SIGINT)
            self.until = float("inf")


def run_row(row: Row, recipe: str, data: str, seed: int, out: Path, until: float, settings: dict[str, Any]) -> dict[str, Any]:
    """Train one row with one seed, or go on with it, and measure it on the test images."""
    path = out / f"{row.label.replace(' ', '-')}-{seed}"
    measured = path / "test.json"
    if measured.is_file():
        return dict(json.loads(measured.read_text()))
    listener = Deadline(until)
    # what was compiled for the rows before counts against PyTorch's limit
    if best_device() == "cuda":
        torch.compiler.reset()
    try:
        chosen = {**row.settings, **settings, "seed": seed}
        result = dacnn.train(row.network, data=data, recipe=recipe, out=path, resume=path.is_dir(), listener=listener, **chosen)
    finally:
        listener.close()
    network = result.network.to(best_device())
    images = load_test(result.config.data, network.input, network.classes)
    evaluation = dacnn.evaluate(network, images)
    table = {
        "label": row.label,
        "seed": seed,
        "top1": evaluation.top1,
        "top5": evaluation.top5,
        "images": evaluation.images,
        "epochs": result.config.training.epochs,
        "seconds": sum(record.seconds for record in result.records),
        "images_per_second": statistics.median(record.images_per_second for record in result.records),
        **dacnn.count(network).to_table(),
    }
    measured.write_text(json.dumps(table, indent=2) + "\n")
    return table


def results(
    table: Table, data: str, out: Path, minutes: float, seeds: int | None, settings: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Every run of a table, seed by seed, until the time is over."""
    until = time.monotonic() + 60 * minutes
    for seed in range(max(row.seeds for row in table.rows)):
        for row in table.rows:
            if seed < min(row.seeds, seeds or row.seeds):
                try:
                    yield run_row(row, table.recipe, data, seed, out, until, settings)
                except Interrupted as stop:
                    print(stop, file=sys.stderr)
                    return


def markdown(table: Table, measured: list[dict[str, Any]]) -> Iterator[str]:
    """The table as lines of Markdown: mean and range over the seeds."""
    yield "| | top-1 on the test images | seeds | stored | used | images/s |"
    yield "|---|---|---|---|---|---|"
    for row in table.rows:
        runs = [result for result in measured if result["label"] == row.label]
        if not runs:
            yield f"| {row.label} | not run | 0 | | | |"
            continue
        top1 = [100 * result["top1"] for result in runs]
        spread = f" ({min(top1):.2f} to {max(top1):.2f})" if len(top1) > 1 else ""
        speed = statistics.median(result["images_per_second"] for result in runs)
        sizes = f"{runs[0]['stored_parameters']:,} | {runs[0]['used_parameters']:,}"
        yield f"| {row.label} | {statistics.mean(top1):.2f} %{spread} | {len(top1)} | {sizes} | {speed:,.0f} |"


def points(table: Table, measured: list[dict[str, Any]]) -> list[Point]:
    """Every row as a point of the picture."""
    runs = {row.label: [result for result in measured if result["label"] == row.label] for row in table.rows}
    return [
        Point(label, found[0]["stored_bytes"], tuple(result["top1"] for result in found))
        for label, found in runs.items()
        if found
    ]


def main() -> None:
    """Run a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", required=True, help="data set, as `dacnn train --data` takes it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long, everything saved")
    parser.add_argument("--epochs", type=int, help="instead of the recipe's, to try the script out")
    parser.add_argument("--width", type=int, help="instead of the recipe's, to try the script out")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="only these rows")
    parser.add_argument("--seeds", type=int, help="at most so many seeds a row")
    parser.add_argument("--png", type=Path, help="draw accuracy against stored bytes into this file")
    parser.add_argument("--json", action="store_true", help="print the runs instead of a table")
    options = parser.parse_args()
    table = TABLES[options.table]
    if options.only:
        labels = [row.label for row in table.rows]
        if unknown := sorted(set(options.only) - set(labels)):
            parser.error(f"--only: no row '{unknown[0]}': expected some of {', '.join(labels)}")
        table = Table(table.recipe, tuple(row for row in table.rows if row.label in options.only))
    settings = {name: getattr(options, name) for name in ("epochs", "width") if getattr(options, name)}
    measured = list(results(table, options.data, options.out, options.minutes, options.seeds, settings))
    if options.png:
        draw_tradeoff(points(table, measured), options.png)
    if options.json:
        print(json.dumps(measured, indent=2))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    print(f"{options.table}: recipe {table.recipe}, {device}, PyTorch {torch.__version__}, dacnn {dacnn.__version__}\n")
    print("\n".join(markdown(table, measured)))


if __name__ == "__main__":
    main()

"""Results as a person reads them in a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dacnn.config import TrainingConfig
from dacnn.measure.count import Counts
from dacnn.networks.plan import Plan
from dacnn.prediction import Prediction
from dacnn.training.evaluate import Evaluation
from dacnn.training.precision import Execution
from dacnn.training.train import TrainResult


def show(content: RenderableType) -> None:
    """Print on standard output, as wide as the terminal is."""
    Console().print(content, highlight=False)


def _table(title: str, *left: str, right: Iterable[str] = ()) -> Table:
    """An empty table; the columns on the right hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0, title=title or None, title_justify="left")
    for heading in left:
        table.add_column(heading)
    for heading in right:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def training_summary(result: TrainResult, counts: Counts) -> RenderableType:
    """Where the run is, what it reached, what to do next."""
    table = Table.grid(padding=(0, 2))
    table.add_row("run", str(result.run))
    if result.best.validation_top1 is not None:
        table.add_row("validation top-1", f"{result.best.validation_top1:.2%} (epoch {result.best.epoch})")
    table.add_row("parameters", f"{counts.stored_parameters:,} stored, {counts.used_parameters:,} used")
    table.add_row("weights", f"{result.weights} ({result.weights.stat().st_size:,} bytes)")
    table.add_row("next", f"dacnn eval {result.run}")
    return table


def evaluation_table(result: Evaluation, source: str, counts: Counts) -> RenderableType:
    """Every class, and all of them together."""
    table = _table(f"{source}: {result.images:,} test images", "class", right=("images", "recall", "precision"))
    for row in result.per_class():
        shares = ("-" if row[name] is None else f"{row[name]:.2%}" for name in ("recall", "precision"))
        table.add_row(Text(row["class"]), f"{row['images']:,}", *shares)
    together = f"top-1 {result.top1:.2%}   top-5 {result.top5:.2%}   loss {result.loss:.4f}"
    return Group(table, f"{together}   parameters {counts.stored_parameters:,} stored, {counts.used_parameters:,} used")


def prediction_table(predictions: Iterable[Prediction]) -> RenderableType:
    """An image a row: the likeliest class, and those behind it."""
    table = _table("", "image", "class", "probability", "then")
    for prediction in predictions:
        (first, probability), *others = zip(prediction.classes, prediction.probabilities, strict=True)
        then = ", ".join(f"{name} {share:.1%}" for name, share in others)
        table.add_row(Text(str(prediction.path)), Text(first), f"{probability:.1%}", Text(then))
    return table


def zoo_table(rows: Iterable[Mapping[str, Any]], classes: int) -> RenderableType:
    """A network a row: its shape and its counts."""
    headings = ("stored", "used", "MACs")
    table = _table(f"{classes} classes, 3 x 32 x 32", "name", "topology", "depths", "widths", right=headings)
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        depths, widths = "-".join(map(str, row["depths"])), "-".join(map(str, dict.fromkeys(row["widths"])))
        numbers = (f"{row['stored_parameters']:,}", f"{row['used_parameters']:,}", f"{row['macs'] / 1e6:,.0f} M")
        table.add_row(row["name"], row["topology"], depths, widths, *numbers)
    return table


def plan_table(plan: Plan, counts: Counts) -> RenderableType:
    """A kernel a row: its shape and who reads it; and the counts of the network."""
    table = _table(plan.name, "kernel", "shape", right=("parameters", "readers"))
    table.add_column("read by")
    shapes = plan.kernels()
    for name, layers in plan.readers().items():
        kinds = sorted({layer.regulator.kind for layer in layers if layer.regulator})
        behind = f" (+ {', '.join(kinds)})" if kinds else ""
        output, inputs, rows, columns = shapes[name]
        readers = ", ".join(layer.name for layer in layers)
        size = f"{output * inputs * rows * columns:,}"
        table.add_row(name, f"{output}x{inputs}x{rows}x{columns}", size, str(len(layers)), readers + behind)
    used = f"{counts.used_parameters:,} used ({counts.used_parameters / counts.stored_parameters:.1f}x)"
    work = f"{counts.macs / 1e6:,.1f} M multiply-adds an image, {counts.stored_bytes:,} bytes in float32"
    return Group(table, f"{counts.stored_parameters:,} parameters stored, {used}, {work}")


def count_table(columns: Sequence[Mapping[str, Any]], training: TrainingConfig, execution: Execution) -> RenderableType:
    """A network a column: what it stores and computes, what a training of it takes."""
    table = _table(columns[0]["name"], "", right=[f"{column['role']}\nwidth {column['width']}" for column in columns])
    rows = {
        "stored parameters": "stored_parameters",
        "used parameters": "used_parameters",
        "bytes in float32": "stored_bytes",
        "bytes in bfloat16": "bfloat16_bytes",
        "bytes in int8": "int8_bytes",
        "multiply-adds": "macs",
        "activation bytes": "activation_peak_bytes",
    }
    for label, name in rows.items():
        table.add_row(label, *(f"{column[name]:,}" for column in columns))
    table.add_section()
    memory = [column["training"] for column in columns]
    parts = {"weights": "weight", "gradients": "gradient", "optimiser": "optimizer", "activations": "activation"}
    for label, name in (parts | {"operators": "workspace", "peak": "peak", "measured": "measured_peak"}).items():
        if f"{name}_bytes" in memory[0]:
            table.add_row(f"{label}, MB", *(f"{column[f'{name}_bytes'] / 1e6:,.2f}" for column in memory))
    if "ratio" in memory[0]:
        table.add_row("peak / measured", *(f"{column['ratio']:.3f}" for column in memory))
    step = f"batch {training.batch_size}, {training.optimizer}, {execution.precision}, {execution.memory_format}"
    where = f"{execution.device}, {execution.threads} thread(s)"
    return Group(table, f"activation bytes: one image, no gradients; MB: training at its worst moment, {step}, {where}")

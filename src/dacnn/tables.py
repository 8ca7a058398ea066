"""Results as a person reads them in a terminal."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dacnn.bench.results import Bench, Row
from dacnn.config import TrainingConfig
from dacnn.deploy.export import Exported
from dacnn.measure.audit import Audit, Kernel
from dacnn.measure.count import Counts
from dacnn.measure.memory_added import MemoryAdded
from dacnn.measure.process import Held
from dacnn.measure.proposals import UNSHARED, Proposal
from dacnn.networks.adapted import Adapted
from dacnn.networks.factory import is_factory
from dacnn.networks.fold import Bank, Fold
from dacnn.networks.plan import Plan
from dacnn.prediction import Prediction
from dacnn.sharing.anchors import Combine, Repeat
from dacnn.training.evaluate import Evaluation
from dacnn.training.precision import Execution
from dacnn.training.train import TrainResult


def show(content: RenderableType) -> None:
    """Print on standard output, as wide as the terminal is."""
    Console().print(content, highlight=False)


def show_json(content: object) -> None:
    """Print one JSON value on standard output."""
    print(json.dumps(content, indent=2, default=str, ensure_ascii=False))


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
    table.add_row("next", _next_step(result))
    return table


def _next_step(result: TrainResult) -> str:
    name = result.config.network.name
    if is_factory(name):
        return f"dacnn eval {result.run} --into {name}"
    return f"dacnn.load('{result.run}', into=module)" if isinstance(result.network, Adapted) else f"dacnn eval {result.run}"


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
    table.add_column("read by", overflow="fold")
    shapes = plan.kernels()
    for name, layers in plan.readers().items():
        kinds = sorted({layer.regulator.kind for layer in layers if layer.regulator})
        behind = f" (+ {', '.join(kinds)})" if kinds else ""
        how = {Combine: " (combined)", Repeat: " (tiled)"}.get(type(layers[0].expression), "")
        readers = ", ".join(layer.name for layer in layers)
        size = f"{math.prod(shapes[name]):,}"
        table.add_row(name + how, "x".join(map(str, shapes[name])), size, str(len(layers)), readers + behind)
    used = f"{counts.used_parameters:,} used ({counts.used_parameters / counts.stored_parameters:.1f}x)"
    work = f"{counts.macs / 1e6:,.1f} M multiply-adds an image, {counts.stored_bytes:,} bytes in float32"
    return Group(table, f"{counts.stored_parameters:,} parameters stored, {used}, {work}")


def conversion_table(network: Adapted, counts: Counts) -> RenderableType:
    """A shared kernel a row: its shape and who reads it; what cannot share, and why; and the counts of the network."""
    conversion = network.conversion
    table = _table(type(network.module).__name__, "kernel", "shape", right=("parameters", "readers"))
    table.add_column("read by", overflow="fold")
    behind = f" (+ {conversion.regulator})" if conversion.regulator else ""
    for name, readers in conversion.groups.items():
        assert network.owner is not None
        shape = tuple(network.owner[name].shape)
        size = f"{math.prod(shape):,}"
        table.add_row(name, "x".join(map(str, shape)), size, str(len(readers)), ", ".join(readers) + behind)
    refused = [Text(f"{name}: not shared, it {reason}") for name, reason in conversion.refused.items()]
    used = f"{counts.used_parameters:,} used ({counts.used_parameters / counts.stored_parameters:.1f}x)"
    work = f"{counts.macs / 1e6:,.1f} M multiply-adds an image, {counts.stored_bytes:,} bytes in float32"
    return Group(table, *refused, f"{counts.stored_parameters:,} parameters stored, {used}, {work}")


def proposal_table(name: str, proposals: Iterable[Proposal]) -> RenderableType:
    """A way of sharing a row."""
    found = list(proposals)
    unshared = next(proposal.stored_bytes for proposal in found if proposal.settings == UNSHARED)
    table = _table(name, "share", right=("kernels", "layers", "parameters", "bytes", "of unshared"))
    for proposal in found:
        numbers = (proposal.kernels, proposal.readers, proposal.stored_parameters, proposal.stored_bytes)
        share = f"{proposal.stored_bytes / unshared:.1%}"
        table.add_row(proposal.flags, *(f"{number:,}" for number in numbers), share)
    return table


def fold_table(banks: Iterable[Bank], done: Fold, measured: Sequence[tuple[Evaluation, Counts]]) -> RenderableType:
    """How alike the readers of each bank are, who reads what after folding, and what it cost."""
    parts: list[RenderableType] = []
    for bank in banks:
        table = _table(f"{bank.name}: cosine between kernels", "layer", right=[str(index) for index in range(len(bank.layers))])
        for index, (name, row) in enumerate(zip(bank.layers, bank.similarity.tolist(), strict=True)):
            table.add_row(f"{index} {name}", *(f"{value:.2f}" for value in row))
        parts.append(table)
    table = _table("folded", "kernel", "read by", right=("largest error",))
    for name, layers in done.groups.items():
        table.add_row(name, ", ".join(layers), f"{max(done.errors[layer] for layer in layers):.1%}")
    (before, counts_before), (after, counts_after) = measured
    accuracy = f"top-1 {before.top1:.2%} before, {after.top1:.2%} after"
    sizes = f"{counts_before.stored_parameters:,} parameters stored before, {counts_after.stored_parameters:,} after"
    return Group(*parts, table, f"{accuracy} ({before.images:,} test images)   {sizes}")


def audit_table(audit: Audit, memory: MemoryAdded | None, held: Sequence[Held] = ()) -> RenderableType:
    """A kernel a row, then where the copies of each are, then what made them."""
    headings = ("copies", "bytes", "wasted")
    table = _table(escape(f"{audit.artefact} ({audit.format})"), "kernel", "shape", right=headings)
    for kernel in audit.kernels:
        shape = "x".join(map(str, kernel.copies[0].shape))
        numbers = (str(len(kernel.copies)), f"{sum(copy.nbytes for copy in kernel.copies):,}", f"{kernel.wasted_bytes:,}")
        table.add_row(Text(kernel.name), shape, *numbers)
    parts: list[RenderableType] = [table, ""]
    parts += [_copies_table(kernel) for kernel in audit.kernels if kernel.hazard]
    missing = "missing: the artefact does not hold the reference's kernel {}"
    if audit.format == "bytes":
        missing = "missing: {} was not found among the bytes; it may be compressed, transformed or in an unknown order"
    parts += [Text(missing.format(name)) for name in audit.missing]
    if audit.unsearched:
        names = ", ".join(audit.unsearched)
        parts.append(Text(f"not looked for: {names}; they hold hardly two signs, and cannot be told from other bytes"))
    parts += [Text(f"{hazard.name}: {hazard.what} {hazard.remedy}") for hazard in audit.hazards]
    if audit.single:
        parts.append("Every kernel is stored once.")
    elif audit.wasted_bytes:
        parts.append(f"{audit.wasted_bytes:,} of {audit.kernel_bytes:,} bytes of kernels are copies.")
    if memory is not None:
        resident = f"{memory.resident_bytes:,} resident with mapped files"
        parts.append(Text(f"memory added: {memory.anonymous_bytes:,} private anonymous bytes, {resident} ({memory.loaded})"))
    parts += [Text(_held_line(kernel)) for kernel in held]
    return Group(*parts)


def _held_line(held: Held) -> str:
    """How often a kernel is in memory, and in which forms."""
    if held.count == 0:
        return f"in memory: {held.name} in no order or form that is known"
    forms = "; ".join(", ".join(words) for words in held.differences)
    times = "once" if held.count == 1 else f"{held.count} times"
    return f"in memory: {held.name} {times}, {held.nbytes:,} bytes ({forms})"


def _copies_table(kernel: Kernel) -> RenderableType:
    """Where the copies of one kernel are, and how each differs."""
    table = _table(
        "", f"copies of {kernel.name}" if not kernel.altered else f"not the reference's {kernel.name}", "where", "difference"
    )
    for copy in kernel.copies:
        words = [word for word in copy.difference if word != copy.layout] + ([copy.layout] if copy.layout else [])
        words = [word for word in words if word != "exact" or len(words) == 1]
        table.add_row(Text(" = ".join(copy.names)), Text(copy.place), ", ".join(words))
    return Group(table, "")


def _headed(role: str, width: int | None) -> str:
    return role if width is None else f"{role}\nwidth {width}"


def count_table(columns: Sequence[Mapping[str, Any]], training: TrainingConfig, execution: Execution) -> RenderableType:
    """A network a column: what it stores and computes, what a training of it takes."""
    table = _table(columns[0]["name"], "", right=[_headed(column["role"], column["width"]) for column in columns])
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


def export_table(done: Exported, compared_on: str, ranges_from: str | None = None) -> RenderableType:
    """What was written, and how far it is from the network."""
    table = Table.grid(padding=(0, 2))
    table.add_row("file", Text(f"{done.path} ({done.target})"))
    table.add_row("bytes", f"{done.file_bytes:,} (parameters and buffers in float32: {done.stored_bytes:,})")
    if done.others:
        table.add_row("beside it", Text(", ".join(path.name for path in done.others)))
    if done.workspace_bytes is not None:
        table.add_row("memory", f"{done.workspace_bytes:,} bytes a call, {done.context_bytes:,} bytes once")
    if done.footprint is not None:
        size = done.footprint
        table.add_row(size.target, f"{size.flash_bytes:,} bytes of flash, {size.ram_bytes:,} bytes of RAM and the stack")
    if ranges_from is not None:
        table.add_row("int8 ranges", Text(ranges_from))
    table.add_row("compared on", Text(compared_on))
    table.add_row("largest error", f"{done.parity.max_error:.1e} of the largest logit, against float64")
    table.add_row("same first guess", f"{done.parity.top1_agreement:.2%}")
    return table


def bench_table(bench: Bench) -> RenderableType:
    """A contender a row, the shared network's first; then what was measured, where, and who could not run."""
    headings = ["file kB", "memory MB\n(copies)"]
    for batch in bench.batches:
        headings += [f"batch {batch}\nms", "\n±", "of\npeak"]
    table = _table(escape(f"{bench.network}: {bench.cpu}"), "", right=(*headings, "top-1", "error"))
    table.columns[0].overflow = "fold"
    for side in dict.fromkeys(row.side for row in bench.rows):
        table.add_section()
        table.add_row(Text({"shared": "shared", "twin": "unshared twin"}[side], style="bold"))
        for row in bench.rows:
            if row.side == side and row.failure is None:
                table.add_row(row.contender.name, *_bench_figures(row))
    lines = [f"{row.contender.name} ({row.side}): {row.failure}" for row in bench.rows if row.failure is not None]
    lines += [f"no unshared twin: {bench.twin}"] if bench.twin else []
    compared = f"top-1 and error against float64 on {bench.source}"
    timed = f"{bench.threads} thread(s), medians of {bench.rounds} round(s), ±: half of what lies between the extreme ones"
    peak = f"peak {bench.peak_macs_per_second / 1e9:,.1f} G multiply-adds a second in float32"
    lines += ["", f"{timed}; {compared}; {bench.macs / 1e6:,.1f} M multiply-adds an image, {peak}"]
    return Group(table, *map(Text, lines))


def _bench_figures(row: Row) -> list[str]:
    memory = "-" if row.memory_bytes is None else f"{row.memory_bytes / 1e6:,.1f}"
    copies = "" if row.kernel_copies is None else f" ({row.kernel_copies})"
    cells = [f"{(row.file_bytes or 0) / 1e3:,.0f}", memory + copies]
    for latency in row.latencies:
        spread = (latency.high_seconds - latency.low_seconds) / 2 / latency.seconds
        cells += [f"{1e3 * latency.seconds:,.2f}", f"{spread:.0%}", f"{latency.peak_share:.0%}"]
    return [*cells, f"{row.top1_agreement:.1%}", f"{row.max_error:.0e}"]

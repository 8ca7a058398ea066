"""Pictures: who reads which kernel, what is taken for what, and what memory and time it takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import LogFormatter

from dacnn.bench.results import Bench
from dacnn.checkpoint import check_place, replacing
from dacnn.errors import ConfigError
from dacnn.networks.plan import Layer, Plan
from dacnn.training.evaluate import Evaluation

_FORMATS = ("png", "svg", "pdf")
_OWN = "#d9d9d9"


def check_picture(path: Path) -> str:
    """Refuse a picture that could not be written in the end.

    Args:
        path: The file.

    Returns:
        The format that its ending names.

    Raises:
        ConfigError: The ending is another one.
        CheckpointError: No file can stand there.
    """
    ending = path.suffix.lower().removeprefix(".")
    if ending not in _FORMATS:
        raise ConfigError(f"{path}: a picture ends in one of {', '.join('.' + ending for ending in _FORMATS)}")
    check_place(path)
    return ending


def _save(figure: Figure, path: Path) -> None:
    ending = check_picture(path)
    with replacing(path) as beside:
        figure.savefig(beside, format=ending, dpi=150, bbox_inches="tight")


@dataclass(frozen=True)
class Point:
    """A network in a picture of accuracy against size.

    Attributes:
        label: What it is.
        stored_bytes: Its size.
        top1: Share of the test images that it finds, one for each seed.
    """

    label: str
    stored_bytes: int
    top1: tuple[float, ...]


def draw_tradeoff(points: Sequence[Point], path: Path) -> None:
    """Draw accuracy against stored bytes: a dot the mean, a line from the worst seed to the best.

    Args:
        points: The networks.
        path: The picture, `.png`, `.svg` or `.pdf`.

    Raises:
        ConfigError: The ending is another one.
        CheckpointError: The file cannot be written.
    """
    figure = Figure(figsize=(8.5, 4.8))
    axes = figure.add_subplot()
    palette = colormaps["tab20"]
    for index, point in enumerate(sorted(points, key=lambda point: point.stored_bytes)):
        mean, low, high = (100 * value for value in (sum(point.top1) / len(point.top1), min(point.top1), max(point.top1)))
        axes.errorbar(
            point.stored_bytes / 1000,
            mean,
            yerr=[[mean - low], [high - mean]],
            fmt="o",
            color=palette(index % 20),
            capsize=3,
            label=f"{point.label}: {point.stored_bytes / 1000:,.0f} kB, {mean:.2f} %",
        )
    axes.set_xscale("log")
    axes.set_xlabel("stored bytes in float32, kB")
    axes.set_ylabel("top-1 on the test images, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def draw_plan(plan: Plan, path: Path) -> None:
    """Draw a plan: its layers from left to right, a row a stage, each in the colour of the kernel it reads.

    Args:
        plan: The plan.
        path: The picture, `.png`, `.svg` or `.pdf`.

    Raises:
        ConfigError: The ending is another one.
        CheckpointError: The file cannot be written.
    """
    shared = [name for name, readers in plan.readers().items() if len(readers) > 1]
    palette = colormaps["tab10"]
    colours = {name: palette(index % 10) for index, name in enumerate(shared)}
    rows: list[tuple[str, list[list[Layer]]]] = [("stem", [[plan.stem]])]
    height_px, width_px = plan.input.height, plan.input.width
    for index, stage in enumerate(plan.stages):
        blocks = [[*block.layers, *([block.shortcut] if block.shortcut else [])] for block in stage.blocks]
        rows.append((f"stage {index}\n{height_px}x{width_px}", blocks))
        if stage.pool:
            height_px, width_px = height_px // 2, width_px // 2
    columns = max(sum(len(block) for block in blocks) + 0.3 * (len(blocks) - 1) for _, blocks in rows)
    anchors_x = columns + 1.2
    figure = Figure(figsize=(1.1 + 0.62 * (columns + 3.2), 0.8 + 0.72 * max(len(rows), len(shared) + 1)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    height = len(rows)
    anchor_y = {name: (height - 1) * (1 - (index + 0.5) / max(len(shared), 1)) for index, name in enumerate(shared)}
    for row, (label, blocks) in enumerate(rows):
        y = height - 1 - row
        axes.text(-0.3, y, label, ha="right", va="center", fontsize=9)
        x: float = 0
        for block in blocks:
            for layer in block:
                _draw_layer(axes, layer, x, y, colours.get(layer.anchor, _OWN))
                x += 1
            x += 0.3
        for name in {layer.anchor for block in blocks for layer in block} & anchor_y.keys():
            # from the owner to the row of its readers: the kernel itself stands in one place
            axes.plot([anchors_x, x - 0.45], [anchor_y[name], y], color=colours[name], lw=1.2, alpha=0.6, zorder=0)
    for name, middle in anchor_y.items():
        shape = plan.kernels()[name]
        axes.add_patch(FancyBboxPatch((anchors_x, middle - 0.33), 1.7, 0.66, boxstyle="round,pad=0.05", color=colours[name]))
        text = f"{name}\n{'x'.join(map(str, shape))}\n{len(plan.readers()[name])} readers"
        axes.text(anchors_x + 0.85, middle, text, ha="center", va="center", fontsize=7.5, color="white")
    axes.set_title(f"{plan.name}: {sum(1 for _ in plan.layers())} convolutions, {len(plan.kernels())} kernels", fontsize=11)
    axes.set_xlim(-1.6, anchors_x + 2.2)
    axes.set_ylim(-0.7, height - 0.3)
    _save(figure, path)


def _draw_layer(axes: object, layer: Layer, x: float, y: float, colour: object) -> None:
    """One convolution; a dark edge and a letter mark a regulator."""
    regulated = layer.regulator is not None
    box = FancyBboxPatch(
        (x, y - 0.28),
        0.74,
        0.56,
        boxstyle="round,pad=0.04",
        facecolor=colour,
        edgecolor="black" if regulated else "white",
        lw=1.2,
    )
    axes.add_patch(box)  # type: ignore[attr-defined]
    below = (
        f"\n+{layer.regulator.kind}"
        if layer.regulator
        else f"\n{layer.kernel_size}x{layer.kernel_size}" * (layer.kernel_size != 3)
    )
    text = f"{layer.in_channels}\n→{layer.out_channels}{below}"
    size = 5.5 if regulated else 7
    axes.text(x + 0.37, y, text, ha="center", va="center", fontsize=size, color="black" if colour == _OWN else "white")  # type: ignore[attr-defined]


def draw_confusion(evaluation: Evaluation, path: Path) -> None:
    """Draw a confusion matrix: rows the true classes, columns the guesses, shares of each row.

    Args:
        evaluation: The measurement.
        path: The picture, `.png`, `.svg` or `.pdf`.

    Raises:
        ConfigError: The ending is another one.
        CheckpointError: The file cannot be written.
    """
    counts = evaluation.confusion.numpy()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    classes = len(evaluation.classes)
    side = max(4.0, min(0.42 * classes, 14.0))
    figure = Figure(figsize=(side + 1.6, side + 0.8))
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046, pad=0.04)
    size = 9 if classes <= 20 else max(2.5, 200 / classes)
    axes.set_xticks(range(classes), evaluation.classes, rotation=90, fontsize=size)
    axes.set_yticks(range(classes), evaluation.classes, fontsize=size)
    axes.set_xlabel("guess")
    axes.set_ylabel("true class")
    axes.set_title(f"top-1 {evaluation.top1:.2%} of {evaluation.images:,} images")
    if classes <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=colour)
    _save(figure, path)


def draw_bench(bench: Bench, path: Path) -> None:
    """Draw memory against the latency of the smallest batch: a dot the shared network, a ring its twin, a line between them.

    Args:
        bench: The measurements; contenders that failed, and all where memory is not told, are left out.
        path: The picture, `.png`, `.svg` or `.pdf`.

    Raises:
        ConfigError: The ending is another one.
        CheckpointError: The file cannot be written.
    """
    figure = Figure(figsize=(8.5, 4.8))
    axes = figure.add_subplot()
    palette = colormaps["tab20"]
    names = list(dict.fromkeys(row.contender.name for row in bench.rows))
    places: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for row in bench.rows:
        if row.memory_bytes is None or not row.latencies:
            continue
        latency = min(row.latencies, key=lambda latency: latency.batch)
        # what adds nothing, or less, stands at a page: the axis has no zero
        x, y = max(row.memory_bytes, 4096) / 1e6, 1e3 * latency.seconds
        spread = [[y - 1e3 * latency.low_seconds], [1e3 * latency.high_seconds - y]]
        colour = palette(names.index(row.contender.name) % 20)
        shared = row.side == "shared"
        label = f"{row.contender.name}: {x:,.1f} MB, {y:,.2f} ms" if shared else None
        fill = colour if shared else "white"
        axes.errorbar(x, y, spread, fmt="o", color=colour, markerfacecolor=fill, capsize=2, elinewidth=0.8, label=label)
        places[row.contender.name].append((x, y))
    for index, name in enumerate(names):
        if len(places[name]) == 2:
            axes.plot(*zip(*places[name], strict=True), color=palette(index % 20), lw=0.7, zorder=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(LogFormatter())
        # 3, 4 and 6 instead of powers of ten, of which few decades have any
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("private memory added by loading it, MB")
    axes.set_ylabel(f"latency at batch {min(bench.batches)}, ms")
    axes.set_title(f"{bench.network}, {bench.cpu}, {bench.threads} thread(s): filled shared, hollow twin", fontsize=9)
    axes.grid(alpha=0.3, which="both")
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)

"""The command that measures every back end of a trained network beside its peers.

Nothing that imports torch is imported before the command needs it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional

from dacnn.errors import ConfigError, DacnnError
from dacnn.flags import Into, Json, RunPath, Source, word

if TYPE_CHECKING:
    from torch import Tensor

    from dacnn.networks.classifier import Classifier


def bench(
    run: Positional[RunPath],
    /,
    *,
    threads: Annotated[int, word("threads of each contender", "INT")] = 1,
    batch: Annotated[tuple[int, ...], word("batch sizes", "INT ...")] = (1, 32),
    rounds: Annotated[int, word("how often each contender has its turn", "INT")] = 7,
    only: Annotated[tuple[str, ...], word("contenders, by name (default: all)", "NAME ...")] = (),
    data: Source = None,
    images: Annotated[int, word("most test images that the outputs are compared on", "INT")] = 512,
    into: Into = None,
    png: Annotated[Path | None, word("draw memory against latency into this file", "FILE")] = None,
    json: Json = False,
) -> None:
    """Measure every back end and its peers, with the shared network and its unshared twin, in one table.

    File bytes, memory added to a fresh process, latency, share of the machine's peak, outputs against float64.

    Example: dacnn bench runs/first --only dacnn-onnx onnxruntime ncnn --png bench.png
    """
    from dacnn import tables
    from dacnn.bench.measuring import Settings, run_bench
    from dacnn.checkpoint import load
    from dacnn.draw import check_picture, draw_bench
    from dacnn.progress import bar

    settings = Settings(threads, batch, rounds, only, into)
    if images < 1:
        raise ConfigError(f"--images is {images}: expected 1 or more")
    if png:
        # before minutes of work
        check_picture(png)
    network = load(run, into)
    images_nhwc, source = _images(run, network, data, images)
    found = run_bench(network, images_nhwc, source, settings, bar)
    if png:
        draw_bench(found, png)
    if json:
        tables.show_json(found.to_table())
    else:
        tables.show(tables.bench_table(found))


def _images(run: Path, network: "Classifier", source: str | None, most: int) -> "tuple[Tensor, str]":
    """Some of the test images, from all over the set; where it is not named and cannot be read, noise."""
    import torch

    from dacnn.data.sources import load_test
    from dacnn.progress import bar
    from dacnn.training.run import data_of

    try:
        config = data_of(run, source)
        with bar("loading") as tick:
            found = load_test(config, network.input, network.classes, progress=lambda what, done, total: tick(done, total))
    except DacnnError:
        if source is not None:
            raise
        of = network.input
        size, generator = (most, of.height, of.width, of.channels), torch.Generator().manual_seed(0)
        return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator), "noise"
    # a set may be sorted by class
    indices = torch.linspace(0, len(found) - 1, min(most, len(found))).round().long()
    return found.gather(indices), config.source

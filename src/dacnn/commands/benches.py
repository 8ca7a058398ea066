"""The command that measures every back end of a trained network beside its peers.

Nothing that imports torch is imported before the command needs it.
"""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from dacnn.errors import ConfigError
from dacnn.flags import Into, Json, RunPath, Source, word


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
    from dacnn.bench.measuring import run_bench
    from dacnn.bench.settings import Settings
    from dacnn.checkpoint import load
    from dacnn.draw import check_picture, draw_bench
    from dacnn.progress import bar
    from dacnn.training.run import some_images

    settings = Settings(threads, batch, rounds, only, into)
    if images < 1:
        raise ConfigError(f"--images is {images}: expected 1 or more")
    if png:
        # before minutes of work
        check_picture(png)
    network = load(run, into)
    with bar("loading") as tick:
        compared, what = some_images(run, network, images, data, progress=lambda what, done, total: tick(done, total))
    found = run_bench(network, compared, what, settings, bar)
    if png:
        draw_bench(found, png)
    if json:
        tables.show_json(found.to_table())
    else:
        tables.show(tables.bench_table(found))

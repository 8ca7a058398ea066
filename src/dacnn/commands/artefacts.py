"""Commands that write a network for other runtimes, and that examine what was written.

Nothing that imports torch is imported before a command needs it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, arg

from dacnn.flags import Into, Json, RunPath, Source, TestFlags, settings_of, word


def export(
    run: Positional[RunPath],
    /,
    *,
    to: Annotated[Literal["onnx", "onnx-loop", "pt2", "c", "wasm"], word("what to write")],
    out: Annotated[Path, word("the file", "FILE")],
    input: Annotated[Literal["uint8", "float"], word("take images as they are, or normalised N x C x H x W")] = "uint8",
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8"],
        word("of c, wasm: bfloat16 rounds kernels to half the bytes, int8 kernels and values to eight bits"),
    ] = "float32",
    calibrate: Annotated[
        str | None,
        word("of int8: data set whose train images tell the ranges of the values (default: the run's own)", "SOURCE"),
    ] = None,
    form: Annotated[
        Literal["small", "fast"] | None,
        word("of onnx-loop: least memory in ONNX Runtime, or least time (default: small)", "small|fast"),
    ] = None,
    winograd: Annotated[
        Literal["init", "file", "off"] | None,
        word(
            "of c and wasm: its kernels are made at the start, stand in the file, or it is not used (default: init)",
            "init|file|off",
        ),
    ] = None,
    build: Annotated[bool, word("of c: also write a shared library, for dacnn.runtime.load")] = False,
    target: Annotated[
        Literal["cortex-m4", "cortex-m7"] | None,
        word("of c: also compile it for this microcontroller and measure it", "cortex-m4|cortex-m7"),
    ] = None,
    flash_budget: Annotated[str | None, word("of its flash the most to take, such as 256kB", "BYTES")] = None,
    ram_budget: Annotated[str | None, word("of its RAM the most to take", "BYTES")] = None,
    images: Annotated[int, arg(help="test images to compare on")] = 256,
    data: Source = None,
    into: Into = None,
    json: Json = False,
    data_settings: OmitArgPrefixes[TestFlags] = TestFlags(),  # type: ignore[valid-type]  # noqa: B008
) -> None:
    """Write a trained network for another runtime, each kernel once, and compare what that computes with the network.

    Where the run's data set is not known, or not here, the comparison is on images of noise.

    Example: dacnn export runs/first --to onnx-loop --out first.onnx
    """
    from dacnn import tables
    from dacnn.checkpoint import check_place, load
    from dacnn.deploy.c.files import Wanted
    from dacnn.deploy.export import check_settings
    from dacnn.deploy.export import export as export_network
    from dacnn.errors import ConfigError
    from dacnn.measure.proposals import parse_bytes
    from dacnn.progress import bar
    from dacnn.training.run import calibration_images, some_images

    if calibrate is not None and dtype != "int8":
        raise ConfigError(f"--calibrate is given, but {dtype} has nothing to calibrate: leave it out, or add --dtype int8")
    flash_bytes, ram_bytes = (None if size is None else parse_bytes(size) for size in (flash_budget, ram_budget))
    wanted = Wanted(dtype, winograd, build, target, flash_bytes, ram_bytes)
    check_settings(to, float_input=input == "float", form=form, wanted=wanted)
    check_place(out)
    network, changes = load(run, into), settings_of(data_settings)
    with bar("loading") as tick:
        compared, what = some_images(
            run, network, images, data, progress=lambda what, done, total: tick(done, total), **changes
        )
    calibration, ranges = None, None
    if dtype == "int8":
        with bar("calibrating") as tick:
            calibration, ranges = calibration_images(
                run, network, calibrate, progress=lambda what, done, total: tick(done, total), **changes
            )
    done = export_network(
        network,
        to,
        out,
        float_input=input == "float",
        calibration=calibration,
        form=form,
        images=compared,
        **vars(wanted),
    )
    if json:
        tables.show_json({**done.to_table(), "compared_on": what, **({"ranges_from": ranges} if ranges else {})})
    else:
        tables.show(tables.export_table(done, what, ranges))


def audit(
    artefact: Positional[
        Annotated[Path, word("run directory, .safetensors, .pt, .pt2 or .onnx file; with --against, any file", "ARTEFACT")]
    ],
    /,
    *,
    against: Annotated[
        Path | None,
        word(
            "what it was made from: also find kernels that were altered or lost; in a file of an unknown kind, "
            "as a firmware image, a library or another runtime's model, look for its kernels",
            "REFERENCE",
        ),
    ] = None,
    memory: Annotated[
        bool, word("load it in a fresh process; tell what memory that adds, and how often each kernel is in it (Linux)")
    ] = False,
    json: Json = False,
) -> None:
    """Find every copy of every kernel in a saved or exported model or firmware image, scaled, reordered and rounded ones too.

    Exit status: 0 each kernel is there once, 1 copies or altered kernels, 2 it could not be read.

    Example: dacnn audit model.onnx --against runs/first --memory
    """
    from dacnn import tables
    from dacnn.errors import ArtefactError
    from dacnn.measure.audit import audit as audit_artefact
    from dacnn.measure.process import Held
    from dacnn.measure.runtimes import artefact_copies, artefact_memory
    from dacnn.progress import bar

    with bar("auditing") as tick:
        steps = 3 if memory else 1
        tick(0, steps)
        found = audit_artefact(artefact, against=against)
        tick(1, steps)
        added = artefact_memory(artefact) if memory else None
        tick(2, steps)
        held: tuple[Held, ...] = ()
        uncounted: ArtefactError | None = None
        if memory:
            try:
                held = artefact_copies(artefact, against)
            except ArtefactError as error:
                # the bytes that were added are known all the same
                uncounted = error
    if uncounted is not None:
        print(f"dacnn: copies in memory are not counted: {uncounted}", file=sys.stderr)
    if json:
        in_memory = {**dataclasses.asdict(added), "kernels": [dataclasses.asdict(kernel) for kernel in held]} if added else None
        tables.show_json({**found.to_table(), **({"memory": in_memory} if in_memory else {})})
    else:
        tables.show(tables.audit_table(found, added, held))
    if not found.single:
        sys.exit(1)

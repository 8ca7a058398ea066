"""Commands that examine a saved or exported model.

Nothing that imports torch is imported before a command needs it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from dacnn.flags import Json, word


def audit(
    artefact: Positional[Annotated[Path, word("run directory, .safetensors, .pt, .pt2 or .onnx file", "ARTEFACT")]],
    /,
    *,
    against: Annotated[
        Path | None,
        word("what it was made from: also find kernels that were altered or lost", "REFERENCE"),
    ] = None,
    memory: Annotated[bool, word("load it in a fresh process and report the memory that adds (Linux)")] = False,
    json: Json = False,
) -> None:
    """Find every copy of every kernel in a saved or exported model, scaled, transposed and blocked ones too.

    Exit status: 0 each kernel is there once, 1 copies or altered kernels, 2 it could not be read.

    Example: dacnn audit model.onnx --against runs/first --memory
    """
    from dacnn import tables
    from dacnn.measure.audit import audit as audit_artefact
    from dacnn.measure.runtimes import artefact_memory

    found = audit_artefact(artefact, against=against)
    added = artefact_memory(artefact) if memory else None
    if json:
        tables.show_json({**found.to_table(), **({"memory": dataclasses.asdict(added)} if added else {})})
    else:
        tables.show(tables.audit_table(found, added))
    if not found.single:
        sys.exit(1)

"""The known ways in which one kernel becomes many, or a wrong one: what happened, and what to do instead."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Hazard:
    """One way to lose the sharing.

    Attributes:
        name: Its key in a report.
        what: What happened, in one sentence.
        remedy: What to do instead.
    """

    name: str
    what: str
    remedy: str


HAZARDS = {
    hazard.name: hazard
    for hazard in (
        Hazard(
            "legacy-onnx-export",
            "torch.onnx.export(dynamo=False) folds batch norm into every convolution, so each layer gets its own scaled copy.",
            "Export with torch.onnx.export(..., dynamo=True).",
        ),
        Hazard(
            "onnxruntime-optimisation",
            "ONNX Runtime's optimiser folds batch norm into every convolution and orders the channels anew for each node.",
            "Ship the ONNX file as it was exported; where a session's memory counts, switch graph optimisation off.",
        ),
        Hazard(
            "fused-in-turn",
            "The scales of batch norms were multiplied into the one kernel, one after another as "
            "torch.fx.experimental.optimization.fuse does: outputs are wrong where several layers read it.",
            "Do not fuse batch norm into a shared kernel: keep its scale behind the convolution.",
        ),
        Hazard(
            "batch-norm-folded",
            "A scale for each channel, such as batch norm's, was multiplied into the kernel, once for each layer.",
            "Do not fold batch norm into a shared kernel: keep its scale behind the convolution.",
        ),
        Hazard(
            "quantised-apart",
            "Each layer's kernel was rounded to a narrower type by itself.",
            "Quantise the shared kernel once and let all layers read the result.",
        ),
        Hazard(
            "packed-per-layer",
            "The kernel was put into the order that a runtime reads it in, once for each layer.",
            "Pack the shared kernel once and let all layers read the result.",
        ),
        Hazard(
            "names-untied",
            "Layers held one tensor under several names, and each name was written with its own bytes.",
            "Give the kernel one owner, as dacnn.save writes it, or write tied names with safetensors.torch.save_model.",
        ),
        Hazard(
            "modules-untied",
            "Layers that should share a tensor hold equal ones: deepcopy, to_empty and load_state_dict(assign=True) untie.",
            "Give the kernel one owner that hands it to the layers, or tie the layers again after that step.",
        ),
        Hazard(
            "exported-apart",
            "The exporter wrote the same numbers once for each layer.",
            "Give the kernel one owner before exporting, so that the exporter sees one tensor.",
        ),
    )
}


def hazard_of(format: str, writer: str, words: Collection[str]) -> Hazard:
    """Which hazard made copies.

    Args:
        format: Format of the artefact, as in `Artefact.format`.
        writer: Whose traces it bears, as in `Artefact.writer`.
        words: How the copies differ from the kernel, as in `Difference.words`.

    Returns:
        The hazard.
    """
    scaled = any(word.startswith("scaled") for word in words)
    if writer == "onnxruntime":
        return HAZARDS["onnxruntime-optimisation"]
    if any(word.startswith("rounded") for word in words):
        return HAZARDS["quantised-apart"]
    if scaled:
        return HAZARDS["legacy-onnx-export" if writer == "legacy-onnx" else "batch-norm-folded"]
    if set(words) - {"exact", "last bits differ"}:
        return HAZARDS["packed-per-layer"]
    return HAZARDS[
        {"module": "modules-untied", "safetensors": "names-untied", "pt": "names-untied"}.get(format, "exported-apart")
    ]

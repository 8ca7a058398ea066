"""A trained network as a file that other runtimes load, each kernel in it once, checked before it takes its place."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dacnn.checkpoint import replacing, stored_once
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.parity import Parity, check, measure, noise_images, reference_logits
from dacnn.deploy.pt2 import to_pt2
from dacnn.deploy.roll import roll
from dacnn.errors import ConfigError, DeployError, UnknownNameError
from dacnn.networks.classifier import Classifier

# N images, H rows, W columns, C channels, K classes

Target = Literal["onnx", "onnx-loop", "pt2"]
Form = Literal["small", "fast"]
# images of noise that are compared where none are given
_NOISE = 16


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        target: What it is.
        path: Where it stands.
        file_bytes: Its size.
        stored_bytes: Bytes of the network's parameters and buffers, each once.
        parity: How far it is from the network, as its runtime computes it.
    """

    target: Target
    path: Path
    file_bytes: int
    stored_bytes: int
    parity: Parity

    def to_table(self) -> dict[str, Any]:
        """The fields as plain values."""
        return {**asdict(self), "path": str(self.path)}


def export(
    network: Classifier,
    to: Target,
    out: str | Path,
    *,
    float_input: bool = False,
    form: Form | None = None,
    images: Tensor | None = None,
) -> Exported:
    """Write a network for another runtime and compare what that computes with what the network computes.

    Args:
        network: The network.
        to: `onnx`: an ONNX graph; `onnx-loop`: one whose layers are turns of loops, so that a runtime packs each kernel once;
            `pt2`: what `torch.export.load` reads, without this library.
        out: The file; an older one is replaced as a whole.
        float_input: Take normalised floats N x C x H x W instead of uint8 images N x H x W x C.
        form: Of `onnx-loop`: `small` takes the least memory in ONNX Runtime, `fast` the least time; None: small.
        images: What to compare on, uint8, shape (N, H, W, C); None: noise.

    Returns:
        What was written.

    Raises:
        UnknownNameError: There is no such target or form.
        ConfigError: A form was given for a file that has none.
        DeployError: The network has a step that cannot be expressed, a package is missing, or the file computes something else.
        CheckpointError: The file cannot be written.

    Example:
        >>> import dacnn, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     done = dacnn.export(dacnn.create("dacnn3", width=8), "onnx", folder + "/net.onnx")
        >>> done.parity.top1_agreement
        1.0
    """
    if to not in get_args(Target):
        raise UnknownNameError("target", to, get_args(Target))
    if form is not None and form not in get_args(Form):
        raise UnknownNameError("form", form, get_args(Form))
    if form is not None and to != "onnx-loop":
        raise ConfigError(f"form is '{form}', but '{to}' has no forms: leave it out, or export to 'onnx-loop'")
    path = Path(out)
    images = noise_images(network.input, _NOISE) if images is None else images
    reference = reference_logits(network, images)
    with replacing(path) as beside:
        run = _WRITERS[to](network, beside, float_input, form or "small")
        normalize = network.normalize.to("cpu")
        parity = measure(lambda part: run(normalize(part).contiguous() if float_input else part), images, reference)
        check(parity, f"{path}: what was exported")
        file_bytes = beside.stat().st_size
    stored = sum(tensor.nbytes for tensor in stored_once(network.state_dict()).values())
    return Exported(to, path, file_bytes, stored, parity)


# runs an artefact on images as it takes them
Runner = Callable[[Tensor], NDArray[Any]]


def _write_onnx(network: Classifier, path: Path, float_input: bool, form: Form) -> Runner:
    path.write_bytes(to_onnx(lower(network), float_input=float_input).SerializeToString())
    return _onnx_runner(path)


def _write_onnx_loop(network: Classifier, path: Path, float_input: bool, form: Form) -> Runner:
    model = to_onnx_loop(roll(lower(network)), float_input=float_input, form=form)
    path.write_bytes(model.SerializeToString())
    return _onnx_runner(path)


def _onnx_runner(path: Path) -> Runner:
    try:
        import onnxruntime
    except ImportError:
        raise DeployError("an ONNX file is checked in ONNX Runtime, which is missing: pip install 'dacnn[export]'") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (name,) = (item.name for item in session.get_inputs())
    return lambda images: np.asarray(session.run(None, {name: images.numpy()})[0])


def _write_pt2(network: Classifier, path: Path, float_input: bool, form: Form) -> Runner:
    content = to_pt2(network, float_input=float_input)
    path.write_bytes(content)
    loaded = torch.export.load(io.BytesIO(content)).module()
    return lambda images: loaded(images).detach().numpy()


_WRITERS: dict[Target, Callable[[Classifier, Path, bool, Form], Runner]] = {
    "onnx": _write_onnx,
    "onnx-loop": _write_onnx_loop,
    "pt2": _write_pt2,
}

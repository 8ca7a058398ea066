"""The library's own back ends: compiled C, ONNX and PT2 files as the library writes them, kernels packed once in PyTorch."""

from pathlib import Path
from typing import Literal

import torch

from dacnn import runtime
from dacnn.bench.contenders import Artefact, Loaded
from dacnn.bench.onnx_backends import CALIBRATION_IMAGES, FILE
from dacnn.bench.torch_backends import load_network
from dacnn.deploy.c.build import build
from dacnn.deploy.c.integer_source import to_c_int8
from dacnn.deploy.c.source import to_c
from dacnn.deploy.export import integers_of
from dacnn.deploy.lower import lower
from dacnn.deploy.onnx.graph import Form
from dacnn.deploy.onnx.model import to_onnx, to_onnx_loop
from dacnn.deploy.packed import pack
from dacnn.deploy.parity import noise_images
from dacnn.deploy.pt2 import to_pt2
from dacnn.deploy.roll import roll
from dacnn.networks.classifier import Classifier

_PT2, _LIBRARY = "network.pt2", "network.so"


def write_onnx(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Write one node a layer, each kernel once."""
    (folder / FILE).write_bytes(to_onnx(lower(network)).SerializeToString())


def _write_loop(network: Classifier, folder: Path, form: Form) -> None:
    (folder / FILE).write_bytes(to_onnx_loop(roll(lower(network)), form=form).SerializeToString())


def write_loop_small(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Write one node a kernel, kernels outside the loops."""
    _write_loop(network, folder, "small")


def write_loop_fast(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Write one node a kernel, the kernel inside its loop."""
    _write_loop(network, folder, "fast")


def write_pt2(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Write what `torch.export.load` reads."""
    (folder / _PT2).write_bytes(to_pt2(network))


def load_pt2(artefact: Artefact) -> Loaded:
    """The exported program in PyTorch."""
    torch.set_num_threads(artefact.threads)
    module = torch.export.load(artefact.folder / _PT2).module()
    return Loaded(torch.no_grad()(module), torch.from_numpy)


def _packed(artefact: Artefact, dtype: Literal["float32", "bfloat16"]) -> Loaded:
    # the network is let go: what runs is the pack
    return Loaded(pack(load_network(artefact), dtype=dtype), torch.from_numpy)


def load_packed(artefact: Artefact) -> Loaded:
    """What `dacnn.pack` makes of the network, in float32."""
    return _packed(artefact, "float32")


def load_packed_bfloat16(artefact: Artefact) -> Loaded:
    """What `dacnn.pack` makes of the network, in bfloat16."""
    return _packed(artefact, "bfloat16")


def write_c(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Compile the network, its transformed kernels made when it is loaded."""
    build(to_c(lower(network), name="network"), folder / _LIBRARY)


def write_c_bfloat16(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Compile the network likewise, its kernels in bfloat16."""
    build(to_c(lower(network), name="network", dtype="bfloat16"), folder / _LIBRARY)


def write_c_int8(network: Classifier, folder: Path, largest_batch: int) -> None:
    """Compile the network in int8; where it has not learnt the ranges of its values, they are found on images of noise."""
    calibration = noise_images(network.input, CALIBRATION_IMAGES) if network.ranges is None else None
    build(to_c_int8(integers_of(network, calibration), name="network"), folder / _LIBRARY)


def load_c(artefact: Artefact) -> Loaded:
    """The compiled network."""
    compiled = runtime.load(artefact.folder / _LIBRARY)
    return Loaded(lambda images: compiled(images, artefact.threads))

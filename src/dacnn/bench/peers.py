"""Runtimes for phones and boards: ExecuTorch and LiteRT, both with XNNPACK, and ncnn. Only the writing imports PyTorch."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from dacnn.bench.contenders import Artefact, Loaded


def _layers_and_images(network: Any, batch: int) -> tuple[Any, Any]:
    """What the converters trace, and images of the right shape."""
    import torch

    from dacnn.bench.twin import classifier_only

    of = network.input
    return classifier_only(network), torch.zeros(batch, of.channels, of.height, of.width)


def write_executorch(network: Any, folder: Path, largest_batch: int) -> None:
    """Write an ExecuTorch program whose convolutions are left to XNNPACK."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    module, images = _layers_and_images(network, largest_batch)
    # memory is planned for the largest batch, so it has to be known
    sizes = ({0: torch.export.Dim("batch", min=1, max=largest_batch)},) if largest_batch > 1 else None
    exported = torch.export.export(module, (images,), dynamic_shapes=sizes)
    program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "network.pte").write_bytes(program.buffer)


def load_executorch(artefact: Artefact) -> Loaded:
    """The program in ExecuTorch's runtime, which is given PyTorch tensors."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(artefact.threads)
    program = Runtime.get().load_program(artefact.folder / "network.pte")
    method = program.load_method("forward")
    return Loaded(lambda images: method.execute([images])[0], torch.from_numpy)


def write_litert(network: Any, folder: Path, largest_batch: int) -> None:
    """Write a LiteRT model."""
    import litert_torch

    module, images = _layers_and_images(network, 1)
    litert_torch.convert(module, (images,)).export(str(folder / "network.tflite"))


def load_litert(artefact: Artefact) -> Loaded:
    """The model in LiteRT's interpreter, which is given one image at a time."""
    # XNNPACK may refuse another batch than the file's
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(artefact.folder / "network.tflite"), num_threads=artefact.threads)
    interpreter.allocate_tensors()
    source, result = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

    def classify(image: Any) -> Any:
        interpreter.set_tensor(source, image)
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return Loaded(
        lambda images: np.concatenate([classify(image) for image in images]), lambda images: np.split(images, len(images))
    )


def write_ncnn(network: Any, folder: Path, largest_batch: int) -> None:
    """Write the graph and the weights for ncnn."""
    import pnnx

    module, images = _layers_and_images(network, 1)
    with tempfile.TemporaryDirectory() as workshop:
        # it leaves ten files, of which ncnn reads two
        pnnx.export(module, str(Path(workshop) / "network.pt"), (images,), fp16=False)
        for ending in ("param", "bin"):
            content = (Path(workshop) / f"network.ncnn.{ending}").read_bytes()
            (folder / f"network.{ending}").write_bytes(content)


def load_ncnn(artefact: Artefact) -> Loaded:
    """The network in ncnn, which takes one image at a time."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = artefact.threads
    # by itself it would compute in shorter floats where the CPU has units for them
    for shorter in ("fp16_packed", "fp16_storage", "fp16_arithmetic", "bf16_storage"):
        setattr(net.opt, f"use_{shorter}", False)
    for read, file in ((net.load_param, "network.param"), (net.load_model, "network.bin")):
        if read(str(artefact.folder / file)) != 0:
            raise OSError(f"ncnn cannot read {file}")

    def classify(image: Any) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", image)
        status, logits = extractor.extract("out0")
        if status != 0:
            raise RuntimeError(f"ncnn ended with status {status}")
        return np.array(logits)

    return Loaded(
        lambda images: np.stack([classify(image) for image in images]),
        lambda images: [ncnn.Mat(image).clone() for image in images],
    )

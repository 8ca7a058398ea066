"""What reads ONNX files: ONNX Runtime and OpenVINO. Only the writing imports PyTorch."""

from pathlib import Path
from typing import Any

from dacnn.bench.contenders import Artefact, Loaded

FILE = "network.onnx"
# of noise; they tell as much of the time as real ones do
CALIBRATION_IMAGES = 64


def write(network: Any, folder: Path, largest_batch: int) -> None:
    """Write what `torch.onnx.export` makes of the layers, for batches of any size."""
    import torch

    from dacnn.bench.twin import classifier_only

    of = network.input
    # of a batch of one it would take the size for a constant
    images = torch.zeros(2, of.channels, of.height, of.width)
    torch.onnx.export(
        classifier_only(network),
        (images,),
        folder / FILE,
        dynamo=True,
        external_data=False,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )


def write_int8(network: Any, folder: Path, largest_batch: int) -> None:
    """Write the same in int8, as ONNX Runtime quantizes it: a scale for each output channel, uint8 between the nodes."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    from dacnn.deploy.parity import noise_images
    from dacnn.networks.normalize import Normalize

    class Noise(CalibrationDataReader):  # type: ignore[misc]
        """Batches of images, one after the other."""

        def __init__(self) -> None:
            images = Normalize(network.input)(noise_images(network.input, CALIBRATION_IMAGES))
            self.batches = iter(images.split(16))

        def get_next(self) -> Any:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    write(network, folder, largest_batch)
    name = onnx.load(folder / FILE).graph.input[0].name
    quantize_static(folder / FILE, folder / FILE, Noise(), quant_format=QuantFormat.QDQ, per_channel=True)


def _onnxruntime(artefact: Artefact, optimised: bool) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = artefact.threads, 1
    options.log_severity_level = 4
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(artefact.folder / FILE), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Loaded(lambda images: session.run(None, {name: images})[0])


def load_onnxruntime(artefact: Artefact) -> Loaded:
    """A session of ONNX Runtime, its optimisation at its default."""
    return _onnxruntime(artefact, optimised=True)


def load_onnxruntime_off(artefact: Artefact) -> Loaded:
    """A session of ONNX Runtime that runs the graph as it stands in the file."""
    return _onnxruntime(artefact, optimised=False)


def load_openvino(artefact: Artefact) -> Loaded:
    """A model that OpenVINO compiled for the CPU."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": artefact.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        # by itself it would take bfloat16 where the CPU has units for it
        "INFERENCE_PRECISION_HINT": "f32",
    }
    model = openvino.Core().compile_model(str(artefact.folder / FILE), "CPU", settings)
    request = model.create_infer_request()
    return Loaded(lambda images: request.infer([images], share_inputs=True)[model.output(0)])

"""A Program as an ONNX model, flat or with its loops."""

from typing import TYPE_CHECKING

from dacnn import __version__
from dacnn.deploy.onnx.graph import Form, Graph, Model
from dacnn.deploy.onnx.loops import write_steps
from dacnn.deploy.onnx.shapes import Shape, depends_on_image_size, shapes_of
from dacnn.deploy.program import IMAGES, Normalize, Program, metadata
from dacnn.deploy.shapes import flat_steps
from dacnn.errors import DeployError

if TYPE_CHECKING:
    import onnx

# N images, H rows, W columns, C channels, K classes

LOGITS = "logits"
# Of May 2022, with the format of files that belongs to it: runtimes take these since, and no step needs what came later.
_OPSET, _IR_VERSION = 17, 8
# protobuf's limit of a message, less room for the structure
_LARGEST_BYTES = 2**31 - 2**22


def to_onnx(program: Program, *, float_input: bool = False) -> "onnx.ModelProto":
    """Write a flat program as an ONNX model that stores each kernel once.

    A runtime that optimises may still make a copy of a kernel for every layer that reads it; `to_onnx_loop` prevents that.

    Args:
        program: A program without loops.
        float_input: Take normalised float32, N x C x H x W, instead of uint8, N x H x W x C.

    Returns:
        The model: `images` -> `logits`, float32, N x K. N is open, and so are H and W unless the program flattens what depends
        on them.

    Raises:
        DeployError: The program has loops, is too large for one file, or the onnx package is missing.
    """
    flat_steps(program)
    return _model(program, float_input, None)


def to_onnx_loop(program: Program, *, float_input: bool = False, form: Form = "small") -> "onnx.ModelProto":
    """Write a rolled program as an ONNX model in which one node reads each kernel, in as many turns as layers do.

    Args:
        program: A program as `roll` gives it.
        float_input: Take normalised float32, N x C x H x W, instead of uint8, N x H x W x C.
        form: `small`: kernels stay outside the loops, where ONNX Runtime reads them as they are. `fast`: a kernel that one
            body reads stands in it, and ONNX Runtime packs it, once. In both, a template bank or a tiled kernel is computed in
            every turn, and of a kernel that is read outside of loops too, a packed copy stands beside the other.

    Returns:
        The model, as of `to_onnx`.

    Raises:
        DeployError: The program is too large for one file, or the onnx package is missing.
    """
    return _model(program, float_input, form)


def _model(program: Program, float_input: bool, form: Form | None) -> "onnx.ModelProto":
    if program.stored_bytes > _LARGEST_BYTES:
        raise DeployError(
            f"program '{program.name}' has {program.stored_bytes:,} bytes of tensors: expected at most {_LARGEST_BYTES:,}, "
            "which is what one ONNX file holds"
        )
    of = program.input
    sides = (of.height, of.width) if depends_on_image_size(program) else (None, None)
    planes: Shape = (None, of.channels, *sides)
    model = Model(program, shapes_of(program, planes), form, reserved=(IMAGES, LOGITS))
    graph = Graph(model, _zero)
    graph.values[IMAGES] = IMAGES
    steps = program.steps
    if float_input:
        graph.values |= {step.out: IMAGES for step in steps if isinstance(step, Normalize)}
        steps = tuple(step for step in steps if not isinstance(step, Normalize))
    write_steps(graph, steps)
    graph.add("Identity", [graph.value(program.result)], [LOGITS])
    return _file(model, graph, planes, float_input)


def _zero(graph: Graph) -> str:
    """The number of the only turn of the outermost graph, which runtimes do not know before they see images."""
    size = graph.node("Size", [IMAGES], "images.size")
    return graph.node("Sub", [size, size], "zero")


def _file(model: Model, graph: Graph, planes: Shape, float_input: bool) -> "onnx.ModelProto":
    """The graph with its input and output, and what the file says of itself."""
    program, helper, types = model.program, model.onnx.helper, model.onnx.TensorProto
    channels, height, width = planes[1], planes[2] or "H", planes[3] or "W"
    shape = ["N", channels, height, width] if float_input else ["N", height, width, channels]
    images = helper.make_tensor_value_info(IMAGES, types.FLOAT if float_input else types.UINT8, shape)
    logits = helper.make_tensor_value_info(LOGITS, types.FLOAT, ["N", len(program.classes)])
    file: onnx.ModelProto = helper.make_model(
        graph.finish("dacnn", [images], [logits]),
        producer_name="dacnn",
        producer_version=__version__,
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    helper.set_model_props(file, {"dacnn": metadata(program.input, program.classes, name=program.name)})
    return file

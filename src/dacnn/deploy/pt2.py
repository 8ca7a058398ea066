"""A network as `torch.export.save` writes it: PyTorch alone loads it, and names each kernel once."""

import copy
import io

import torch
from torch import Tensor, nn

from dacnn.deploy.parity import noise_images
from dacnn.deploy.program import metadata
from dacnn.errors import DeployError, told
from dacnn.networks.classifier import Classifier

# N images, H rows, W columns, C channels, K classes

# the extra file that says what images and classes are
METADATA = "dacnn.json"


class _Exported(nn.Module):
    """A network behind an argument of a name that stays."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def to_pt2(network: Classifier, *, float_input: bool = False) -> bytes:
    """Export a network for any batch size.

    Args:
        network: The network; left as it is.
        float_input: Take normalised floats N x C x H x W instead of uint8 images N x H x W x C.

    Returns:
        What `torch.export.load` reads from a file or a buffer; its module takes `images` and gives logits, N x K. The file
        `dacnn.json` in it tells of images and classes.

    Raises:
        DeployError: PyTorch cannot export the network.
    """
    example = noise_images(network.input, 2)
    module = _Exported(copy.deepcopy(network).cpu().eval())
    content = io.BytesIO()
    try:
        if float_input:
            example = module.network.normalize(example).contiguous()
        program = torch.export.export(module, (example,), dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}})
        torch.export.save(program, content, extra_files={METADATA: metadata(network.input, network.classes)})
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise DeployError(f"torch.export cannot export the network for any batch size: {told(error)}") from error
    return content.getvalue()

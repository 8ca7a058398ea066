"""From the images people have to what a first layer takes."""

import torch
from torch import Tensor, nn

from dacnn.errors import ShapeError
from dacnn.networks.plan import Input

# N images, H rows, W columns, C channels


class Normalize(nn.Module):
    """uint8 images, N x H x W x C -> normalised floats, N x C x H x W, in channels-last memory."""

    scale: Tensor
    shift: Tensor

    def __init__(self, input: Input) -> None:
        """Take the statistics from `input`, which is where they are stored: the state dict has none of them."""
        super().__init__()
        self.input = input
        self.register_buffer("scale", torch.empty(input.channels), persistent=False)
        self.register_buffer("shift", torch.empty(input.channels), persistent=False)
        self.reset_statistics()

    @torch.no_grad()
    def reset_statistics(self, device: torch.device | None = None) -> None:
        """Fill the buffers from the input's description, as after `to_empty`."""
        mean = torch.tensor(self.input.mean, dtype=torch.float64, device="cpu")
        std = torch.tensor(self.input.std, dtype=torch.float64, device="cpu")
        # one multiply-add per value: (x / 255 - mean) / std
        if self.scale.is_meta and device is not None:
            self.to_empty(device=device)
        self.scale.copy_(1 / (255 * std))
        self.shift.copy_(-mean / std)

    def forward(self, images_nhwc: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images_nhwc: uint8, shape (N, H, W, C).

        Returns:
            Shape (N, C, H, W), of the buffers' dtype, in channels-last memory.

        Raises:
            ShapeError: Not four dimensions, or another number of channels than the input's.
        """
        if images_nhwc.ndim != 4 or images_nhwc.shape[3] != self.input.channels:
            raise ShapeError(
                f"images have shape {tuple(images_nhwc.shape)}: "
                f"uint8 images are N x H x W x {self.input.channels} for this network"
            )
        return (images_nhwc * self.scale + self.shift).permute(0, 3, 1, 2)

"""A convolution that is given its kernel, with the norm and the regulator that are its own."""

import torch.nn.functional as F
from torch import Tensor, nn

from dacnn.config import RegulatorPlace
from dacnn.sharing.remake import halve_by_max, norm_relu
from dacnn.sharing.winograd import convolve

# N images, C input channels, O output channels, H rows, W columns


class Reader(nn.Module):
    """Convolution, regulator and batch norm of one place in a network; the kernel belongs to somebody else."""

    def __init__(self, out_channels: int, regulator: nn.Module | None = None, place: RegulatorPlace = "before-norm") -> None:
        """Make a reader.

        Args:
            out_channels: Output channels O of the kernels it will be given.
            regulator: Module from N x O x H x W to the same shape.
            place: Where the regulator stands: before the norm or behind it.
        """
        super().__init__()
        self.norm = nn.BatchNorm2d(out_channels)
        self.regulator = regulator
        self.regulator_place = place

    def forward(self, x: Tensor, kernel: Tensor, relu: bool = False, halve: bool = False) -> Tensor:
        """Convolve with a kernel that stays where it is, at stride 1, the image keeping its size.

        Args:
            x: Shape (N, C, H, W).
            kernel: Shape (O, C, K, K), K odd.
            relu: Whether a ReLU follows.
            halve: Whether 2x2 max-pooling follows that.

        Returns:
            Shape (N, O, H, W), or (N, O, H // 2, W // 2).
        """
        x = convolve(x, kernel)
        before, after = (self.regulator, None) if self.regulator_place == "before-norm" else (None, self.regulator)
        if before is not None:
            x = before(x)
        if relu and after is None:
            return norm_relu(self.norm, x, halve)
        x = self.norm(x)
        if after is not None:
            x = after(x)
        x = F.relu(x, inplace=True) if relu else x
        return halve_by_max(x) if halve else x

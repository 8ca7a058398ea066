"""Small networks that know nothing of dacnn, as `dacnn.anchor` meets them; nothing here imports it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# N images, C channels, H rows, W columns, T tokens

WIDTH = 8


class Residual(nn.Sequential):
    """Parts in a row, and what went in is added."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)
        return x + y


def conv_mixer(depth: int = 3) -> nn.Module:
    """ConvMixer, whose root is an `nn.Sequential`: depthwise and pointwise convolutions, norms behind the activations."""

    def block() -> nn.Module:
        depthwise = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 5, groups=WIDTH, padding=2), nn.GELU(), nn.BatchNorm2d(WIDTH))
        return nn.Sequential(Residual(*depthwise), nn.Conv2d(WIDTH, WIDTH, 1), nn.GELU(), nn.BatchNorm2d(WIDTH))

    patches = nn.Sequential(nn.Conv2d(3, WIDTH, 4, 4), nn.GELU(), nn.BatchNorm2d(WIDTH))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 5))
    return nn.Sequential(patches, *[block() for _ in range(depth)], head)


def chain(
    convolution: Callable[..., nn.Module] = nn.Conv2d,
    norm: Callable[..., nn.Module] | None = nn.BatchNorm2d,
    *,
    depth: int = 3,
    **settings: Any,
) -> nn.Sequential:
    """Convolutions of 8 -> 8 channels in a row, each with its norm (None: without) and a ReLU."""
    settings = {"kernel_size": 3, "padding": 1} | settings

    def block() -> nn.Module:
        return nn.Sequential(convolution(WIDTH, WIDTH, **settings), norm(WIDTH) if norm else nn.Identity(), nn.ReLU())

    return nn.Sequential(*[block() for _ in range(depth)])


def double(inputs: int, outputs: int) -> nn.Module:
    """Twice convolution, batch norm and ReLU."""
    parts: list[nn.Module] = []
    for channels in (inputs, outputs):
        parts += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts)


class UNet(nn.Module):
    """Segmentation: two steps down, two transposed convolutions up, the images of the way down beside those of the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(3, WIDTH), double(WIDTH, WIDTH)])
        self.middle = double(WIDTH, WIDTH)
        self.up = nn.ModuleList([nn.ConvTranspose2d(WIDTH, WIDTH, 2, stride=2) for _ in range(2)])
        self.join = nn.ModuleList([double(2 * WIDTH, WIDTH) for _ in range(2)])
        self.head = nn.Conv2d(WIDTH, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for step in self.down:
            x = step(x)
            kept.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(torch.cat([kept.pop(), up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


class MixerBlock(nn.Module):
    """Linear layers over tokens, then over channels."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(tokens, 2 * tokens), nn.GELU(), nn.Linear(2 * tokens, tokens))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).mT).mT
        return x + self.channels(self.norm2(x))


class MLPMixer(nn.Module):
    """MLP-Mixer on 16x16 pixels in patches of 4x4."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList([MixerBlock(tokens=16) for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


class AttentionStack(nn.Module):
    """PyTorch's own encoder layers over tokens: layers that are read without being called."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=2 * WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def _transformers(name: str, **settings: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}Model")(config)


def _images(side: int) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


# makes each network, and what it takes
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet": (
        lambda: _transformers("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic"),
        lambda: _images(32),
    ),
    "resnet-bottleneck": (
        lambda: _transformers("ResNet", embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2]),
        lambda: _images(32),
    ),
    "convnext": (
        lambda: _transformers("ConvNext", hidden_sizes=[8, 16], depths=[2, 2], num_stages=2, patch_size=2),
        lambda: _images(16),
    ),
    "regnet": (
        lambda: _transformers("RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], groups_width=4),
        lambda: _images(32),
    ),
    "mobilenet": (lambda: _transformers("MobileNetV2", depth_multiplier=0.25), lambda: _images(64)),
    "vit": (
        lambda: _transformers(
            "ViT", hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
        ),
        lambda: _images(16),
    ),
    "unet": (UNet, lambda: _images(16)),
    "convmixer": (conv_mixer, lambda: _images(16)),
    "mlp-mixer": (MLPMixer, lambda: _images(16)),
    "attention": (AttentionStack, lambda: torch.randn(2, 6, WIDTH, generator=torch.Generator().manual_seed(0))),
}


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A network of the table, its weights, norms and statistics drawn anew, in evaluation mode, and an input."""
    build, example = NETWORKS[name]
    return stirred(build()).eval(), example()


def stirred(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module with every number moved, so that no norm is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.1)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module


def tensors_of(output: Any) -> list[Tensor]:
    """Every tensor that a module gave."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


class SamePadding(nn.Module):
    """Pads as TensorFlow does, by what its images' size leaves over."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (max((-(-side // 2) - 1) * 2 + 3 - side, 0) for side in x.shape[2:])
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        y: Tensor = self.head(F.adaptive_avg_pool2d(self.convolution(x).relu(), 1).flatten(1))
        return y
